"""The figures of a dataset, against those that training makes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from data.records import Record, read_manifest, write_manifest
from jaxgrpo.config import Config
from jaxgrpo.dataset import step_plan
from jaxgrpo.inputs import PromptCollator, measure, prompt_loader, sort_into_buckets
from jaxgrpo.inspection.survey import Survey, mend_overflows, survey
from jaxgrpo.load import open_processor
from jaxgrpo.scoring import open_reward
from models.qwen2_5_vl.processor import Processor
from tests.data.broken import write_odd
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def processor(place: Workplace) -> Processor:
    return open_processor(tiny_run.load_config(place))


def surveyed(config: Config, processor: Processor) -> Survey:
    measured, excluded = measure(config, processor, train=True, evaluation=False)
    dataset = sort_into_buckets(config, processor, measured, excluded).train
    assert dataset is not None
    reward = open_reward(config)
    part = measured["data.train"]
    return survey(config, "data.train", part, dataset, excluded, processor, reward)


def of_records(place: Workplace, folder: Path, records: list[Record], *overrides: str) -> Config:
    """A config that trains on these."""
    write_manifest(folder / "train.jsonl", records)
    return tiny_run.load_config(place, f"data.train={folder / 'train.jsonl'}", *overrides)


def tvg(place: Workplace) -> Record:
    records = read_manifest(place.clips / "train.jsonl", place.clips)
    return next(record for record in records if record.task == "tvg")


def test_padding_is_what_a_batch_of_the_bucket_holds(
    place: Workplace, processor: Processor
) -> None:
    config = tiny_run.load_config(place, "data.buckets=[80, 104]")
    found = surveyed(config, processor)
    measured, excluded = measure(config, processor, train=True, evaluation=False)
    inputs = sort_into_buckets(config, processor, measured, excluded)
    train = inputs.train
    assert train is not None
    load = prompt_loader(inputs, train, config.data)
    collate = PromptCollator(train.offers, processor.pad_id)
    for number, bucket in enumerate(found.buckets):
        prompts = [load(item) for item in train.buckets[number]]
        batch = collate(prompts, number)
        assert bucket.items == len(prompts) > 0
        real = sum(len(prompt.tokens) for prompt in prompts)
        assert bucket.token_ratio == pytest.approx(batch.tokens.size / real)
        real = sum(len(prompt.patches) for prompt in prompts)
        assert bucket.patch_ratio == pytest.approx(batch.patches[..., 0].size / real)


def test_the_columns_are_those_of_the_loaded_prompts(
    place: Workplace, processor: Processor
) -> None:
    config = tiny_run.load_config(place)
    columns = surveyed(config, processor).columns
    measured, excluded = measure(config, processor, train=True, evaluation=False)
    inputs = sort_into_buckets(config, processor, measured, excluded)
    assert inputs.train is not None
    load = prompt_loader(inputs, inputs.train, config.data)
    items = range(len(inputs.train.records))
    pad = processor.config.video_token_id
    expected = {
        "frames the model sees": [len(load.frames(item).timestamps) for item in items],
        "video (tokens)": [int((load(item).tokens == pad).sum()) for item in items],
        "prompt (tokens)": [len(load(item).tokens) for item in items],
        "video length (s)": [record.duration for record in inputs.train.records],
    }
    for name, values in expected.items():
        column = columns[name]
        assert (column.least, column.most) == (min(values), max(values))
        assert column.median == pytest.approx(np.median(values))
        counts = [
            sum(low <= value < high for value in values)
            for low, high in zip(column.edges, column.edges[1:], strict=False)
        ]
        counts[-1] += sum(value == column.edges[-1] for value in values)
        assert list(column.counts) == counts and sum(counts) == len(values)


def test_steps_are_those_of_the_plan(place: Workplace, processor: Processor) -> None:
    config = tiny_run.load_config(place, "data.buckets=[80, 104]", "train.steps=2")
    found = surveyed(config, processor)
    measured, excluded = measure(config, processor, train=True, evaluation=False)
    train = sort_into_buckets(config, processor, measured, excluded).train
    assert train is not None and found.steps is not None
    plan = step_plan(train, config.rollout.prompts, config.seed)
    assert found.steps.epoch == plan.first_step(1) == sum(b.steps or 0 for b in found.buckets)
    drawn = {item for step in range(2) for item in plan.step(step).items}
    assert len(found.steps.never) == len(train.records) - len(drawn) > 0
    assert {train.records[item].id for item in drawn}.isdisjoint(found.steps.never)


# ---- prompts that do not fit ----


@pytest.mark.parametrize(
    ("question", "least", "mend"),
    [
        ("When?", 784, "set data.total_pixels="),
        ("When?", 100_352, "lower data.max_frames or data.fps"),  # frames cannot be smaller
        ("When? " * 200, 784, "shorten the questions"),
    ],
)
def test_the_mend_of_an_overflow_makes_all_prompts_fit(
    place: Workplace, tmp_path: Path, question: str, least: int, mend: str
) -> None:
    write_odd(tmp_path / "a.mp4", "libx264", "yuv420p", 448, 336)
    record = Record("a", "a.mp4", "tvg", question, (), None, ((0.0, 1.0),), None)
    pixels = [f"data.root={tmp_path}", "data.max_pixels=200704", f"data.min_pixels={least}"]
    pixels.append("data.buckets=[200]")

    def tokens_and_mend(*overrides: str) -> tuple[int, str]:
        config = of_records(place, tmp_path, [record], *pixels, *overrides)
        processor = open_processor(config)
        [part] = measure(config, processor, train=True, evaluation=False)[0].values()
        tokens = part.usable[0][1].tokens
        return tokens, mend_overflows(config, processor, part) if tokens > 200 else ""

    tokens, told = tokens_and_mend()
    assert told.startswith(f"add a bucket of {tokens} to data.buckets, or {mend}")
    if "total_pixels" in mend:
        tokens, _ = tokens_and_mend(told.rpartition(" ")[2])
        assert 150 < tokens <= 200
