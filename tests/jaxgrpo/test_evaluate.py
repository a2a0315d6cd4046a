"""Evaluation: the scores by hand, the baselines by brute force, and that every item counts once."""

from __future__ import annotations

import dataclasses
import json
import math
import random
from pathlib import Path
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.records import Record, read_manifest, write_manifest
from jaxgrpo import evaluate
from jaxgrpo.config import MeshSection, Score
from jaxgrpo.evaluate import EvalPrograms, Prediction, best_constant_span, summarise
from jaxgrpo.inputs import Inputs, prepare
from jaxgrpo.load import open_processor
from jaxgrpo.programs import score_program
from jaxgrpo.rollout import Rollout
from jaxgrpo.scoring import open_reward
from jaxgrpo.sharding import make_mesh
from models.qwen2_5_vl.processor import Prompt
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace

NAN = math.nan
Spans = list[tuple[float, float]]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


def record(task: str, name: str = "a", answer: str | None = None, *spans: Any) -> Record:
    options = ("red", "blue", "green") if task in ("mcqa", "gqa") else ()
    return Record(name, f"{name}.mp4", task, "What?", options, answer, tuple(spans), 9.0, None)


def said(
    record: Record, format: float, choice: float, iou: float, tokens: int = 5, **other: float
) -> Prediction:
    components = {"format": format, "choice": choice, "iou": iou, **other}
    return Prediction(
        record, "text", np.nansum([0.5 * x for x in components.values()]), components, tokens
    )


# ---- the scores ----


def test_the_scores_of_every_task_by_hand() -> None:
    span = (1.0, 3.0)
    predictions = [
        said(record("mcqa", answer="A"), 1, 1, NAN, tokens=4),
        said(record("mcqa", answer="A"), 1, 0, NAN),
        said(record("mcqa", answer="B"), 0, 0, NAN),
        said(record("tvg", "a", None, span), 1, NAN, 0.5),
        said(record("tvg", "b", None, span), 1, NAN, 0.3),
        said(record("gqa", "a", "C", span), 1, 1, 0.5),
        said(record("gqa", "b", "C", span), 1, 1, 0.4),  # right, but not there
        said(record("gqa", "c", "A", span), 0, 0, 0.9),  # there, but not right
    ]
    others = [("number", 1.0), ("number", 0.0), ("regression", 0.9), ("ocr", 0.75), ("text", 0.25)]
    predictions += [
        said(record(task, answer="7"), 1, NAN, NAN, **{task: score}) for task, score in others
    ]
    scores = summarise(predictions)
    assert scores["mcqa/accuracy"] == pytest.approx(1 / 3)
    assert scores["mcqa/accuracy_constant_letter"] == pytest.approx(2 / 3)
    assert scores["tvg/mIoU"] == pytest.approx(0.4)
    # R1@t counts an IoU of t, as the benchmarks do.
    assert [scores[f"tvg/R1@{t}"] for t in (0.3, 0.5, 0.7)] == [1.0, 0.5, 0.0]
    assert scores["tvg/mIoU_constant_span"] == scores["gqa/mIoU_constant_span"] == 1.0
    assert scores["gqa/accuracy"] == scores["gqa/accuracy_constant_letter"] == pytest.approx(2 / 3)
    assert scores["gqa/mIoU"] == pytest.approx(0.6)
    assert scores["gqa/acc_at_iou0.5"] == pytest.approx(1 / 3)
    assert scores["format"] == pytest.approx(11 / 13)
    assert scores["completion/length"] == pytest.approx(64 / 13)
    totals = [1.0, 0.5, 0.0, 0.75, 0.65, 1.25, 1.2, 0.45]
    totals += [0.5 + score / 2 for _, score in others]
    assert scores["reward/total"] == pytest.approx(sum(totals) / 13)
    assert (scores["number/accuracy"], scores["regression/score"]) == (0.5, 0.9)
    assert (scores["ocr/score"], scores["text/rouge"]) == (0.75, 0.25)
    assert set(get_args(Score)) <= scores.keys()  # what checkpoint.best may name


def test_a_task_without_items_has_no_scores() -> None:
    scores = summarise([said(record("mcqa", answer="A"), 1, 1, NAN)])
    assert not any(name.startswith(("tvg", "gqa")) for name in scores)
    assert all(math.isnan(x) for x in summarise([]).values())


# ---- the best constant span ----


def iou(a: tuple[float, float], spans: Spans, step: float = 0.125) -> float:
    """By counting the cells of a fine grid that lie in either: no interval arithmetic."""
    cells = [i * step + step / 2 for i in range(int(40 / step))]
    mine = [a[0] <= t < a[1] for t in cells]
    true = [any(start <= t < end for start, end in spans) for t in cells]
    both = sum(m and t for m, t in zip(mine, true, strict=True))
    return both / sum(m or t for m, t in zip(mine, true, strict=True))


@pytest.mark.parametrize("seed", range(4))
def test_the_best_constant_span_is_that_of_a_search_over_all(seed: int) -> None:
    rng = random.Random(seed)
    items: list[Spans] = []
    for _ in range(5):
        spans = []
        for _ in range(rng.choice([1, 1, 2])):  # two may overlap: their union counts
            start = rng.randrange(0, 10) / 2
            spans.append((start, start + rng.randrange(1, 6) / 2))
        items.append(spans)
    points = [i / 2 for i in range(16)]
    candidates = [(s, e) for s in points for e in points if s < e]
    best = max(sum(iou(c, spans) for spans in items) / 5 for c in candidates)
    start, end, found = best_constant_span(items)
    assert found == pytest.approx(best)
    assert sum(iou((start, end), spans) for spans in items) / 5 == pytest.approx(best)


def test_the_documented_example_of_the_constant_span() -> None:
    assert best_constant_span([[(0, 2)], [(1, 3)]])[2] == pytest.approx(2 / 3)
    assert best_constant_span([[(2.0, 4.5)]]) == (2.0, 4.5, 1.0)


def test_long_videos_are_searched_on_a_coarser_grid() -> None:
    start, end, found = best_constant_span([[(0.0, 3600.0)], [(1800.0, 3600.0)]])
    assert (start, end, found) == (0.0, 3600.0, 0.75)


# ---- a pass over the items ----


ANSWER = '<answer>{"start_time": "1.0", "end_time": "3.0"}</answer>'


def test_every_item_is_scored_once_and_against_its_own_truth(place: Workplace) -> None:
    """Ten items in batches of eight: the second is filled up, and one video is truncated."""
    config = tiny_run.load_config(place, *tiny_run.mixed(place), "eval.batch=8")
    processor = open_processor(config)
    inputs = prepare(config, processor, train=False, evaluation=True)
    predictions, failures = evaluate.predict(
        config,
        mesh := make_mesh(MeshSection()),
        parrot(config, mesh, inputs),
        {},
        inputs,
        inputs.evaluation,
    )
    everyone = [r.id for r in inputs.evaluation.records]
    assert "cut" in everyone and len(everyone) == 10
    assert [p.record.id for p in predictions] == [name for name in everyone if name != "cut"]
    assert list(failures) == ["cut"] and failures["cut"].startswith("truncated: ")
    for p in predictions:
        assert p.text == ANSWER
        if p.record.task == "tvg":
            assert p.components["iou"] == pytest.approx(iou((1.0, 3.0), list(p.record.spans)))
            assert (p.components["format"], math.isnan(p.components["choice"])) == (1, True)
        else:  # the right form for another task
            assert (p.components["format"], p.components["choice"]) == (0, 0)
        assert p.tokens == len(processor.encode_completion(ANSWER))


def parrot(config: Any, mesh: Any, inputs: Inputs) -> EvalPrograms:
    """Programs of a model that always says ANSWER."""
    ids = inputs.processor.encode_completion(ANSWER)

    def rollout(params: Any, prompt: Prompt, seed: jax.Array, step: jax.Array) -> Any:
        tokens = jnp.broadcast_to(ids, (len(prompt.length), 1, len(ids)))
        lengths = jnp.full(tokens.shape[:2], len(ids))
        logp, finished = jnp.zeros(tokens.shape), jnp.ones(tokens.shape[:2], bool)
        return Rollout(tokens, lengths, logp, finished), None

    reward = open_reward(config)
    score = score_program(mesh, reward, divide_by_std=False)
    return EvalPrograms(dict.fromkeys(range(len(inputs.evaluation.offers)), rollout), reward, score)


def test_a_bucket_whose_only_item_is_bad_is_not_scored(place: Workplace, tmp_path: Path) -> None:
    records = read_manifest(place.clips / "mixed_eval.jsonl", place.clips)
    records = [
        dataclasses.replace(r, question=f"{r.question} Be quick." * 3) if r.id == "cut" else r
        for r in records
    ]
    write_manifest(tmp_path / "eval.jsonl", records)
    overrides = [f"data.eval={tmp_path / 'eval.jsonl'}", "eval.batch=8"]
    config = tiny_run.load_config(place, *overrides, "data.buckets=[104, 300]")
    processor = open_processor(config)
    inputs = prepare(config, processor, train=False, evaluation=True)
    cut = next(i for i, r in enumerate(inputs.evaluation.records) if r.id == "cut")
    assert inputs.evaluation.buckets[1] == (cut,)
    mesh = make_mesh(MeshSection())
    predictions, failures = evaluate.predict(
        config, mesh, parrot(config, mesh, inputs), {}, inputs, inputs.evaluation
    )
    assert [p.record.id for p in predictions] == [r.id for r in records if r.id != "cut"]
    assert list(failures) == ["cut"]


def test_a_plain_model_directory_is_scored(place: Workplace, tmp_path: Path) -> None:
    model = tiny_run.random_model(place)
    overrides = [f"model.path={model}", "model.init=checkpoint", *tiny_run.mixed(place)]
    finished = tiny_run.run(place, "eval", tmp_path, *overrides)
    scores = json.loads((tmp_path / "eval.json").read_text())
    assert (scores["items"], scores["items_failed"], scores["items_swapped"]) == (9, 1, 3)
    assert scores["format"] == 0  # random weights
    # What is evaluated is said before it is.
    assert finished.out.index("eval: 10 items") < finished.out.index("not scored cut: truncated")


def test_a_run_directory_scores_what_its_training_said_last(
    place: Workplace, tmp_path: Path
) -> None:
    reference = tiny_run.reference(place)
    overrides = [f"model.path={reference}", "model.init=checkpoint", *tiny_run.mixed(place)]
    finished = tiny_run.run(place, "eval", tmp_path, *overrides)
    scores = json.loads((tmp_path / "eval.json").read_text())
    last = tiny_run.lines(reference, "eval")[-1]
    assert {k: v for k, v in last.items() if k in scores} == pytest.approx(scores)
    assert {"tvg/mIoU", "mcqa/accuracy", "gqa/acc_at_iou0.5", "format"} <= scores.keys()
    kept = [json.loads(line) for line in (tmp_path / "predictions.jsonl").read_text().splitlines()]
    assert len(kept) == last["items"] == len({line["id"] for line in kept})
    assert f"wrote {tmp_path / 'eval.json'}" in finished.out
    assert f"{last['tvg/mIoU']:.3f}" in finished.out


def test_a_users_own_reward_that_breaks_on_real_items_ends_the_command(
    place: Workplace, tmp_path: Path
) -> None:
    """It is well behaved on the samples of the start, whose videos have 10 seconds."""
    code = "import jax.numpy as jnp\ndef own(answers, truth):\n"
    code += "    short = (truth.duration < 10)[:, None]\n"
    code += "    return jnp.where(short, jnp.nan, 0.5) * jnp.ones(answers.choice.shape)\n"
    (tmp_path / "breaks_later.py").write_text(code)
    own = {"function": "breaks_later:own", "kind": "jitted", "folder": tmp_path}
    overrides = [f"model.path={tiny_run.random_model(place)}", "model.init=checkpoint"]
    overrides += [f"reward.custom.{key}={value}" for key, value in own.items()]
    finished = tiny_run.run(place, "eval", tmp_path / "out", *overrides, code=2)
    assert "error: reward.custom.function breaks_later:own (kind jitted) returned nan in " in (
        finished.out
    )
    assert not (tmp_path / "out").exists()


# ---- for readers ----


def test_a_sample_shows_the_question_the_truth_and_the_rewards() -> None:
    gqa = record("gqa", "q1", "B", (1.0, 2.5), (4.0, 5.0))
    line = evaluate.sample(said(gqa, 1, 0, 0.25))
    assert line["truth"] == "B (blue), 1-2.5 s, 4-5 s"
    assert (line["id"], line["reward/choice"], line["reward/iou"]) == ("q1", 0, 0.25)
    assert evaluate.truth_text(record("mcqa", "a", "C")) == "C (green)"
    assert evaluate.truth_text(record("tvg", "a", None, (3.5, 7.0))) == "3.5-7 s"
    assert evaluate.sample(said(record("mcqa", "a", "C"), 1, 1, NAN))["reward/iou"] is None


def test_what_is_shown_is_shared_out_over_the_tasks() -> None:
    some = [
        said(record(task, f"{task}{i}", "A", (0.0, 1.0)), 1, 1, 1)
        for task in ("mcqa", "tvg")
        for i in range(3)
    ]
    shown = [p.record.id for p in evaluate.first_of_each_task(some, 4)]
    assert shown == ["mcqa0", "mcqa1", "tvg0", "tvg1"]
    assert len(evaluate.first_of_each_task(some, 3)) == 3
    assert evaluate.first_of_each_task(some, 0) == []


def test_the_table_has_a_column_for_each_evaluation() -> None:
    shown = evaluate.table(
        {"before": {"tvg/mIoU": 0.1, "format": 1.0}, "after": {"tvg/mIoU": 0.25}}
    )
    lines = [line.split() for line in shown.splitlines()]
    assert lines == [["before", "after"], ["tvg/mIoU", "0.100", "0.250"], ["format", "1.000", "-"]]


def test_a_long_title_stands_above_its_column() -> None:
    shown = evaluate.table({"runs/a-long-name": {"format": 1.0}, "b": {"format": 0.5}})
    title, row = shown.splitlines()
    assert title.split() == ["runs/a-long-name", "b"]
    assert title.index("name") + len("name") == row.index("1.000") + len("1.000")
    assert len(title) == len(row)
