"""From the configuration to a reward, and what hosts agree on."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.records import Record
from jaxgrpo import config, scoring
from jaxgrpo.config import MeshSection
from jaxgrpo.programs import Scores
from jaxgrpo.scoring import ConstantWatch, agreed, open_reward
from jaxgrpo.sharding import make_mesh
from rewards.answers import read_answers
from rewards.options import Custom, LengthBand, Overlong, RewardOptions
from rewards.reward import Reward
from rewards.weights import RewardWeights

NAN = np.nan
OWN = "def half(completions):\n    return [0.5] * len(completions)\n"


def load(tmp_path: Path, *overrides: str) -> config.Config:
    path = tmp_path / "c.yaml"
    path.write_text("{run_dir: r, model: {path: m}, data: {train: t.jsonl, thinking: false}}")
    return config.load(path, overrides)


def own(tmp_path: Path, kind: str = "host") -> list[str]:
    (tmp_path / "scoring_own.py").write_text(OWN)
    keys = {"function": "scoring_own:half", "kind": kind, "folder": tmp_path, "weight": 2}
    return [f"reward.custom.{key}={value}" for key, value in keys.items()]


def test_every_key_of_the_section_reaches_the_reward(tmp_path: Path) -> None:
    weights = [
        f"reward.{item.name}={i}" for i, item in enumerate(dataclasses.fields(RewardWeights))
    ]
    options = ["temporal=giou", "length={weight: 0.2, min: 1, max: 9, right: 0.1}"]
    options += ["overlong={weight: 1, cache: 64}"]
    overrides = [*weights, *(f"reward.{x}" for x in options), *own(tmp_path)]
    reward = open_reward(load(tmp_path, *overrides))
    assert dataclasses.astuple(reward.weights) == tuple(map(float, range(7)))
    assert reward.options == RewardOptions(
        "giou",
        LengthBand(0.2, 1, 9, 0.1),
        Overlong(1.0, 64, 512),
        Custom("scoring_own:half", "host", 2.0, folder=str(tmp_path)),
    )
    assert not reward.thinking
    assert open_reward(load(tmp_path), 64).options.overlong.limit == 64


# ---- several hosts ----


def test_processes_with_the_same_rows_take_the_first_ones_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As process 1 of three: 0 has other rows, 2 the same, and each found other values."""
    reward = open_reward(load(tmp_path, *own(tmp_path)))
    answers = read_answers([], [], np.zeros((0, 0)), thinking=False)
    answers = answers._replace(custom=np.float32([[0.5, 0.25]]))
    mesh = make_mesh(MeshSection())
    assert agreed(reward, mesh, [1], answers) is answers  # no rows are shared: nobody is asked

    def gather(value: Any) -> list[Any]:
        return [[[0], [[0.0, 0.0]]], [[1], [[0.125, 0.75]]], value]

    monkeypatch.setattr(scoring, "shares_rows", lambda mesh: True)
    monkeypatch.setattr(scoring, "gather_objects", gather)
    found = agreed(reward, mesh, [1], answers).custom
    np.testing.assert_array_equal(found, np.float32([[0.125, 0.75]]))
    plain = Reward(RewardWeights(), thinking=False)
    assert agreed(plain, mesh, [1], answers) is answers


# ---- the history of items ----


def test_a_group_is_told_by_mean_and_deviation_exactly_0_where_all_is_equal() -> None:
    """In float32 the mean of equal numbers need not be that number."""
    record = Record("a", "a.mp4", "tvg", "When?", (), None, ((0.0, 1.0),), 2.0)
    third = np.float32(1) / 3
    scores: Any = Scores(
        total=np.float32([[0, 1, 1], [third] * 3]),
        components={
            "iou": np.float32([[0, 0.5, 1], [third] * 3]),
            "choice": np.full((2, 3), NAN, np.float32),
        },
        advantages=np.zeros((2, 3)),
        zero_variance=np.array([False, True]),
    )
    assert scoring.group_line(record, scores, 0) == {
        "id": "a",
        "task": "tvg",
        "mean": pytest.approx(2 / 3),
        "mean/iou": 0.5,
        "std": pytest.approx(np.std([0, 1, 1])),
        "std/iou": pytest.approx(np.std([0, 0.5, 1])),
    }
    equal = scoring.group_line(record, scores, 1)
    assert (equal["std"], equal["std/iou"], equal["mean"]) == (0.0, 0.0, float(third))


# ---- components that teach nothing ----


def test_a_component_that_never_varies_is_named_once() -> None:
    watch = ConstantWatch(steps=3)
    found = []
    for step in range(8):
        found.append(
            watch.update(
                {
                    "format": np.float32([[1, 1], [0, 0]]),  # between groups only
                    "iou": np.float32([[0.5, 0.5], [0, step == 1]]),  # once is enough
                    "choice": np.full((2, 2), NAN, np.float32),  # in no step
                    "text": np.float32([[NAN, NAN], [1, 1]]) if step % 2 else np.full((2, 2), NAN),
                }
            )
        )
    assert [len(lines) for lines in found] == [0, 0, 1, 0, 0, 1, 0, 0]
    assert "in 3 steps reward/format has not varied within any group (now 0.5 on" in found[2][0]
    assert "reward/text" in found[5][0]


def test_a_watch_of_no_steps_says_nothing() -> None:
    watch = ConstantWatch(steps=0)
    assert not any(watch.update({"format": np.ones((2, 2))}) for _ in range(5))
