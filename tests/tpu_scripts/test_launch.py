"""tpu_scripts/launch.sh and worker.sh: one command on all workers, named, ended, started again."""

from __future__ import annotations

import os
import time
from collections.abc import Callable

import pytest

from tests.tpu_scripts.conftest import Cloud

JOB = ("train", "configs/7b_v6e-64.yaml", "run_dir=gs://b/run one")
STEPS = "trap 'exit 75' TERM; while true; do sleep 0.1; done"  # until told to save and leave


def wait_for(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "waited 20 s in vain"
        time.sleep(0.05)


def test_a_dry_run_prints_the_command_of_every_worker(cloud: Cloud) -> None:
    cloud.slices = 2
    cloud.variables["WORKERS"] = "2"
    done = cloud.run("launch.sh", "--dry-run", *JOB)
    assert done.returncode == 0, done.stderr
    remark, *commands = done.stdout.splitlines()
    assert remark.startswith("# ")
    inner = (
        "jaxgrpo/tpu_scripts/worker.sh run ATTEMPT 1 jaxgrpo train configs/7b_v6e-64.yaml "
        r"'\''run_dir=gs://b/run one'\''"
    )
    assert commands == [
        f"gcloud compute tpus tpu-vm ssh pod-{index} --project=my-project --zone=us-east5-b "
        f"--quiet --worker={worker} '--command={inner}'"
        for index in (0, 1)
        for worker in (0, 1)
    ]
    assert cloud.calls == []


def test_done_on_all_workers_is_done(cloud: Cloud) -> None:
    cloud.make_workers(slices=2, hosts=2)
    for index in (0, 1):
        for worker in (0, 1):
            cloud.plan(index, worker, f"echo step of {index} {worker}; printf last")
    done = cloud.run("launch.sh", *JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    for index in (0, 1):
        for worker in (0, 1):
            assert f"[{index}/{worker}] step of {index} {worker}\n" in done.stdout
            assert f"[{index}/{worker}] last\n" in done.stdout  # no line end: printed all the same
            assert f"[{index}/{worker}] in {cloud.home(index, worker)}/jaxgrpo: " in done.stdout
            assert cloud.starts(index, worker) == [" ".join(JOB)]


def test_a_crash_is_named_the_others_are_ended_and_all_start_again(cloud: Cloud) -> None:
    cloud.make_workers(slices=2, hosts=2)
    hangs = "trap '' TERM; echo $$ >~/hangs; while true; do sleep 0.1; done"
    for index, worker in ((0, 0), (1, 1)):
        cloud.plan(index, worker, STEPS, "true")
    cloud.plan(0, 1, "sleep 0.3; exit 9", "true")
    cloud.plan(1, 0, hangs, "true")
    # `end 10` waits ten seconds for what ignores SIGTERM: here it is killed at once.
    for script in cloud.root.glob("pod-1-0/jaxgrpo/tpu_scripts/worker.sh"):
        script.write_text(script.read_text().replace("$2 * 5", "1"))
    done = cloud.run("launch.sh", *JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker 1 of slice pod-0 ended first: exit code 9" in done.stdout
    assert "exit codes (slice/worker:code): 0/0:75 0/1:9 1/0:137 1/1:75" in done.stdout
    assert "starting again (restart 1 of 10 in a row)" in done.stdout
    for index in (0, 1):
        for worker in (0, 1):
            assert cloud.starts(index, worker) == [" ".join(JOB)] * 2
    process = int((cloud.home(1, 0) / "hangs").read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(process, 0)


def test_exit_code_75_always_starts_again_and_lets_the_others_save(cloud: Cloud) -> None:
    cloud.make_workers(slices=1, hosts=2)
    cloud.variables["RESTARTS"] = "0"
    cloud.plan(0, 0, *["exit 75"] * 2, "true")
    cloud.plan(0, 1, *["sleep 0.5; echo saved; exit 75"] * 2, "true")
    done = cloud.run("launch.sh", *JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("[0/1] saved") == 2
    assert done.stdout.count("exit code 75, saved after SIGTERM") == 2


def test_exit_code_2_on_any_worker_is_not_started_again(cloud: Cloud) -> None:
    cloud.make_workers(slices=1, hosts=2)
    cloud.plan(0, 0, "exit 1")  # lost its peer
    cloud.plan(0, 1, "echo 'error: rollout.group is 1'; exit 2")
    done = cloud.run("launch.sh", *JOB)
    assert done.returncode == 2
    assert "[0/1] error: rollout.group is 1" in done.stdout
    assert "not started again: exit code 2 is a mistake in the config" in done.stderr
    assert len(cloud.starts(0, 0)) == len(cloud.starts(0, 1)) == 1


def test_it_gives_up_after_so_many_crashes_in_a_row(cloud: Cloud) -> None:
    cloud.make_workers(slices=1, hosts=1)
    cloud.variables["RESTARTS"] = "1"
    # 75 is no crash: the count begins anew after it.
    cloud.plan(0, 0, "exit 1", "exit 75", "exit 1", "exit 1", "true")
    done = cloud.run("launch.sh", *JOB)
    assert done.returncode == 1
    assert "given up: 1 restarts in a row have crashed too" in done.stderr
    assert len(cloud.starts(0, 0)) == 4


def test_an_attempt_that_lasts_starts_a_new_count_of_crashes(cloud: Cloud) -> None:
    cloud.make_workers(slices=1, hosts=1)
    cloud.variables |= {"RESTARTS": "1", "STEADY_SECONDS": "0"}
    cloud.plan(0, 0, "exit 1", "exit 1", "true")
    assert cloud.run("launch.sh", *JOB).returncode == 0
    assert len(cloud.starts(0, 0)) == 3


def test_a_worker_where_jaxgrpo_is_missing_is_not_tried_again(cloud: Cloud) -> None:
    cloud.make_workers(slices=1, hosts=2)
    cloud.plan(0, 0, STEPS)
    (cloud.home(0, 1) / "jaxgrpo" / "tpu_scripts" / "worker.sh").unlink()
    done = cloud.run("launch.sh", *JOB)
    assert done.returncode == 1
    assert "[0/1] has no ~/jaxgrpo/tpu_scripts/worker.sh: run setup_workers.sh" in done.stderr


def test_a_lost_connection_is_taken_up_where_it_broke(cloud: Cloud) -> None:
    cloud.make_workers(slices=1, hosts=1)
    lines = "for i in 1 2 3 4 5 6; do echo line $i; sleep 0.2; done"
    # The connection breaks after the third line, and is refused once more; the process goes on.
    cloud.plan(0, 0, f"(sleep 0.5; echo x >~/refuse; pkill -P $(cat ~/ssh)) & {lines}")
    fake = cloud.root / "bin" / "gcloud"
    fake.write_text(
        fake.read_text().replace(
            'HOME=$home bash -c "$command") ||',
            'echo $BASHPID >"$home/ssh" && HOME=$home bash -c "$command & wait \\$!") ||',
        )
    )
    done = cloud.run("launch.sh", *JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "[0/0] connection lost; trying again" in done.stderr
    printed = [line for line in done.stdout.splitlines() if "line" in line and "in /" not in line]
    assert printed == [f"[0/0] line {i}" for i in range(1, 7)]
    assert len(cloud.starts(0, 0)) == 1


def test_a_worker_out_of_reach_restarts_the_job_on_slices_that_were_got_back(cloud: Cloud) -> None:
    cloud.make_workers(slices=1, hosts=2)
    cloud.variables |= {"RECONNECTS": "1", "RESTARTS": "0"}
    cloud.plan(0, 0, STEPS, "true")
    cloud.plan(0, 1, "true")
    (cloud.home(0, 1) / "refuse").write_text("1\n2\n")
    cloud.says("SUSPENDED")
    cloud.use_own_clone()
    done = cloud.run("launch.sh", *JOB)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "worker 1 of slice pod ended first: out of reach" in done.stdout
    assert "the queued resource is SUSPENDED" in done.stdout
    assert "create.sh: pod exists but is SUSPENDED: deleting it and asking again" in done.stdout
    assert "is set up on all workers" in done.stdout
    assert (len(cloud.starts(0, 0)), len(cloud.starts(0, 1))) == (2, 1)


def test_the_job_outlives_its_launcher_which_takes_it_up_again(cloud: Cloud) -> None:
    cloud.make_workers(slices=1, hosts=2)
    for worker in (0, 1):
        cloud.plan(0, worker, "while [[ ! -e ~/go ]]; do sleep 0.05; done; echo finished")
    first = cloud.start("launch.sh", *JOB)
    wait_for(lambda: bool(cloud.starts(0, 0) and cloud.starts(0, 1)))
    first.terminate()
    output, _ = first.communicate(timeout=20)
    assert first.returncode == 130
    assert "the job goes on without its launcher" in output

    other = cloud.run("launch.sh", "eval", "configs/other.yaml")
    assert other.returncode == 1
    assert "another job runs: 'jaxgrpo train configs/7b_v6e-64.yaml" in other.stderr

    second = cloud.start("launch.sh", *JOB)
    wait_for(lambda: sum("worker.sh run" in call for call in cloud.calls) == 4)
    for worker in (0, 1):
        (cloud.home(0, worker) / "go").touch()
    output, _ = second.communicate(timeout=20)
    assert second.returncode == 0, output
    assert "the job runs already" in output
    assert "[0/0] finished" in output and "[0/1] finished" in output
    assert len(cloud.starts(0, 0)) == len(cloud.starts(0, 1)) == 1


def test_stop_ends_the_job_and_its_launcher(cloud: Cloud) -> None:
    cloud.make_workers(slices=2, hosts=1)
    for index in (0, 1):
        cloud.plan(index, 0, STEPS)
    launcher = cloud.start("launch.sh", *JOB)
    wait_for(lambda: bool(cloud.starts(0, 0) and cloud.starts(1, 0)))
    time.sleep(0.3)  # for the trap to be set
    stopped = cloud.run("stop.sh")
    assert stopped.returncode == 0, stopped.stderr
    output, _ = launcher.communicate(timeout=20)
    assert launcher.returncode == 143, output
    assert "ended by stop.sh" in output
    assert len(cloud.starts(0, 0)) == len(cloud.starts(1, 0)) == 1


def test_what_is_missing_is_named_at_once(cloud: Cloud) -> None:
    for name in ("TPU", "ZONE", "ACCELERATOR_TYPE"):
        del cloud.variables[name]
    done = cloud.run("launch.sh", *JOB)
    assert done.returncode == 2
    assert "set TPU ZONE ACCELERATOR_TYPE in the environment" in done.stderr
    assert cloud.run("launch.sh", "export", "a", "b").returncode == 2
    assert cloud.run("launch.sh", "train").returncode == 2
