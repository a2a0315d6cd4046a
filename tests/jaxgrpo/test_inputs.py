"""From manifests to batches: buckets, bad videos, swapped videos, loaders and targets."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from data.prompts import target_text
from data.records import Record, read_manifest, write_manifest
from jaxgrpo import cli
from jaxgrpo.config import Config, DataSection
from jaxgrpo.inputs import (
    InputError,
    Inputs,
    PromptCollator,
    PromptLoader,
    TargetCollator,
    TargetLoader,
    describe,
    frame_sampling,
    messages,
    pixel_limits,
    prepare,
)
from jaxgrpo.load import open_processor
from models.qwen2_5_vl.processor import Processor, Video
from tests.data import clips
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace
from tests.oracle import hf_processing as hf


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def processor(place: Workplace) -> Processor:
    return open_processor(tiny_run.load_config(place))


@pytest.fixture(scope="module")
def widths(place: Workplace, processor: Processor) -> list[int]:
    """Three buckets: the shortest prompts, most, and the longest with room to spare."""
    config = tiny_run.load_config(place, *tiny_run.mixed(place), "data.buckets=[1000]")
    sizes = prepare(config, processor, train=True, evaluation=False).train.sizes
    lengths = sorted({size.tokens for size in sizes})
    return [lengths[1], lengths[-2], lengths[-1] + 5]


@pytest.fixture(scope="module")
def config(place: Workplace, widths: list[int]) -> Config:
    return tiny_run.load_config(place, *tiny_run.mixed(place), f"data.buckets={widths}")


@pytest.fixture(scope="module")
def inputs(config: Config, processor: Processor) -> Inputs:
    return prepare(config, processor, train=True, evaluation=True)


# ---- buckets ----


def test_every_item_is_in_the_smallest_bucket_that_holds_it(
    inputs: Inputs, widths: list[int]
) -> None:
    assert all(inputs.train.buckets)
    assert [bucket.tokens for bucket in inputs.buckets] == widths
    for dataset in (inputs.train, inputs.evaluation, inputs.swapped):
        assert sorted(sum(dataset.buckets, ())) == list(range(len(dataset.records)))
        for number, items in enumerate(dataset.buckets):
            for item in items:
                tokens = dataset.sizes[item].tokens
                assert tokens <= widths[number] and (number == 0 or tokens > widths[number - 1])


def test_a_bucket_offers_what_its_largest_prompt_needs(inputs: Inputs) -> None:
    for number, bucket in enumerate(inputs.buckets):
        sizes = [
            dataset.sizes[item]
            for dataset in (inputs.train, inputs.evaluation, inputs.swapped)
            for item in dataset.buckets[number]
        ]
        for name in ("patches", "windows", "frames", "frame_patches"):
            assert max(size._asdict()[name] for size in sizes) == bucket._asdict()[name]


def test_a_measured_prompt_is_what_is_loaded(config: Config, inputs: Inputs) -> None:
    load = PromptLoader(inputs.processor, inputs.train.records, config.data)
    whole = [i for i, r in enumerate(inputs.train.records) if r.id != "cut"][:4]
    for item in whole:
        prompt = load(item)
        assert prompt.size == inputs.train.sizes[item]
        assert prompt.length == inputs.train.sizes[item].tokens


# ---- which videos ----


def test_a_bad_video_is_left_out_and_named(config: Config, inputs: Inputs) -> None:
    assert list(inputs.excluded) == ["data.train/notes"]
    assert "notes" not in {record.id for record in inputs.train.records}
    text = describe(inputs)
    assert "train: 13 items (4 gqa, 4 mcqa, 5 tvg)" in text
    assert "1 items left out, their videos cannot be read" in text
    assert f"  notes: {config.data.root}/{tiny_run.NOTES}: OpenCV finds no video" in text


def test_what_a_run_left_out_stays_out_with_its_reason(
    config: Config, processor: Processor, inputs: Inputs
) -> None:
    """A video that was mended meanwhile would change the plan of a run that goes on."""
    then = {"data.train/train-00001-tvg": "train-00001-tvg: it was damaged then"}
    known = inputs.excluded | then
    again = prepare(config, processor, train=True, evaluation=True, excluded=known)
    assert again.excluded == known
    assert "train-00001-tvg" not in {record.id for record in again.train.records}
    assert "train-00001-tvg: it was damaged then" in describe(again)


def test_the_two_manifests_may_use_the_same_ids(
    place: Workplace, processor: Processor, tmp_path: Path
) -> None:
    """A bad video of training leaves nothing out of the evaluation."""
    first, second = evaluation_records(place)[:2]
    bad = dataclasses.replace(first, video=tiny_run.NOTES)
    write_manifest(tmp_path / "train.jsonl", [bad, second])
    config = tiny_run.load_config(place, f"data.train={tmp_path / 'train.jsonl'}")
    inputs = prepare(config, processor, train=True, evaluation=True)
    assert [record.id for record in inputs.train.records] == [second.id]
    assert len(inputs.evaluation.records) == len(evaluation_records(place))


def test_no_question_meets_its_own_video_when_videos_are_swapped(inputs: Inputs) -> None:
    own = {record.id: record for record in inputs.evaluation.records}
    grounding = {name for name, record in own.items() if record.task == "tvg"}
    assert {record.id for record in inputs.swapped.records} == grounding
    for record in inputs.swapped.records:
        mine = own[record.id]
        assert record.video != mine.video
        assert (record.question, record.spans) == (mine.question, mine.spans)
        others = {(r.video, r.duration, r.clip) for r in own.values()}
        assert (record.video, record.duration, record.clip) in others


def test_questions_about_one_video_cannot_be_swapped(
    place: Workplace, processor: Processor, tmp_path: Path
) -> None:
    row = next(r for r in evaluation_records(place) if r.task == "tvg")
    write_manifest(tmp_path / "one.jsonl", [row, dataclasses.replace(row, id="b")])
    config = tiny_run.load_config(place, f"data.eval={tmp_path / 'one.jsonl'}")
    assert prepare(config, processor, train=False, evaluation=True).swapped is None


def evaluation_records(place: Workplace) -> list[Record]:
    return read_manifest(place.clips / "eval.jsonl", place.clips)


def test_eval_limit_takes_the_first_items(place: Workplace, processor: Processor) -> None:
    config = tiny_run.load_config(place, "eval.limit=4")
    inputs = prepare(config, processor, train=False, evaluation=True)
    assert list(inputs.evaluation.records) == evaluation_records(place)[:4]
    assert inputs.train is None


def test_synthetic_clips_are_made_where_they_are_asked_for(
    place: Workplace, processor: Processor, tmp_path: Path
) -> None:
    synthetic = "{train_clips: 2, eval_clips: 2, seconds: [4.0, 4.0], events: [1, 1]}"
    overrides = [f"data.root={tmp_path}", "data.train=''", "data.eval=''"]
    config = tiny_run.load_config(place, *overrides, f"data.synthetic={synthetic}")
    inputs = prepare(config, processor, train=True, evaluation=True)
    assert len(inputs.train.records) == len(inputs.evaluation.records) == 6
    train = {record.video for record in inputs.train.records}
    assert not train & {record.video for record in inputs.evaluation.records}
    assert all((tmp_path / video).is_file() for video in train)


# ---- what is loaded ----


@pytest.mark.parametrize("clip", [None, (0.5, 3.3)])
def test_from_file_to_prompt_it_is_what_pyav_qwen_vl_utils_and_transformers_make(
    tmp_path: Path, clip: tuple[float, float] | None
) -> None:
    path = clips.write_clip(tmp_path / "a.mp4", 100)
    model = hf.write_model_directory(tmp_path / "model")
    data = DataSection(train="unread.jsonl", root=str(tmp_path), fps=3.0, min_pixels=20 * 784)
    span = ((0.5, 1.0),)
    record = Record("a", "a.mp4", "tvg", "When does it open?", (), None, span, 4.0, clip)
    processor = Processor.load(model, pixel_limits(data))
    prompt = PromptLoader(processor, (record,), data)(0)

    pixels, _ = clips.decode_all(path)
    indices = hf.frame_indices(100, 25.0, frame_sampling(data), clip)
    sampled_fps = len(indices) / (indices[-1] - indices[0] + 1) * 25.0
    expected = hf.transformers_inputs(
        model,
        pixel_limits(data),
        messages(record, data.thinking),
        [Video(pixels[indices], 1 / sampled_fps)],
    )
    np.testing.assert_array_equal(prompt.tokens, expected["input_ids"][0])
    [grid] = expected["video_grid_thw"].tolist()
    assert grid[1:] == [8, 12] and len(indices) == 2 * grid[0]
    frames = prompt.frame_index.shape
    assert frames == (grid[0], grid[1] * grid[2])
    np.testing.assert_array_equal(
        prompt.positions, hf.released_positions(processor.config, expected)
    )
    raster = hf.raster_patches(processor.config, [grid], prompt.patches)
    difference = np.abs(raster - hf.pixels(expected["pixel_values_videos"]))
    # OpenCV and PyAV convert colours with other roundings: see tests/data/test_video.py.
    assert difference.max() <= 3 and difference.mean() < 0.25


@pytest.fixture(scope="module")
def targets(config: Config, inputs: Inputs) -> TargetLoader:
    prompts = PromptLoader(inputs.processor, inputs.train.records, config.data)
    return TargetLoader(prompts, max_tokens=32)


def test_loaders_and_collators_pass_between_processes(
    config: Config, inputs: Inputs, targets: TargetLoader
) -> None:
    collate = TargetCollator(PromptCollator(inputs.buckets, inputs.processor.pad_id), 32)
    again, collate_again = pickle.loads(pickle.dumps((targets, collate)))
    item = inputs.train.buckets[2][0]
    found = collate_again([again(item), again(item)], 2)
    expected = collate([targets(item), targets(item)], 2)
    for a, b in zip((*found.prompt, *found[1:]), (*expected.prompt, *expected[1:]), strict=True):
        np.testing.assert_array_equal(a, b)


def test_a_batch_of_targets_is_padded_to_its_bucket_and_to_c(
    inputs: Inputs, targets: TargetLoader
) -> None:
    pad = inputs.processor.pad_id
    items = inputs.train.buckets[0][:2]
    batch = TargetCollator(PromptCollator(inputs.buckets, pad), 32)([targets(i) for i in items], 0)
    assert batch.prompt.tokens.shape == (2, inputs.buckets[0].tokens)
    assert batch.completion.shape == (2, 1, 32)
    for row, item in enumerate(items):
        length = int(batch.length[row, 0])
        ids, rest = np.split(batch.completion[row, 0], [length])
        record = inputs.train.records[item]
        assert inputs.processor.decode(ids) == target_text(record, thinking=False)
        assert ids[-1] == inputs.processor.eos_ids[0] and (rest == pad).all()


def test_a_target_that_does_not_fit_is_named(inputs: Inputs, targets: TargetLoader) -> None:
    item = next(i for i, r in enumerate(inputs.train.records) if r.task == "gqa")
    name = inputs.train.records[item].id
    length = len(targets(item).completion)
    says = rf"'{name}'.*{length} tokens.*rollout.max_new_tokens \({length - 1}\)"
    with pytest.raises(InputError, match=says):
        dataclasses.replace(targets, max_tokens=length - 1)(item)
    assert len(dataclasses.replace(targets, max_tokens=length)(item).completion) == length


# ---- mistakes, through the command line ----


def mistake(
    place: Workplace, capsys: pytest.CaptureFixture[str], tmp_path: Path, *overrides: str
) -> str:
    eight = ["rollout.prompts=8", "eval.batch=8", f"run_dir={tmp_path / 'run'}"]  # devices
    assert cli.main(["train", str(place.config), *eight, *overrides]) == 2
    return capsys.readouterr().err


def test_a_prompt_longer_than_the_largest_bucket(
    place: Workplace, widths: list[int], capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    longest = widths[-1] - 5
    message = mistake(place, capsys, tmp_path, f"data.buckets=[70, {longest - 1}]")
    largest = f"longer than the largest bucket ({longest - 1} tokens)"
    assert f"prompts of data.train are {largest}" in message
    assert f"-gqa ({longest} tokens)" in message
    assert f"add a bucket of {longest} to data.buckets, or lower data.total_pixels" in message


def test_a_row_without_its_fields(
    place: Workplace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    rows = [json.loads(x) for x in (place.clips / "train.jsonl").read_text().splitlines()]
    grounding = next(i for i, row in enumerate(rows) if row["task"] == "tvg")
    del rows[grounding]["spans"], rows[-1]["question"]
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    message = mistake(place, capsys, tmp_path, f"data.train={path}")
    assert f"{path}:{grounding + 1}" in message and "field 'spans'" in message
    assert f"{path}:{len(rows)}" in message and "field 'question'" in message


def test_no_manifest_and_no_readable_video(
    place: Workplace, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert "data.eval is empty" in mistake(place, capsys, tmp_path, "data.eval=''")
    record = dataclasses.replace(evaluation_records(place)[0], video=tiny_run.NOTES)
    write_manifest(tmp_path / "bad.jsonl", [record])
    message = mistake(place, capsys, tmp_path, f"data.train={tmp_path / 'bad.jsonl'}")
    assert "none of the 1 videos of data.train can be read" in message
    assert tiny_run.NOTES in message
