"""The kill script, on a short run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from benchmarks import kill
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def reference(place: Workplace) -> Path:
    return tiny_run.reference(place)


def test_a_run_killed_three_times_at_random_ends_as_one_left_alone(
    place: Workplace, reference: Path
) -> None:
    overrides = [*tiny_run.started(place), *tiny_run.mixed(place)]
    folder = place.folder / "killed_at_random"
    log, found = kill.killed_runs(place, folder, overrides, reference, kills=3, seed=5)
    assert found == [[]] * len(found)
    assert kill.summary(log)["kills"] == len(log) == 3


def test_a_difference_is_named(reference: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(reference, other)
    assert kill.differences(other, reference) == []
    lines = (other / "metrics.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    changed = [*lines[:-1], json.dumps(last | {"time/eval": 0.0})]
    (other / "metrics.jsonl").write_text("\n".join(changed) + "\n")
    assert kill.differences(other, reference) == []  # a clock's
    changed[-1] = json.dumps(last | {"format": 2.0})
    (other / "metrics.jsonl").write_text("\n".join(changed) + "\n")
    for name in ("completions.jsonl", "groups.jsonl"):
        (other / name).write_text("")
    shutil.rmtree(other / "checkpoints" / str(tiny_run.STEPS))
    different = kill.differences(other, reference)
    assert different[-3:] == ["metrics.jsonl", "completions.jsonl", "groups.jsonl"]
    assert any("params" in name for name in different)
