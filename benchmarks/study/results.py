"""What a finished run comes to: a line of figures, which outlives the run's folder.

A file of them is all that the report needs, and tells which runs need not be made again, on another
machine either. Read `results.jsonl` here for those of docs/study.md.
"""

from __future__ import annotations

import collections
import json
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from benchmarks.study.arms import ARMS
from data.records import write_atomically

TIMES: Final = "times.jsonl"
SCORES: Final = {  # task and component of each
    "mcqa/accuracy": ("mcqa", "choice"),
    "tvg/mIoU": ("tvg", "iou"),
    "gqa/accuracy": ("gqa", "choice"),
    "gqa/mIoU": ("gqa", "iou"),
}


class Result(NamedTuple):
    """A run's figures.

    Attributes:
      arm, seed: which run it is.
      scores: by test set and score, those of its items, in the order of their ids.
      curves: by step (its number in words, as JSON has it) and score, the held-out mean.
      equal: the share of groups whose rewards are all equal, mean of all steps; None: no groups.
      seconds: by command, of one core.
      versions: of the packages that it ran with.
    """

    arm: str
    seed: int
    scores: dict[str, dict[str, list[float]]]
    curves: dict[str, dict[str, float]]
    equal: float | None
    seconds: dict[str, float]
    versions: dict[str, str]


def result_of(out: Path, arm: str, seed: int) -> Result:
    """The figures of a finished run, from its files."""
    name = f"{arm}-{seed}"
    metrics = list(_lines(out / "runs" / name / "metrics.jsonl"))
    shares = [row["groups/zero_variance"] for row in metrics if "groups/zero_variance" in row]
    return Result(
        arm,
        seed,
        item_scores(out / "eval" / name / "predictions.jsonl"),
        {
            str(row["step"]): {score: round(row[score], 4) for score in SCORES}
            for row in metrics
            if row["split"] == "eval"
        },
        round(float(np.mean(shares)), 4) if shares else None,
        seconds(out, name),
        {package: version(package) for package in ("jax", "flax", "optax", "numpy")},
    )


def item_scores(path: Path) -> dict[str, dict[str, list[float]]]:
    """`Result.scores` of the predictions of one model."""
    rows: dict[tuple[str, str], dict[str, float]] = collections.defaultdict(dict)
    for row in _lines(path):
        for score, (task, component) in SCORES.items():
            if row["record"]["task"] == task:
                test = row["id"].partition("-")[0]
                rows[test, score][row["id"]] = round(row[f"reward/{component}"], 4)
    found: dict[str, dict[str, list[float]]] = collections.defaultdict(dict)
    for (test, score), by_id in rows.items():
        found[test][score] = [by_id[name] for name in sorted(by_id)]
    return dict(found)


def seconds(out: Path, name: str) -> dict[str, float]:
    """Of a run's commands, all parts of each together."""
    spent: dict[str, float] = collections.defaultdict(float)
    for row in _lines(out / TIMES):
        if row["job"] == name:
            spent[row["command"]] += row["seconds"]
    return {command: round(value, 1) for command, value in spent.items()}


def read_results(path: Path) -> list[Result]:
    """The lines of a file; of one that is not there, none."""
    return [Result(**row) for row in _lines(path)]


def write_results(path: Path, results: Iterable[Result]) -> None:
    """Writes all lines, by seed and arm."""
    arms = [arm.name for arm in ARMS]
    rows = sorted(results, key=lambda result: (result.seed, arms.index(result.arm)))
    write_atomically(path, "".join(json.dumps(row._asdict()) + "\n" for row in rows))


def _lines(path: Path) -> Iterable[dict[str, Any]]:
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return (json.loads(line) for line in text.split("\n") if line)
