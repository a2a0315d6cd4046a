"""Intervals against SciPy's bootstrap and a plain loop; tables from what `eval` writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from benchmarks.study import report

ROOT = Path(__file__).resolve().parents[3]


def test_with_one_seed_an_interval_is_the_bootstrap_of_the_items() -> None:
    values = np.random.default_rng(0).uniform(size=(1, 200))
    mean, low, high = report.interval(values)
    theirs = scipy.stats.bootstrap(
        values, np.mean, method="percentile", rng=np.random.default_rng(1)
    ).confidence_interval
    assert mean == pytest.approx(values.mean(), abs=1e-4)
    assert (low, high) == pytest.approx((theirs.low, theirs.high), abs=2e-3)


def test_with_several_seeds_it_holds_both_kinds_of_chance() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(size=(5, 1)) + rng.normal(size=(5, 40))
    means = [
        values[rng.integers(5, size=5)][:, rng.integers(40, size=40)].mean() for _ in range(10_000)
    ]
    _, low, high = report.interval(values)
    assert (low, high) == pytest.approx(tuple(np.quantile(means, (0.025, 0.975))), abs=0.03)
    assert high - low > 1.2 * np.diff(report.interval(values[:1] * 0 + values.mean(0))[1:])[0]


def test_differences_are_paired() -> None:
    values = np.random.default_rng(0).uniform(size=(3, 50))
    assert report.interval((values + 0.1) - values) == [0.1, 0.1, 0.1]


def write_run(out: Path, name: str, iou: float, choice: float) -> None:
    """Predictions of two items a test set, and a run of one step."""
    lines = []
    for test in ("eval", "spliced"):
        for task in ("mcqa", "tvg", "gqa"):
            for number in (1, 2):
                line = {"id": f"{test}-{number}-{task}", "record": {"task": task}}
                line["reward/iou"] = None if task == "mcqa" else iou
                line["reward/choice"] = None if task == "tvg" else choice
                lines.append(line)
    (out / "eval" / name).mkdir(parents=True)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / "eval" / name / "predictions.jsonl").write_text(text)
    (out / "runs" / name).mkdir(parents=True)
    scores = dict.fromkeys(report.SCORES, iou)
    rows = [
        {"step": 0, "split": "eval", **scores},
        {"step": 1, "split": "train", "groups/zero_variance": 0.25},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "runs" / name / "metrics.jsonl").write_text(text)


def test_tables_hold_means_differences_and_equal_groups(tmp_path: Path) -> None:
    write_run(tmp_path, "dual-0", iou=0.5, choice=1.0)
    write_run(tmp_path, "dual-1", iou=0.5, choice=1.0)
    write_run(tmp_path, "choice-0", iou=0.25, choice=1.0)
    times = [{"job": "dual-0", "command": "train", "seconds": 1800.0}] * 2
    (tmp_path / "times.jsonl").write_text("".join(json.dumps(row) + "\n" for row in times))
    found = report.results(tmp_path, [("dual", 0), ("dual", 1), ("choice", 0)])
    text = report.tables(found)
    both = "0.500 [0.500, 0.500]"
    assert f"choice + IoU | 2 | 1.000 [1.000, 1.000] | {both} | 1.000 [1.000, 1.000] |" in text
    assert "`dual` - `choice` | spliced |  |  | +0.000 [+0.000, +0.000] | **+0.250" in text
    assert "beat SFT" not in text, "arms that have not run make no claim"
    assert "- `dual`: 25.0%" in text and "1.0 hours of one core" in text
    assert json.loads(json.dumps(found))["seconds"] == {"dual-0 train": 3600.0}
    report.plot(json.loads(json.dumps(found)), tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    report.write_page(found, page)
    assert page.read_text() == f"before\n{report.BEGIN}\n{text}\n\n{report.END}after\n"


def test_the_page_shows_the_committed_figures() -> None:
    found = json.loads((ROOT / "benchmarks" / "study" / "study.json").read_text())
    assert report.tables(found) in (ROOT / "docs" / "study.md").read_text()
