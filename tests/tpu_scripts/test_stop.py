"""tpu_scripts/stop.sh: the job ended, the slices deleted. (With a job: test_launch.py.)"""

from __future__ import annotations

from tests.tpu_scripts.conftest import Cloud

WHERE = "--project=my-project --zone=us-east5-b"
SSH = (
    f"gcloud compute tpus tpu-vm ssh pod-{{}} {WHERE} --quiet --worker=all "
    "'--command=jaxgrpo/tpu_scripts/worker.sh stop 300'"
)
DELETE = f"gcloud compute tpus queued-resources delete pod {WHERE} --force --quiet"


def test_a_dry_run_prints_every_command(cloud: Cloud) -> None:
    cloud.slices = 2
    stops = [SSH.format(0), SSH.format(1)]
    assert cloud.run("stop.sh", "--dry-run").stdout.splitlines() == stops
    done = cloud.run("stop.sh", "--dry-run", "--delete")
    assert done.stdout.splitlines() == [*stops, DELETE]
    assert cloud.calls == []


def test_without_a_job_there_is_nothing_to_end(cloud: Cloud) -> None:
    cloud.make_workers(slices=1, hosts=2)
    done = cloud.run("stop.sh")
    assert done.returncode == 0, done.stderr
    assert "pod still costs money until 'stop.sh --delete'" in done.stdout


def test_delete_twice(cloud: Cloud) -> None:
    cloud.says("SUSPENDED")  # no slice to reach
    done = cloud.run("stop.sh", "--delete")
    assert done.returncode == 0, done.stderr
    assert [call.split()[3] for call in cloud.calls] == ["describe", "delete"]
    done = cloud.run("stop.sh", "--delete")
    assert done.returncode == 0
    assert done.stdout == "stop.sh: there is no queued resource pod\n"


def test_a_worker_out_of_reach_is_reported(cloud: Cloud) -> None:
    cloud.make_workers(slices=1, hosts=1)
    (cloud.home(0, 0) / "refuse").write_text("1\n")
    done = cloud.run("stop.sh")
    assert done.returncode == 1
    assert "not every worker could be told to stop" in done.stderr


def test_mistakes_are_named(cloud: Cloud) -> None:
    assert "unknown argument '--force'" in cloud.run("stop.sh", "--force").stderr
    del cloud.variables["TPU"]
    assert "set TPU in the environment" in cloud.run("stop.sh").stderr
