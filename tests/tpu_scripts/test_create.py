"""tpu_scripts/create.sh: a queued resource, asked for once and waited for."""

from __future__ import annotations

import pytest

from tests.tpu_scripts.conftest import Cloud

DESCRIBE = (
    "gcloud compute tpus queued-resources describe pod --project=my-project --zone=us-east5-b "
    "'--format=value(state.state)'"
)
CREATE = (
    "gcloud compute tpus queued-resources create pod --project=my-project --zone=us-east5-b "
    "--accelerator-type={} --runtime-version={} {} --quiet"
)


def verbs(cloud: Cloud) -> list[str]:
    return [call.split()[3] for call in cloud.calls]


def commands(output: str) -> list[str]:
    return [line for line in output.splitlines() if not line.startswith("#")]


def test_a_dry_run_prints_every_command_and_runs_none(cloud: Cloud) -> None:
    done = cloud.run("create.sh", "--dry-run")
    assert done.returncode == 0, done.stderr
    create = CREATE.format("v6e-64", "v2-alpha-tpuv6e", "--node-id=pod")
    assert commands(done.stdout) == [DESCRIBE, create, DESCRIBE]
    assert cloud.calls == []


@pytest.mark.parametrize(
    ("accelerator", "runtime"),
    [
        ("v5litepod-64", "v2-alpha-tpuv5-lite"),
        ("v5p-128", "v2-alpha-tpuv5"),
        ("v6e-64", "v2-alpha-tpuv6e"),
    ],
)
def test_each_generation_gets_its_runtime(cloud: Cloud, accelerator: str, runtime: str) -> None:
    cloud.variables["ACCELERATOR_TYPE"] = accelerator
    done = cloud.run("create.sh", "--dry-run")
    assert CREATE.format(accelerator, runtime, "--node-id=pod") in done.stdout


def test_slices_spot_account_and_further_flags(cloud: Cloud) -> None:
    cloud.slices = 2
    cloud.variables |= {
        "PROVISIONING": "spot",
        "SERVICE_ACCOUNT": "trainer@my-project.iam.gserviceaccount.com",
        "CREATE_FLAGS": "--network=lab --internal-ips",
    }
    nodes = (
        "--node-count=2 --node-prefix=pod --spot "
        "--service-account=trainer@my-project.iam.gserviceaccount.com --network=lab --internal-ips"
    )
    done = cloud.run("create.sh", "--dry-run")
    assert commands(done.stdout)[1] == CREATE.format("v6e-64", "v2-alpha-tpuv6e", nodes)
    cloud.variables["PROVISIONING"] = "reserved"
    assert "--node-prefix=pod --reserved " in cloud.run("create.sh", "--dry-run").stdout


def test_it_asks_and_shows_progress_until_active(cloud: Cloud) -> None:
    cloud.says()
    cloud.after_create("WAITING_FOR_RESOURCES", "PROVISIONING", "ACTIVE")
    done = cloud.run("create.sh")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [
        "create.sh: pod is WAITING_FOR_RESOURCES after 0 min",
        "create.sh: pod is PROVISIONING after 0 min",
        "create.sh: pod is ACTIVE: 1 x v6e-64",
    ]
    assert verbs(cloud) == ["describe", "create", "describe", "describe", "describe"]


def test_what_exists_is_waited_for_and_not_made_again(cloud: Cloud) -> None:
    cloud.says("PROVISIONING", "ACTIVE")
    done = cloud.run("create.sh")
    assert done.returncode == 0
    assert "pod exists already (PROVISIONING)" in done.stdout
    assert verbs(cloud) == ["describe", "describe"]


def test_slices_that_are_gone_are_asked_for_again(cloud: Cloud) -> None:
    cloud.says("SUSPENDING", "SUSPENDED")
    done = cloud.run("create.sh")
    assert done.returncode == 0
    assert "pod exists but is SUSPENDED: deleting it and asking again" in done.stdout
    assert verbs(cloud) == ["describe", "describe", "delete", "create", "describe"]


def test_a_request_that_fails_ends_it(cloud: Cloud) -> None:
    cloud.says()
    cloud.after_create("WAITING_FOR_RESOURCES", "FAILED")
    done = cloud.run("create.sh")
    assert done.returncode == 1
    assert "pod is FAILED; 'gcloud compute tpus queued-resources describe pod " in done.stderr


def test_mistakes_are_named_at_once(cloud: Cloud) -> None:
    for name, value, message in (
        ("ACCELERATOR_TYPE", "v5e-64", "Google writes v5e as v5litepod-64"),
        ("ACCELERATOR_TYPE", "tpu7x-128", "TPU7x is given out through GKE: use gke.sh"),
        ("ACCELERATOR_TYPE", "v9-8", "set RUNTIME_VERSION"),
        ("PROVISIONING", "cheap", "PROVISIONING is 'cheap', expected spot, reserved or on-demand"),
        ("SLICES", "two", "SLICES is 'two', expected a whole number"),
    ):
        before = dict(cloud.variables)
        cloud.variables[name] = value
        done = cloud.run("create.sh")
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
        cloud.variables = before
    assert "unknown argument --force" in cloud.run("create.sh", "--force").stderr
    for name in ("TPU", "PROJECT", "ZONE", "ACCELERATOR_TYPE"):
        del cloud.variables[name]
    done = cloud.run("create.sh", "--dry-run")
    assert done.returncode == 2
    assert "set TPU PROJECT ZONE ACCELERATOR_TYPE in the environment" in done.stderr
    assert cloud.calls == []
