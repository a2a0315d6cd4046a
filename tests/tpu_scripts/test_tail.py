"""tpu_scripts/tail.sh: the logs of all workers, or of one."""

from __future__ import annotations

from tests.tpu_scripts.conftest import Cloud

SSH = (
    "gcloud compute tpus tpu-vm ssh pod-{} --project=my-project --zone=us-east5-b --quiet "
    "--worker={} '--command=jaxgrpo/tpu_scripts/worker.sh tail 20'"
)


def test_a_dry_run_prints_every_command(cloud: Cloud) -> None:
    cloud.slices = 2
    cloud.variables["WORKERS"] = "2"
    done = cloud.run("tail.sh", "--dry-run")
    assert done.stdout.splitlines() == [SSH.format(s, w) for s in (0, 1) for w in (0, 1)]
    assert cloud.run("tail.sh", "--dry-run", "1/3").stdout == SSH.format(1, 3) + "\n"
    assert cloud.calls == []


def test_lines_say_whose_they_are_and_come_as_they_are_written(cloud: Cloud) -> None:
    cloud.make_workers(slices=1, hosts=2)
    cloud.variables["LINES_BEFORE"] = "1"
    for worker in (0, 1):
        log = cloud.home(0, worker) / ".jaxgrpo" / "a" / "log"
        log.parent.mkdir(parents=True)
        log.write_text("old\nloss 1\n")
        (cloud.home(0, worker) / ".jaxgrpo" / "current").write_text("a\n")
    following = cloud.start("tail.sh")
    assert following.stdout is not None
    try:
        first = {following.stdout.readline() for _ in (0, 1)}
        with (cloud.home(0, 1) / ".jaxgrpo" / "a" / "log").open("a") as log_file:
            log_file.write("loss 2\n")
        assert first == {"[0/0] loss 1\n", "[0/1] loss 1\n"}
        assert following.stdout.readline() == "[0/1] loss 2\n"
    finally:
        following.terminate()
        following.wait(timeout=20)


def test_mistakes_are_named(cloud: Cloud) -> None:
    assert "unknown argument 'all'" in cloud.run("tail.sh", "all").stderr
    done = cloud.run("tail.sh", "1/0")
    assert done.returncode == 2
    assert "there is no slice 1: SLICES is 1, counted from 0" in done.stderr
    del cloud.variables["PROJECT"]
    assert "set PROJECT in the environment" in cloud.run("tail.sh").stderr
