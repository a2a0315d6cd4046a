"""Kills a run again and again, with saves in flight: its end must be that of one left alone.

    python -m benchmarks.kill --kills 50 --seed 0 --out benchmarks/kill.json

A tiny GRPO run on the CPU is started by one and the same command and gets SIGKILL, SIGTERM, or
SIGTERM and, a moment later, SIGKILL (a grace period that was too short), at moments drawn with the
seed. When it is done before so many kills, another one begins. At the end of each, weights and
optimiser must be those of an undisturbed run bit for bit, and metrics, completions and groups the
same too, but for what a clock measured.

Exit code 0: they do; 1: they do not.
"""

from __future__ import annotations

import argparse
import collections
import json
import math
import platform
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import PREEMPTED, Workplace

STEPS = 60
SETTINGS = (
    *(f"train.steps={STEPS}", "eval.every=8", "eval.limit=4", "checkpoint.every=2"),
    *("rollout.refills=1", "data.online.round=6"),  # a sampler with a memory
)
BUSY_SECONDS = 2.5  # a kill during training comes at most so long after the first new line
GRACE_SECONDS = 0.3  # between SIGTERM and SIGKILL, at most


class Kill(NamedTuple):
    """One kill: when in the run, by what, how the process ended, and the newest checkpoint then.

    Phases: start-up (a moment drawn from the time that a start takes), training, saving (a write is
    in flight), hashing (a checkpoint has no manifest yet).
    """

    phase: str
    signals: str
    code: int
    run: int
    step: int


def killed_runs(
    place: Workplace, folder: Path, overrides: Sequence[str], reference: Path, kills: int, seed: int
) -> tuple[list[Kill], list[list[str]]]:
    """Starts a run until it is done, and another if that took fewer kills than there are to be.

    Args:
      folder: the runs are its 0, 1, ...
      reference: the run directory of an undisturbed run of the same overrides.

    Returns:
      the kills, and per run what differs from the reference, see `differences`.

    Raises:
      RuntimeError: a process ended in another way than by its signal.
    """
    draw = random.Random(seed)
    log: list[Kill] = []
    found: list[list[str]] = []
    startup = 5.0  # seconds; measured from the first start on
    while True:
        run_dir = folder / str(len(found))
        process = tiny_run.start(
            *("train", str(place.config), f"run_dir={run_dir}", tiny_run.remembering(place)),
            *overrides,
        )
        if len(log) < kills:
            early = draw.random() < 0.25
            seconds = _wait_for_lines(process, run_dir, draw.uniform(0, startup) if early else None)
            if not early:
                startup = seconds
                time.sleep(draw.uniform(0, BUSY_SECONDS))
            phase = "start-up" if early else _phase(run_dir)
            signals = draw.choice(("SIGKILL", "SIGTERM", "SIGTERM, SIGKILL"))
            _send(process, signals, draw.uniform(0, GRACE_SECONDS))
        ended = tiny_run.wait(process)
        if ended.code == 0:  # it was done before the signal came
            found.append(differences(run_dir, reference))
            if len(log) == kills:
                return log, found
            continue
        # SIGTERM itself ends Python only in the moment before our code runs.
        allowed = [PREEMPTED, -signal.SIGTERM] if "SIGTERM" in signals else []
        allowed += [-signal.SIGKILL] if "SIGKILL" in signals else []
        if len(log) == kills or ended.code not in allowed:
            raise RuntimeError(f"a process ended with {ended.code}:\n{ended.out}")
        log.append(Kill(phase, signals, ended.code, len(found), max(_steps(run_dir), default=0)))
        print(f"kill {len(log)}: {log[-1]}", file=sys.stderr, flush=True)


def _wait_for_lines(process: subprocess.Popen[str], run_dir: Path, limit: float | None) -> float:
    """Waits until a process adds to metrics.jsonl (it cuts it first) or ends, for `limit` seconds.

    Returns:
      the seconds that it took.
    """
    began, least = time.perf_counter(), math.inf
    while process.poll() is None:
        path = run_dir / "metrics.jsonl"
        size = path.stat().st_size if path.exists() else 0
        least = min(size, least)
        seconds = time.perf_counter() - began
        if size > least or (limit is not None and seconds > limit):
            break
        time.sleep(0.005)
    return time.perf_counter() - began


def _send(process: subprocess.Popen[str], signals: str, grace: float) -> None:
    process.send_signal(signal.SIGKILL if signals == "SIGKILL" else signal.SIGTERM)
    if signals == "SIGTERM, SIGKILL":
        time.sleep(grace)
        process.kill()


def differences(run_dir: Path, reference: Path) -> list[str]:
    """What of a run is not as in the undisturbed one; empty if all is."""
    found, expected = tiny_run.state_of(run_dir), tiny_run.state_of(reference)
    different = [
        name
        for name in sorted(found.keys() | expected.keys())
        if name not in found
        or name not in expected
        or found[name].tobytes() != expected[name].tobytes()
    ]
    metrics = [tiny_run.without_times(tiny_run.lines(folder)) for folder in (run_dir, reference)]
    if metrics[0] != metrics[1]:
        different.append("metrics.jsonl")
    for name in ("completions.jsonl", "groups.jsonl"):
        if (run_dir / name).read_bytes() != (reference / name).read_bytes():
            different.append(name)
    return different


def summary(log: Sequence[Kill]) -> dict[str, Any]:
    """Kills by phase, by signal and by exit code."""
    return {
        "kills": len(log),
        "by phase": dict(collections.Counter(kill.phase for kill in log)),
        "by signal": dict(collections.Counter(kill.signals for kill in log)),
        "by exit code": dict(collections.Counter(str(kill.code) for kill in log)),
    }


def _steps(run_dir: Path) -> list[int]:
    folder = run_dir / "checkpoints"
    if not folder.exists():
        return []
    return [int(path.name) for path in folder.iterdir() if path.name.isdigit()]


def _phase(run_dir: Path) -> str:
    folder = run_dir / "checkpoints"
    if any(not path.name.isdigit() for path in folder.iterdir()):
        return "saving"
    steps = _steps(run_dir)
    if steps and not (folder / str(max(steps)) / "manifest").exists():
        return "hashing"
    return "training"


def main() -> int:
    """See the top of the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        place = tiny_run.workplace(Path(scratch))
        overrides = [*tiny_run.started(place), *tiny_run.mixed(place), *SETTINGS]
        reference, folder = place.folder / "undisturbed", place.folder / "killed"
        tiny_run.run(place, "train", reference, *overrides)
        log, found = killed_runs(place, folder, overrides, reference, options.kills, options.seed)
        arrays = len(tiny_run.state_of(reference))
        steps = tiny_run.lines(reference)[-1]["step"]
    result = {
        "command": f"python -m benchmarks.kill --kills {options.kills} --seed {options.seed}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "steps of a run": steps,
        "runs": len(found),
        **summary(log),
        "starts": len(log) + len(found),
        "arrays compared in each run": arrays,
        "different from the undisturbed run": found,
        "log": [kill._asdict() for kill in log],
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps({name: value for name, value in result.items() if name != "log"}, indent=1))
    return int(any(found))


if __name__ == "__main__":
    sys.exit(main())
