"""A profile counts overlapping operations once, and finds the products of a real step."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks import step_profile
from benchmarks.grpo.workload import write_model
from tests.benchmarks.test_grpo_step import SMALL


def event(name: str, start: float, stop: float) -> dict[str, object]:
    return {"name": name, "ts": start * 1e6, "dur": (stop - start) * 1e6}


def test_what_overlaps_is_covered_once() -> None:
    events = [event("a", 1, 3), event("b", 0, 2), event("c", 5, 6), event("d", 5.25, 5.5)]
    assert step_profile.covered(events) == pytest.approx(4)


def test_the_table_tells_products_from_what_runs_without_them() -> None:
    known = {"flops": {"rollout": 1e12, "update": 2e12}, "machine": {"flops": 2e12}}
    events = [event("ynn_fusion.3", 0, 2), event("dot.1", 1, 3), event("exp.7.clone", 2, 4)]
    text = step_profile.table(known, events)
    assert "operations run for 4.00 s" in text and "matrices: 3.00 s, 3.000 TFLOP, 50%" in text
    assert "others:   1.00 s" in text and "  2.00  exp\n" in text
    assert text.endswith("rate: 1.50 s")


def test_a_real_step_has_products_and_others(tmp_path: Path) -> None:
    write_model(SMALL.model, SMALL.dtype, tmp_path)
    known, events = step_profile.traced_step(SMALL, tmp_path)
    products = [e for e in events if e["name"].startswith(step_profile.PRODUCTS)]
    assert 0 < step_profile.covered(products) < step_profile.covered(events)
    assert "TFLOP" in step_profile.table(known, events)
