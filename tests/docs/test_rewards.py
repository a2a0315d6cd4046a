"""docs/rewards.md: what its tables state is what happens."""

from __future__ import annotations

import json
import math
import re
import time
from pathlib import Path

import numpy as np
import pytest

from data.records import CHOICE_TASKS, SPAN_TASKS, Record
from rewards.reward import Reward
from rewards.weights import RewardWeights

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "rewards.md").read_text(encoding="utf-8")
ANSWERS = {
    "mcqa": "B",
    "gqa": "B",
    "number": "3.50",
    "regression": "10",
    "ocr": "Stop at the sign",
    "text": "She opens the door.",
}
SPAN, LENGTH = (2.0, 6.0), 20.0


def rows(heading: str) -> list[list[str]]:
    """The cells of the table below a heading, without its head."""
    section = PAGE.split(f"## {heading}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("| ")][2:]
    return [re.split(r"(?<!\\) \| ", line.strip("| ")) for line in lines]


def completion(cell: str) -> str:
    """What a cell stands for."""
    text = cell.strip("`").replace("\\|", "|")
    if cell.startswith("````"):
        text = text[1:-1]  # spaces keep the backquotes apart
    text = re.sub("⟨(.*?) × ([0-9]+)⟩", lambda m: m[1] * int(m[2]), text)
    return re.sub("⟨U[+]([0-9A-F]{4})⟩", lambda m: chr(int(m[1], 16)), text)


def scores(text: str, task: str, thinking: bool) -> dict[str, float]:
    record = Record(
        id="r",
        video="a.mp4",
        task=task,
        question="?",
        options=("red", "green", "blue", "white") if task in CHOICE_TASKS else (),
        answer=ANSWERS.get(task),
        spans=(SPAN,) if task in SPAN_TASKS else (),
        duration=LENGTH,
    )
    reward = Reward(RewardWeights(), thinking=thinking)
    answers = reward.read([[text]], [record], np.ones((1, 1)))
    _, parts = reward.score(answers, reward.truth([record], 1))
    return {name: float(part[0, 0]) for name, part in parts.items()}


HOSTILE = rows("Hostile completions")


@pytest.mark.parametrize("row", HOSTILE, ids=[f"{row[1]}: {row[0]}" for row in HOSTILE])
def test_a_hostile_completion_has_its_stated_outcome(row: list[str]) -> None:
    _, task, cell, form, answer = row
    stated = {"format": float(form)}
    for part in answer.split(", "):
        name, value = part.split(" ")
        stated[name] = float(value)
    started = time.process_time()
    found = scores(completion(cell), task, thinking=False)
    assert time.process_time() - started < 5  # megabytes too
    found = {name: value for name, value in found.items() if not math.isnan(value)}
    assert found == pytest.approx(stated, abs=1e-3)


def test_every_kind_of_hostile_completion_is_there() -> None:
    kinds = " ".join(row[0] for row in HOSTILE)
    for kind in ("two answers", "nested", "reversed", "negative", "NaN", "infinity", "1e309"):
        assert kind in kinds
    for kind in ("Unicode digits", "whole video", "megabytes"):
        assert kind in kinds
    assert len(completion(HOSTILE[-1][2])) > 4_000_000


# ---- the released scorer ----


def released(text: str) -> tuple[float, float]:
    """Format and IoU as the paper's released code scores them (Temporal-R1, tvg), restated.

    Format: the whole text is a thought, whatever it holds, and one answer right after it, with
    the two keys in their order and times of quoted digits and points, in any script. IoU: the
    first answer wherever it stands, as JSON, with whatever Python's float() reads; a failure is 0.
    """
    thought, closing, rest = text.rpartition("</think>")
    shape = r'\s*<answer>\s*{\s*"start_time"\s*:\s*T\s*,\s*"end_time"\s*:\s*T\s*}\s*</answer>'
    answered = re.fullmatch(shape.replace("T", r'"[\d.]+"'), rest)
    form = bool(thought.startswith("<think>") and closing and answered)
    try:
        answer = json.loads(text.split("<answer>", 1)[1].split("</answer>")[0])
        start, end = float(answer["start_time"]), float(answer["end_time"])
    except (IndexError, ValueError, KeyError, TypeError):
        return float(form), 0.0
    inside = min(end, SPAN[1]) - max(start, SPAN[0])
    hull = max(end, SPAN[1]) - min(start, SPAN[0])
    iou = inside / hull if inside > 0 and math.isfinite(hull) else 0.0  # NaN is not above 0
    return float(form), iou


DIFFERENCES = rows("The paper's released scorer")


@pytest.mark.parametrize("row", DIFFERENCES, ids=[row[0] for row in DIFFERENCES])
def test_the_released_scorer_and_ours_differ_as_stated(row: list[str]) -> None:
    difference, cell, theirs, ours = row
    found = scores(completion(cell), "tvg", thinking=True)
    stated_theirs, stated_ours = ([float(x) for x in cell.split(", ")] for cell in (theirs, ours))
    assert released(completion(cell)) == pytest.approx(stated_theirs)
    assert [found["format"], found["iou"]] == pytest.approx(stated_ours)
    assert (stated_theirs == stated_ours) == (
        difference.startswith(("none", "NaN", "1e309", "reversed"))
    )
