"""tpu_scripts/slurm.sbatch: a job on GPUs that queues itself again after it has saved."""

from __future__ import annotations

import pytest

from tests.tpu_scripts.conftest import SCRIPTS, Cloud

SBATCH = "slurm.sbatch"
JOB = ("train", "configs/3b_gpu8.yaml", "data.buckets=[1024, 2048]")


@pytest.fixture
def slurm(cloud: Cloud) -> Cloud:
    """`srun` does as the variable SRUN says."""
    for name, text in (("srun", 'eval "$SRUN"'), ("scontrol", ":")):
        path = cloud.root / "bin" / name
        path.write_text(f'#!/usr/bin/env bash\necho "{name} $*" >>"$CLOUD/calls"\n{text}\n')
        path.chmod(0o755)
    return cloud


def test_a_dry_run_prints_the_commands(slurm: Cloud) -> None:
    done = slurm.run(SBATCH, "--dry-run", *JOB)
    assert done.returncode == 0, done.stderr
    step = (
        "'srun' '--label' '--kill-on-bad-exit=0' '--wait=300' '--cpus-per-task=8' 'jaxgrpo' "
        "'train' 'configs/3b_gpu8.yaml' 'data.buckets=[1024, 2048]'"
    )
    assert done.stdout.splitlines() == [
        step,
        "# if that exits with 75:",
        "'scontrol' 'requeue' 'JOB_ID'",
    ]
    assert slurm.calls == []


@pytest.mark.parametrize("code", [0, 1, 2, 75])
def test_only_exit_code_75_queues_the_job_again(slurm: Cloud, code: int) -> None:
    slurm.variables |= {"SLURM_JOB_ID": "17", "SRUN": f"exit {code}"}
    done = slurm.run(SBATCH, *JOB)
    assert done.returncode == code
    step, *requeues = slurm.calls
    assert step.startswith("srun ") and step.endswith(" ".join(JOB))
    assert requeues == (["scontrol requeue 17"] if code == 75 else [])


def test_the_job_is_warned_before_its_time_limit_and_may_be_queued_again() -> None:
    options = [
        line.removeprefix("#SBATCH ")
        for line in (SCRIPTS / SBATCH).read_text().splitlines()
        if line.startswith("#SBATCH ")
    ]
    assert {"--signal=TERM@300", "--requeue", "--dependency=singleton"} <= set(options)
    # jax takes one GPU for each process of a Slurm step.
    sizes = dict(option.split("=") for option in options if "per-node" in option)
    assert sizes["--ntasks-per-node"] == sizes["--gpus-per-node"]


def test_mistakes_are_named(slurm: Cloud) -> None:
    for arguments in ((), ("train",), ("plan", "a.yaml")):
        done = slurm.run(SBATCH, *arguments)
        assert done.returncode == 2
        assert f"unknown arguments '{' '.join(arguments)}'" in done.stderr
    assert "submit this file with sbatch" in slurm.run(SBATCH, *JOB).stderr
    assert slurm.calls == []
