"""Intervals against SciPy's bootstrap and a plain loop; tables of results."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import scipy.stats

from benchmarks.study import report
from benchmarks.study.results import Result


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


def result(arm: str, seed: int, iou: float, choice: float) -> Result:
    """A run of two items a task and test set, with two scores held out."""
    scores = {name: [iou if name.endswith("mIoU") else choice] * 2 for name in report.SCORES}
    tests: dict[str, dict[str, list[float]]] = {"eval": scores, "spliced": scores}
    curves = {str(step): dict.fromkeys(report.SCORES, iou) for step in (0, 40)}
    return Result(arm, seed, tests, curves, 0.25, {"train": 1200.0}, {"jax": "1.2"})


def test_tables_hold_means_differences_and_equal_groups(tmp_path: Path) -> None:
    runs = [result("dual", seed, iou=0.5, choice=1.0) for seed in (0, 1)]
    found = report.figures([*runs, result("choice", 0, iou=0.25, choice=1.0)])
    text = report.tables(found)
    both = "0.500 [0.500, 0.500]"
    assert f"choice + IoU | 2 | 1.000 [1.000, 1.000] | {both} | 1.000 [1.000, 1.000] |" in text
    assert "`dual` - `choice` | spliced |  |  | +0.000 [+0.000, +0.000] | **+0.250" in text
    assert "beat SFT" not in text, "arms that have not run make no claim"
    assert "- `dual`: 25.0%" in text and "1.0 hours of one core; jax 1.2." in text
    report.plot(found, tmp_path / "curves.png")
    assert (tmp_path / "curves.png").stat().st_size > 10_000
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}old\n{report.END}after\n")
    report.write_page(found, page)
    assert page.read_text() == f"before\n{report.BEGIN}\n{text}\n\n{report.END}after\n"


def test_arms_are_compared_on_the_seeds_that_both_have() -> None:
    dual = [result("dual", seed, iou=0.2 * seed, choice=1.0) for seed in (2, 1, 3)]
    found = report.figures([*dual, result("choice", 2, iou=0.1, choice=1.0)])
    [claim, _] = found["claims"]
    assert claim["differences"]["gqa/mIoU"] == [0.3, 0.3, 0.3]
    assert found["curves"]["dual"][40]["tvg/mIoU"] == [0.4, 0.2, pytest.approx(0.6)]
