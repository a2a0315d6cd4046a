"""A cloud on this machine: a `gcloud` that runs each worker's command here, and a `jaxgrpo` that
does as it is told."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).parents[2] / "tpu_scripts"

# A worker is a folder NODE-N, the home directory of what runs there. `states` holds what the queued
# resource's state is said to be, one line per question; the last is repeated.
GCLOUD = r"""#!/usr/bin/env bash
echo "$*" >>"$CLOUD/calls"
for flag; do
  case $flag in
    --worker=*) workers=${flag#*=} ;;
    --command=*) command=${flag#*=} ;;
  esac
done
[[ ${workers:-} != all ]] || workers=$(seq 0 $((HOSTS - 1)))
case "$3 $4" in
  "queued-resources describe")
    if [[ ! -s $CLOUD/states ]]; then echo "ERROR: NOT_FOUND: no $5" >&2; exit 1; fi
    head -n 1 "$CLOUD/states"
    echo "WARNING: an update is available" >&2
    if (($(wc -l <"$CLOUD/states") > 1)); then sed -i 1d "$CLOUD/states"; fi ;;
  "queued-resources create") cp "$CLOUD/states_after_create" "$CLOUD/states" ;;
  "queued-resources delete") : >"$CLOUD/states" ;;
  "tpu-vm describe") echo "$HOSTS" ;;
  "tpu-vm scp") for worker in $workers; do cp "$5" "$CLOUD/${6%%:*}-$worker/${6#*:}"; done ;;
  "tpu-vm ssh")
    for worker in $workers; do
      home=$CLOUD/$5-$worker
      if [[ -s $home/refuse ]]; then sed -i 1d "$home/refuse"; exit 255; fi
      (cd "$home" && HOME=$home bash -c "$command") || exit
    done ;;
  *) echo "fake gcloud: $*" >&2; exit 1 ;;
esac
"""

# The first line of ~/plan says what this start does; each start takes one line away.
JAXGRPO = r"""#!/usr/bin/env bash
echo "$*" >>"$HOME/starts"
plan=$(head -n 1 "$HOME/plan")
sed -i 1d "$HOME/plan"
echo "in $PWD: $plan"
eval "$plan"
"""


def git(clone: Path, *arguments: str) -> str:
    author = ("-c", "user.name=T", "-c", "user.email=t@example.com")
    command = ["git", "-C", str(clone), *author, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


class Cloud:
    """A pod of `slices` slices of `hosts` workers, and the scripts that drive it."""

    def __init__(self, root: Path):
        self.root, self.scripts = root, SCRIPTS
        self.slices, self.hosts = 1, 1
        self.variables = {
            "TPU": "pod",
            "PROJECT": "my-project",
            "ZONE": "us-east5-b",
            "ACCELERATOR_TYPE": "v6e-64",
            "POLL_SECONDS": "0.01",
            "RESTART_SECONDS": "0",
            "RECONNECT_SECONDS": "0.01",
        }
        for name, text in (("gcloud", GCLOUD), ("jaxgrpo", JAXGRPO), ("sudo", "")):
            path = root / "bin" / name
            path.parent.mkdir(exist_ok=True)
            path.write_text(text)
            path.chmod(0o755)
        self.says("ACTIVE")
        self.after_create("ACTIVE")
        (root / "calls").touch()

    def says(self, *states: str) -> None:
        """What the queued resource's state is, one after another; none: there is none."""
        (self.root / "states").write_text("".join(f"{state}\n" for state in states))

    def after_create(self, *states: str) -> None:
        (self.root / "states_after_create").write_text("".join(f"{state}\n" for state in states))

    def make_workers(self, slices: int, hosts: int) -> None:
        self.slices, self.hosts = slices, hosts
        for index in range(slices):
            for worker in range(hosts):
                shutil.copytree(SCRIPTS, self.home(index, worker) / "jaxgrpo" / "tpu_scripts")
                self.plan(index, worker)

    def use_own_clone(self) -> Path:
        """Runs the scripts from a small repository, whose setup.sh installs nothing."""
        clone = self.root / "clone"
        shutil.copytree(SCRIPTS, clone / "tpu_scripts")
        self.scripts = clone / "tpu_scripts"
        (self.scripts / "setup.sh").write_text("#!/bin/sh\ndate +%s%N >>~/set-up\n")
        git(clone, "init", "--quiet")
        git(clone, "add", ".")
        git(clone, "commit", "--quiet", "--message=first")
        return clone

    def home(self, index: int, worker: int) -> Path:
        return self.root / f"{'pod' if self.slices == 1 else f'pod-{index}'}-{worker}"

    def plan(self, index: int, worker: int, *starts: str) -> None:
        """What `jaxgrpo` does on a worker: a line of bash for each time that it is started."""
        (self.home(index, worker) / "plan").write_text("".join(f"{line}\n" for line in starts))

    def starts(self, index: int, worker: int) -> list[str]:
        """The arguments of every start of `jaxgrpo` on a worker."""
        path = self.home(index, worker) / "starts"
        return path.read_text().splitlines() if path.exists() else []

    @property
    def calls(self) -> list[str]:
        """What `gcloud` has been asked."""
        return (self.root / "calls").read_text().splitlines()

    @property
    def environment(self) -> dict[str, str]:
        own = {
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "HOME": str(self.root),
            "CLOUD": str(self.root),
            "SLICES": str(self.slices),
            "HOSTS": str(self.hosts),
        }
        return own | self.variables

    def run(self, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            ["bash", str(self.scripts / script), *arguments],
            check=False,
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment,
        )

    def start(self, script: str, *arguments: str) -> subprocess.Popen[str]:
        """The same, without waiting for its end."""
        return subprocess.Popen(
            ["bash", str(self.scripts / script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=self.environment,
        )


@pytest.fixture
def cloud(tmp_path: Path) -> Iterator[Cloud]:
    yield Cloud(tmp_path)
    for running in tmp_path.glob("*/.jaxgrpo/*/pid"):  # of a test that failed
        if not running.with_name("exit").exists():
            os.killpg(int(running.read_text()), signal.SIGKILL)
