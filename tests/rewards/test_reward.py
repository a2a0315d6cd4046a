"""A run's reward: its options, and the bounds of the total."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import jax
import numpy as np
import pytest

from data.prompts import target_text
from data.records import CHOICE_TASKS, SPAN_TASKS, TASKS, Record
from rewards.dual import bounds
from rewards.options import Custom, LengthBand, Overlong, RewardOptions
from rewards.parse import RewardError
from rewards.reward import Reward
from rewards.weights import RewardWeights

NAN = np.nan
WEIGHTS = RewardWeights(0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
ANSWERS = {"number": "3.5", "regression": "10", "ocr": "a b c d", "text": "She runs."}


def record(task: str, spans: tuple[tuple[float, float], ...] = ((2.0, 6.0),)) -> Record:
    return Record(
        id=f"{task}-0",
        video="a.mp4",
        task=task,
        question="What?",
        options=("red", "blue") if task in CHOICE_TASKS else (),
        answer="B" if task in CHOICE_TASKS else ANSWERS.get(task),
        spans=spans if task in SPAN_TASKS else (),
        duration=20.0,
    )


def tvg(start: float, end: float) -> str:
    return f'<answer>{{"start_time": "{start}", "end_time": "{end}"}}</answer>'


def score(
    options: RewardOptions, texts: list[list[str]], records: list[Record], lengths: np.ndarray
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    reward = Reward(WEIGHTS, options, thinking=False)
    truth = reward.truth(records, max_spans=2)
    total, parts = jax.jit(reward.score)(reward.read(texts, records, lengths), truth)
    reward.check(parts)
    return np.asarray(total), {name: np.asarray(part) for name, part in parts.items()}


def one(options: RewardOptions, text: str, record: Record, length: int) -> tuple[float, dict]:
    total, parts = score(options, [[text]], [record], np.array([[length]]))
    return float(total[0, 0]), {name: float(part[0, 0]) for name, part in parts.items()}


@pytest.mark.parametrize(("kind", "value"), [("giou", 2 / 3), ("tiou", 0.9 * 0.9 / 3)])
def test_another_temporal_score_weighs_in_place_of_the_iou(kind: str, value: float) -> None:
    total, parts = one(RewardOptions(kind), tvg(4, 8), record("tvg"), 9)
    assert parts["iou"] == pytest.approx(1 / 3)  # still given: it is what evaluations report
    assert parts["temporal"] == pytest.approx(value)
    assert total == pytest.approx(0.5 + 2 * value)
    total, parts = one(RewardOptions(kind), "<answer>B</answer>", record("mcqa"), 9)
    assert total == 1.5 and np.isnan(parts["temporal"])


def test_time_r1s_score_needs_the_length_of_the_video() -> None:
    unknown = dataclasses.replace(record("tvg"), duration=None)
    reward = Reward(WEIGHTS, RewardOptions("tiou"), thinking=False)
    with pytest.raises(RewardError, match="'tvg-0': reward.temporal=tiou needs the length"):
        reward.truth([unknown], 1)
    clip = dataclasses.replace(unknown, clip=(5.0, 25.0))
    np.testing.assert_array_equal(reward.truth([clip], 1).duration, [20])
    Reward(WEIGHTS, thinking=False).truth([unknown], 1)


def test_the_length_bonus_is_for_right_answers_of_every_task() -> None:
    options = RewardOptions(length=LengthBand(0.2, 5, 9, right=0.5))
    right = [[target_text(record(task), False)] * 3 for task in TASKS]
    lengths = np.tile([4, 5, 10], (len(TASKS), 1))
    total, parts = score(options, right, [record(task) for task in TASKS], lengths)
    np.testing.assert_array_equal(parts["length"], [[0, 1, 0]] * len(TASKS))
    np.testing.assert_allclose(total[:, 1] - total[:, 0], 0.2, rtol=1e-5)
    gqa = '<answer>{"option": "%s", "start_time": "2", "end_time": "%s"}</answer>'
    wrong = [gqa % ("A", 6), gqa % ("B", 3), gqa % ("B", 5)]  # IoU 1, 0.25, 0.75
    _, parts = score(options, [wrong], [record("gqa")], np.array([[7, 7, 7]]))
    np.testing.assert_array_equal(parts["length"], [[0, 0, 1]])


def test_the_overlong_penalty_is_taken_away() -> None:
    options = RewardOptions(overlong=Overlong(2.0, cache=10, limit=30))
    lengths = np.array([[20, 25, 30]])
    total, parts = score(options, [[tvg(2, 6)] * 3], [record("tvg")], lengths)
    np.testing.assert_allclose(parts["overlong"], [[0, -0.5, -1]])
    np.testing.assert_allclose(total, [[2.5, 1.5, 0.5]])


def test_options_that_are_off_are_no_components() -> None:
    _, parts = one(RewardOptions(), tvg(2, 6), record("tvg"), 400)
    assert set(parts) == {item.name for item in dataclasses.fields(RewardWeights)}


OWN = """
import jax.numpy as jnp

def host(completions):
    return [-1.0 if c.tokens > 9 else 0.5 for c in completions]

def jitted(answers, truth):
    return jnp.where(answers.length > 9, -1.0, 0.5)
"""


@pytest.mark.parametrize("kind", ["host", "jitted"])
def test_a_users_own_reward_is_one_more_component(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "own_reward.py").write_text(OWN)
    monkeypatch.setattr(sys, "path", list(sys.path))
    own = Custom(f"own_reward:{kind}", kind, weight=2.0, low=-1.0, folder=str(tmp_path))
    lengths = np.array([[9, 10]])
    total, parts = score(RewardOptions(custom=own), [[tvg(2, 6)] * 2], [record("tvg")], lengths)
    np.testing.assert_array_equal(parts["custom"], [[0.5, -1]])
    np.testing.assert_allclose(total, [[3.5, 0.5]])
    del sys.modules["own_reward"]


@pytest.mark.parametrize("task", TASKS)
def test_the_total_reaches_its_bounds_and_no_further(task: str) -> None:
    options = RewardOptions("giou", LengthBand(0.5, 1, 50), Overlong(0.25, 10, 100))
    low, high = bounds(task, WEIGHTS, options)
    best, _ = one(options, target_text(record(task), False), record(task), 50)
    worst, _ = one(options, "", record(task), 100)
    assert (worst, best) == (pytest.approx(low), pytest.approx(high))
