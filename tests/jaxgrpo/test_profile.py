"""Which steps are traced, and that a trace of them is written."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from jaxgrpo.config import ConfigError, profiled_steps
from jaxgrpo.profile import Profiler


def test_steps_are_named_from_the_first_to_the_last() -> None:
    assert profiled_steps("steps:10-12") == range(10, 13)
    assert profiled_steps("steps:3-3") == range(3, 4)
    assert len(profiled_steps("")) == 0


@pytest.mark.parametrize("profile", ["steps:12-10", "steps:0-2", "10-12", "steps: 1-2", "steps:1"])
def test_anything_else_is_refused_with_an_example(profile: str) -> None:
    with pytest.raises(ConfigError, match="profile.*steps:10-12"):
        profiled_steps(profile)


def traced(folder: Path) -> set[int]:
    """The steps of all traces below a folder."""
    (file,) = folder.rglob("*.trace.json.gz")
    events = json.loads(gzip.decompress(file.read_bytes()))["traceEvents"]
    return {int(e["args"]["step_num"]) for e in events if "step_num" in e.get("args", {})}


def run(profiler: Profiler, steps: range, count: int) -> list[int]:
    """Steps of a run of `count`; those at whose end a trace was written."""
    written = []
    for step in steps:
        profiler.begin(step)
        jax.block_until_ready(jnp.arange(8) * step)
        if profiler.end(step, last=step == count):
            written.append(step)
    return written


def test_the_named_steps_are_in_the_trace_and_no_others(tmp_path: Path) -> None:
    profiler = Profiler("steps:2-3", tmp_path)
    assert run(profiler, range(1, 6), count=5) == [3]
    assert profiler.folder == tmp_path / "profile"
    assert traced(tmp_path / "profile") == {2, 3}


@pytest.mark.parametrize(
    ("steps", "found"), [(range(1, 4), {3}), (range(4, 9), {4, 5})], ids=["ends", "resumes"]
)
def test_a_run_may_end_or_be_resumed_among_them(
    tmp_path: Path, steps: range, found: set[int]
) -> None:
    run(Profiler("steps:3-5", tmp_path), steps, count=3 if found == {3} else 8)
    assert traced(tmp_path) == found


def test_without_it_nothing_is_written(tmp_path: Path) -> None:
    assert run(Profiler("", tmp_path), range(1, 4), count=3) == []
    assert list(tmp_path.iterdir()) == []
