"""tpu_scripts/setup.sh: what it would run, and how it refuses what it does not know."""

from __future__ import annotations

import subprocess
from pathlib import Path

SETUP = Path(__file__).parents[2] / "tpu_scripts" / "setup.sh"


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(SETUP), *arguments], check=False, capture_output=True, text=True, timeout=60
    )


def test_a_dry_run_prints_every_command_and_runs_none() -> None:
    done = run("--dry-run")
    assert done.returncode == 0, done.stderr
    commands = done.stdout.splitlines()
    assert all(line.startswith("+ ") for line in commands)
    assert any("pip install --quiet -e .[tpu]" in line for line in commands)
    assert "jax.device_count" in commands[-1]


def test_an_unknown_argument_is_named() -> None:
    done = run("--dry")
    assert done.returncode == 2
    assert "--dry" in done.stderr
