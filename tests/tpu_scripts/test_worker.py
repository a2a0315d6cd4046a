"""tpu_scripts/worker.sh: one worker's side. (With its launcher: test_launch.py.)"""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from tests.tpu_scripts.conftest import Cloud

STEPS = "trap 'exit 75' TERM; touch ~/ready; while true; do sleep 0.05; done"


@pytest.fixture
def worker(cloud: Cloud) -> Cloud:
    """A worker whose home is the cloud's own folder; its clone has no environment of its own."""
    cloud.use_own_clone()
    (cloud.root / "plan").touch()
    return cloud


def run(worker: Cloud, attempt: str, line: int = 1) -> list[str]:
    done = worker.run("worker.sh", "run", attempt, str(line), "jaxgrpo", "train", "a.yaml")
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def plan(worker: Cloud, *starts: str) -> None:
    (worker.root / "plan").write_text("".join(f"{start}\n" for start in starts))


def wait_for(path: Path) -> None:
    end = time.monotonic() + 20
    while not path.exists():
        assert time.monotonic() < end, path
        time.sleep(0.02)


def test_an_attempt_is_started_once_and_its_log_read_from_any_line(worker: Cloud) -> None:
    plan(worker, "echo two; echo three; exit 7", "echo again")
    first = run(worker, "a")
    assert first[1:] == ["two", "three", "jaxgrpo-exit 7"]
    assert run(worker, "a", line=3) == ["three", "jaxgrpo-exit 7"]
    assert run(worker, "b")[1:] == ["again", "jaxgrpo-exit 0"]
    assert worker.run("worker.sh", "current").stdout == ""


def test_every_state_of_a_progress_bar_is_a_line(worker: Cloud) -> None:
    plan(worker, r"printf '\rstep 1\rstep 2\nsaved\n\rstep 3'")
    expected = ["step 1", "step 2", "saved", "step 3", "jaxgrpo-exit 0"]
    assert run(worker, "a")[1:] == expected
    assert run(worker, "a", line=4) == expected[2:]


def test_lines_come_as_they_are_written(worker: Cloud) -> None:
    plan(worker, "echo now; for i in {1..100}; do [[ ! -e ~/go ]] || break; sleep 0.05; done")
    job = worker.start("worker.sh", "run", "a", "2", "jaxgrpo", "train", "a.yaml")
    assert job.stdout is not None
    assert job.stdout.readline() == "now\n"
    assert worker.run("worker.sh", "current").stdout == "a jaxgrpo train a.yaml\n"
    (worker.root / "go").touch()
    assert job.stdout.read() == "jaxgrpo-exit 0\n"
    job.wait(timeout=20)


def test_a_new_attempt_ends_the_one_before(worker: Cloud) -> None:
    plan(worker, STEPS, "echo new")
    before = worker.start("worker.sh", "run", "a", "1", "jaxgrpo", "train", "a.yaml")
    wait_for(worker.root / "ready")
    assert worker.run("worker.sh", "current").stdout == "a jaxgrpo train a.yaml\n"
    assert run(worker, "b")[1:] == ["new", "jaxgrpo-exit 0"]
    output, _ = before.communicate(timeout=20)
    assert output.splitlines()[-1] == "jaxgrpo-exit 75"


def test_stop_says_that_the_end_was_wanted(worker: Cloud) -> None:
    plan(worker, STEPS)
    job = worker.start("worker.sh", "run", "a", "1", "jaxgrpo", "train", "a.yaml")
    wait_for(worker.root / "ready")
    assert worker.run("worker.sh", "stop", "20").returncode == 0
    output, _ = job.communicate(timeout=20)
    assert output.splitlines()[-1] == "jaxgrpo-exit 75 stopped"


def test_a_machine_that_went_down_has_killed_its_job(worker: Cloud) -> None:
    job = worker.root / ".jaxgrpo" / "a"  # as the disk has it after a reboot
    job.mkdir(parents=True)
    (job / "lock").touch()
    (job / "log").write_text("step 1\n")
    (job.parent / "current").write_text("a\n")
    assert run(worker, "a") == ["step 1", "jaxgrpo-exit 137"]


def test_without_a_job_there_is_nothing_to_end_and_nothing_to_show(worker: Cloud) -> None:
    assert worker.run("worker.sh", "current").stdout == ""
    assert worker.run("worker.sh", "end", "1").returncode == 0
    done = worker.run("worker.sh", "tail", "5")
    assert done.returncode == 1
    assert "no job has run here" in done.stderr
    assert worker.run("worker.sh", "begin").returncode == 2
