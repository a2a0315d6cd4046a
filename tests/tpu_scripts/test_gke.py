"""tpu_scripts/gke.sh: the same job on Google Kubernetes Engine, through xpk."""

from __future__ import annotations

import pytest

from tests.tpu_scripts.conftest import Cloud

WHERE = "--cluster=pods --project=my-project --zone=us-east5-b"
LIST = f"xpk workload list {WHERE} --filter-by-job=grpo-1"
JOB = ("launch", "train", "configs/7b_v6e-64.yaml", "data.buckets=[1024, 2048]")
CREATE = (
    f"xpk workload create {WHERE} --workload=grpo-1 --tpu-type=v6e-64 --num-slices=1 "
    "--docker-image=gcr.io/my-project/jaxgrpo --max-restarts=50 --restart-on-exit-codes=1,75 "
    "--termination-grace-period-seconds=300 "
    r"'--command=exec jaxgrpo train configs/7b_v6e-64.yaml '\''data.buckets=[1024, 2048]'\'''"
)


@pytest.fixture
def gke(cloud: Cloud) -> Cloud:
    cloud.variables |= {
        "CLUSTER": "pods",
        "WORKLOAD": "grpo-1",
        "IMAGE": "gcr.io/my-project/jaxgrpo",
    }
    return cloud


def printed(cloud: Cloud, *arguments: str) -> list[str]:
    done = cloud.run("gke.sh", "--dry-run", *arguments)
    assert done.returncode == 0, done.stderr
    return [line for line in done.stdout.splitlines() if not line.startswith("#")]


def test_a_dry_run_prints_every_command(gke: Cloud) -> None:
    create = f"xpk cluster create {WHERE} --tpu-type=v6e-64 --num-slices=1 "
    assert printed(gke, "create") == [create + "--on-demand"]
    assert printed(gke, *JOB) == [LIST, CREATE]
    logs = (
        "kubectl logs --selector=jobset.sigs.k8s.io/jobset-name=grpo-1 --all-containers --prefix "
        "--follow --tail=20 --max-log-requests=1000"
    )
    assert printed(gke, "tail") == [logs]
    stop = f"xpk workload delete {WHERE} --workload=grpo-1 --force"
    assert printed(gke, "stop") == [stop]
    assert printed(gke, "stop", "--delete") == [stop, f"xpk cluster delete {WHERE} --force"]
    gke.variables["PROVISIONING"] = "spot"
    assert printed(gke, "create") == [create + "--spot"]
    gke.variables["RESERVATION"] = "mine"
    assert printed(gke, "create") == [create + "--reservation=mine"]


def test_a_job_that_exists_is_not_made_again(gke: Cloud) -> None:
    xpk = gke.root / "bin" / "xpk"
    xpk.write_text('#!/bin/sh\necho "xpk $*" >>"$CLOUD/calls"\ncat "$CLOUD/jobs"\n')
    xpk.chmod(0o755)
    heading = "Jobset Name   Created Time   Priority\n"
    (gke.root / "jobs").write_text(heading + "grpo-10   2026-01-01   medium\n")
    assert gke.run("gke.sh", *JOB).returncode == 0
    assert [call.split()[2] for call in gke.calls] == ["list", "create"]
    (gke.root / "jobs").write_text(heading + "grpo-1   2026-01-01   medium\n")
    done = gke.run("gke.sh", *JOB)
    assert done.returncode == 0
    assert "grpo-1 exists already" in done.stdout
    assert [call.split()[2] for call in gke.calls] == ["list", "create", "list"]


def test_mistakes_are_named_at_once(gke: Cloud) -> None:
    for arguments in ((), ("launch",), ("launch", "export", "a"), ("stop", "--force"), ("top",)):
        done = gke.run("gke.sh", *arguments)
        assert done.returncode == 2
        assert f"unknown argument '{' '.join(arguments)}'" in done.stderr
    for name in ("CLUSTER", "WORKLOAD", "IMAGE"):
        del gke.variables[name]
    assert "set CLUSTER WORKLOAD IMAGE in the environment" in gke.run("gke.sh", *JOB).stderr
    assert "set CLUSTER in the environment" in gke.run("gke.sh", "create").stderr
