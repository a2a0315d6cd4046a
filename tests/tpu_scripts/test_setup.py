"""tpu_scripts/setup.sh: an environment with jaxgrpo on one TPU VM."""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.tpu_scripts.conftest import SCRIPTS, Cloud


def use_empty_clone(cloud: Cloud) -> Path:
    """A clone without an environment; `python3` and the like are what a test puts on PATH."""
    shutil.copytree(SCRIPTS, cloud.root / "clone" / "tpu_scripts")
    cloud.scripts = cloud.root / "clone" / "tpu_scripts"
    return cloud.root / "clone"


def fake_pythons(cloud: Cloud, version: str) -> None:
    """Every Python on PATH says that it is of this version."""
    for name in ("python3.13", "python3.12", "python3.11", "python3"):
        path = cloud.root / "bin" / name
        path.write_text(
            f'#!/bin/sh\ncase "$2" in *3,\\ 11*) exit {int(version < "3.11")} ;; esac\n'
        )
        path.chmod(0o755)


def test_a_dry_run_prints_every_command_and_runs_none(cloud: Cloud) -> None:
    clone = use_empty_clone(cloud)
    fake_pythons(cloud, "3.12")
    done = cloud.run("setup.sh", "--dry-run")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if not line.startswith("sudo")]
    assert lines[:-1] == [
        "python3.13 -m venv .venv",
        ".venv/bin/pip install --quiet --upgrade pip",
        ".venv/bin/pip install --quiet -e '.[tpu,gcs]'",
    ]
    assert lines[-1].startswith(".venv/bin/python -c ")
    assert not (clone / ".venv").exists()


def test_where_python_is_too_old_uv_brings_one(cloud: Cloud) -> None:
    use_empty_clone(cloud)
    fake_pythons(cloud, "3.10")
    lines = cloud.run("setup.sh", "--dry-run").stdout.splitlines()
    assert lines[:2] == [
        "env PIP_BREAK_SYSTEM_PACKAGES=1 python3 -m pip install --quiet --user uv",
        "python3 -m uv venv --quiet --seed --python 3.12 .venv",
    ]


def test_an_environment_that_exists_is_kept(cloud: Cloud) -> None:
    clone = use_empty_clone(cloud)
    fake_pythons(cloud, "3.12")
    (clone / ".venv" / "bin").mkdir(parents=True)
    for name in ("pip", "python"):
        (clone / ".venv" / "bin" / name).write_text('#!/bin/sh\necho "$0 $*" >>"$CLOUD/ran"\n')
        (clone / ".venv" / "bin" / name).chmod(0o755)
    done = cloud.run("setup.sh", "--dry-run")
    assert "venv .venv" not in done.stdout
    done = cloud.run("setup.sh")
    assert done.returncode == 0, done.stderr
    ran = (cloud.root / "ran").read_text().splitlines()
    assert ran[:2] == [
        ".venv/bin/pip install --quiet --upgrade pip",
        ".venv/bin/pip install --quiet -e .[tpu,gcs]",
    ]


def test_an_unknown_argument_is_named(cloud: Cloud) -> None:
    done = cloud.run("setup.sh", "--dry")
    assert done.returncode == 2
    assert "unknown argument --dry" in done.stderr
