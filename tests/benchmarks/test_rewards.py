"""The fuzzing script: a small share of its million, and that it would notice."""

from __future__ import annotations

import random

import numpy as np
import pytest

from benchmarks import rewards as script
from data.records import TASKS
from rewards.parse import parse
from rewards.reward import Reward


def test_thousands_of_hostile_completions_score_within_bounds() -> None:
    outcome = script.fuzz(12_000, seed=1)
    assert outcome.completions >= 12_000 and outcome.problems == []
    for task in TASKS:  # both outcomes of every task are reached
        assert 0.2 < outcome.formats[task] < 0.8
        assert 0.01 < outcome.answers[task] < 0.8


@pytest.mark.parametrize(
    ("name", "value", "says"),
    [
        ("total", np.nan, "mcqa: a total of"),
        ("total", 1.6, "mcqa: a total of"),
        ("choice", 1.5, "choice: beyond"),
        ("choice", np.nan, "choice: beyond"),
        ("iou", 0.0, "iou: scored in a task that does not have it"),
    ],
)
def test_a_score_out_of_place_is_a_problem(name: str, value: float, says: str) -> None:
    parts = {"choice": np.ones((1, 1)), "iou": np.full((1, 1), np.nan)}
    total = np.ones((1, 1))
    reward = Reward(script.WEIGHTS, thinking=True)
    assert script.broken(["mcqa"], total, parts, reward) == []
    (total if name == "total" else parts[name])[:] = value
    (problem,) = script.broken(["mcqa"], total, parts, reward)
    assert says in problem


@pytest.mark.parametrize("task", TASKS)
def test_typical_completions_are_well_formed(task: str) -> None:
    rng = random.Random(0)
    for _ in range(20):
        text, tokens = script.typical(task, rng)
        assert parse(text, task, thinking=True).format_ok
        assert 60 <= tokens <= 200 and 4 * 45 < len(text) < 4 * 205


def test_the_speed_of_a_core_is_measured() -> None:
    assert script.speed("mcqa", iter(range(2))) > 1000
