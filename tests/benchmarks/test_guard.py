"""A step of the quickstart and of the 32 M model costs what it cost: FLOPs, executables, bytes."""

from __future__ import annotations

import copy
import json

import pytest

from benchmarks import guard

COMMITTED = json.loads(guard.COMMITTED.read_text())


@pytest.mark.skipif(
    guard.versions() != COMMITTED["versions"], reason="the figures are of another XLA"
)
@pytest.mark.parametrize("name", guard.STEPS)
def test_a_step_costs_what_was_committed(name: str) -> None:
    """After a change that is meant to: `python -m benchmarks.guard --write`."""
    assert guard.differences(guard.measure(name), COMMITTED["steps"][name]) == []


def test_every_step_is_committed() -> None:
    assert COMMITTED["steps"].keys() == guard.STEPS.keys()


def test_more_work_more_memory_and_more_executables_are_found() -> None:
    step = COMMITTED["steps"]["cpu-1024"]
    assert guard.differences(step, step) == []
    worse = copy.deepcopy(step)
    update = worse["programs"]["update of 64 tokens"]
    update["matmul_flops"] *= 1.001
    update["peak_bytes"] = int(update["peak_bytes"] * 1.03)
    assert [line.partition(" of ")[0] for line in guard.differences(worse, step)] == ["update"] * 2
    assert "executables" in guard.differences(step | {"executables": 9}, step)[0]
