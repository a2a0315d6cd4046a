"""Mixtures in a run: what is drawn how often, from files and packed clips, on any host."""

from __future__ import annotations

import collections
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.mixture import MixedClips
from data.pipeline import batches
from data.sampling import PlannedStep
from jaxgrpo import cli
from jaxgrpo.dataset import step_plan
from jaxgrpo.inputs import Inputs, PromptCollator, PromptLoader, describe, prepare
from jaxgrpo.load import open_processor
from jaxgrpo.mixture import draws, shares
from models.qwen2_5_vl.processor import Processor
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def processor(place: Workplace) -> Processor:
    return open_processor(tiny_run.load_config(place))


def mixture(place: Workplace, *parts: dict[str, Any]) -> list[str]:
    return [
        "data.train=''",
        "data.eval=''",
        f"data.mixture={json.dumps(parts)}",
        "data.root=/nowhere",
        f"data.eval_mixture=[{{manifest: {place.clips / 'eval.jsonl'}, root: {place.clips}}}]",
    ]


def parts(place: Workplace, first: Path | str = "") -> list[dict[str, Any]]:
    return [
        {
            "manifest": str(first or place.clips / "train.jsonl"),
            "root": str(place.clips),
            "weight": 3.0,
        },
        {"manifest": str(place.clips / "eval.jsonl"), "root": str(place.clips)},
    ]


@pytest.fixture(scope="module")
def inputs(place: Workplace, processor: Processor) -> Inputs:
    overrides = mixture(place, *parts(place))
    config = tiny_run.load_config(place, *overrides, "data.task_weights={tvg: 2}")
    return prepare(config, processor, train=True, evaluation=True)


def drawn(inputs: Inputs, steps: int, prompts: int = 4) -> list[PlannedStep]:
    plan = step_plan(inputs.train, prompts, seed=5)
    return [plan.step(step) for step in range(steps)]


def test_an_items_weight_is_its_manifests_times_its_tasks(inputs: Inputs) -> None:
    train = inputs.train
    assert isinstance(train.clips, MixedClips)
    for record, weight in zip(train.records, train.weights, strict=True):
        of_manifest = 3.0 if train.clips.manifest(record.video).endswith("train.jsonl") else 1.0
        assert weight == of_manifest * (2.0 if record.task == "tvg" else 1.0)
    assert {6.0, 3.0, 2.0, 1.0} == set(train.weights)
    assert set(inputs.evaluation.weights) <= {1.0, 2.0}


def test_items_are_drawn_by_their_weight(inputs: Inputs) -> None:
    steps = drawn(inputs, 2000)
    seen = collections.Counter(item for step in steps for item in step.items)
    expected = 8000 * np.array(inputs.train.weights) / sum(inputs.train.weights)
    counts = np.array([seen[item] for item in range(len(expected))])
    assert (np.abs(counts - expected) < 4.5 * np.sqrt(2000 / 4) + 1).all()


def test_the_user_is_told_what_share_each_manifest_and_task_has(inputs: Inputs) -> None:
    train = inputs.train
    manifests, tasks = shares(train.records, train.weights, train.clips)
    assert manifests.startswith("draws: ") and "eval.jsonl, " in manifests and "% tvg" in tasks
    assert f"  {tasks}" in describe(inputs)
    percent = [float(part.split("%")[0]) for part in manifests.removeprefix("draws: ").split(", ")]
    assert abs(sum(percent) - 100) < 0.2
    assert shares(train.records, [2.0] * len(train.records), inputs.evaluation.clips) == []


def test_the_shares_of_manifests_and_tasks_are_those_of_their_weights(inputs: Inputs) -> None:
    train = inputs.train
    found = draws(train.records, train.weights, train.clips)
    assert sum(share.items for share in found.values()) == len(train.records)
    for (manifest, task), share in found.items():
        of_manifest = 3.0 if manifest.endswith("train.jsonl") else 1.0
        assert share.weight == of_manifest * (2.0 if task == "tvg" else 1.0)
        assert share.draws == pytest.approx(share.items * share.weight / sum(train.weights))
    alone = draws(train.records, [1.0] * len(train.records), inputs.evaluation.clips)
    assert {manifest for manifest, _ in alone} == {""}


def test_the_steps_are_those_of_one_manifest_where_all_weigh_alike(
    place: Workplace, processor: Processor
) -> None:
    alone = [{**parts(place)[0], "weight": 7.0}]
    found = [
        prepare(
            tiny_run.load_config(place, *overrides), processor, train=True, evaluation=False
        ).train
        for overrides in ([], mixture(place, *alone))
    ]
    plain, mixed = found
    assert mixed.records == plain.records and mixed.plan == plain.plan
    assert [step_plan(mixed, 4, 1).step(i) for i in range(50)] == [
        step_plan(plain, 4, 1).step(i) for i in range(50)
    ]


def test_a_run_keeps_to_its_weights(inputs: Inputs) -> None:
    train = inputs.train
    assert train.plan["weights"] is not None
    other = train._replace(weights=(train.weights[0] + 1, *train.weights[1:]))
    assert other.plan != train.plan
    assert train._replace(weights=(1.0,) * len(train.weights)).plan["weights"] is None
    assert json.loads(json.dumps(train.plan)) == train.plan


def pixels(inputs: Inputs, config: Any, rows: Sequence[int], start: int) -> dict[int, np.ndarray]:
    """What the rows of steps 0 to 5 hold, begun at a step; by step."""
    train, processor = inputs.train, inputs.processor
    load = PromptLoader(processor, train.records, config.data, train.clips)
    collate = PromptCollator(train.offers, processor.pad_id)
    plan = step_plan(train, 4, config.seed)
    with batches(plan, load, collate, start_step=start, num_steps=6 - start, rows=rows) as steps:
        return {batch.step: np.asarray(batch.prompts.patches) for batch in steps}


def test_hosts_resumes_and_packed_clips_see_the_same_batches(
    place: Workplace, processor: Processor, tmp_path: Path
) -> None:
    command = ["pack", str(place.config), str(tmp_path / "packed"), "run_dir=x", "data.eval=''"]
    assert cli.main(command) == 0
    seen = []
    for first in ("", tmp_path / "packed" / "train"):
        overrides = mixture(place, *parts(place, first))
        config = tiny_run.load_config(place, *overrides, "data.task_weights={mcqa: 2}")
        inputs = prepare(config, processor, train=True, evaluation=False)
        seen.append(pixels(inputs, config, range(4), 0))
    files, packed = seen
    for step, expected in files.items():
        np.testing.assert_array_equal(packed[step], expected)
    for rows in ([0, 1], [2, 3]):
        for step, found in pixels(inputs, config, rows, 3).items():
            np.testing.assert_array_equal(found, files[step][rows])


def test_a_weight_of_a_task_that_no_item_has_is_told(
    place: Workplace, processor: Processor, capsys: pytest.CaptureFixture[str]
) -> None:
    weights = "data.task_weights={tvg: 2, ocr: 3, text: 1}"
    config = tiny_run.load_config(place, *mixture(place, *parts(place)), weights)
    prepare(config, processor, train=True, evaluation=True)
    said = capsys.readouterr().out
    assert said.count("warning: data.task_weights names tasks that no item has: ocr\n") == 1


def test_ids_that_collide_are_told_with_the_mend(place: Workplace, processor: Processor) -> None:
    twice = [parts(place)[0], parts(place)[0]]
    config = tiny_run.load_config(place, *mixture(place, *twice))
    with pytest.raises(ValueError, match="is in two manifests of a mixture, .*prefix"):
        prepare(config, processor, train=True, evaluation=False)
    twice[1]["prefix"] = "again/"
    config = tiny_run.load_config(place, *mixture(place, *twice))
    train = prepare(config, processor, train=True, evaluation=False).train
    assert len(train.records) == 2 * len([x for x in train.records if x.id.startswith("again/")])
