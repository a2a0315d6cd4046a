"""Jobs of several real processes, with gloo between them: equal to one, killed, resumed on fewer.

One process on one device (`tiny_run.reference`) is what all are compared with.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from jaxgrpo import processes
from jaxgrpo.config import Config, ConfigError, DataSection, ModelSection, to_dict
from jaxgrpo.processes import jax_finds_processes, named_processes
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import STEPS, Workplace

CLOSE = 1e-5
CLOSE_MOMENT = 2e-5  # AdamW's, as gradients of other meshes: how their sums round is the machine's
END_WITHIN = 60.0  # seconds, with the heartbeat timeout of `tiny_run`


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def reference(place: Workplace) -> Path:
    return tiny_run.reference(place)


def overrides(place: Workplace) -> list[str]:
    return [*tiny_run.started(place), *tiny_run.mixed(place)]


# ---- which processes ----

SLURM = {
    "SLURM_JOB_ID": "7",
    "SLURM_STEP_NODELIST": "node[1-2]",
    "SLURM_NTASKS": "2",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
}
TPU = {"TPU_ML_PLATFORM": "JAX"}  # set by jax where it finds chips


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM, True),
        (SLURM | {"SLURM_NTASKS": "1"}, False),
        ({"SLURM_JOB_ID": "7", "SLURM_NTASKS": "2"}, False),  # the shell of an allocation
        ({"OMPI_MCA_orte_hnp_uri": "1.0;tcp://10.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "4"}, True),
        (TPU, True),  # a TPU VM: its metadata server knows
        (TPU | {"TPU_SKIP_MDS_QUERY": "1"}, False),
        (TPU | {"JAX_PLATFORMS": "cpu"}, False),
        (TPU | {"JAX_PLATFORMS": ""}, True),  # as if it were not set
        (TPU | {"TPU_WORKER_HOSTNAMES": "a,b", "TPU_SKIP_MDS_QUERY": "1"}, True),  # GKE
        (TPU | {"TPU_WORKER_HOSTNAMES": "a"}, False),
        (TPU | {"TPU_WORKER_HOSTNAMES": "a", "MEGASCALE_NUM_SLICES": "2"}, True),
        ({"TPU_WORKER_HOSTNAMES": "a,b"}, False),  # no chips
    ],
)
def test_jax_is_asked_for_other_processes_where_the_environment_shows_some(
    environment: dict[str, str], several: bool
) -> None:
    assert jax_finds_processes(environment) == several


@pytest.mark.parametrize(
    ("environment", "named"),
    [
        ({}, {}),
        (SLURM, {}),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "3", "JAX_PROCESS_ID": "2"},
            {
                "coordinator_address": "a:1",
                "num_processes": 3,
                "process_id": 2,
                "cluster_detection_method": "deactivate",
            },
        ),
        (SLURM | {"JAX_COORDINATOR_ADDRESS": "a:1"}, {}),  # which jax takes instead of its own
    ],
)
def test_three_variables_name_the_processes_or_jax_finds_them(
    environment: dict[str, str], named: dict[str, Any]
) -> None:
    assert named_processes(environment) == named


@pytest.mark.parametrize(
    ("environment", "names"),
    [
        ({"JAX_COORDINATOR_ADDRESS": "a:1"}, ["JAX_NUM_PROCESSES and JAX_PROCESS_ID must be"]),
        (
            {"JAX_COORDINATOR_ADDRESS": "a:1", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "2"},
            ["JAX_PROCESS_ID=2", "one less than the number"],
        ),
        (
            {"JAX_COORDINATOR_ADDRESS": "a", "JAX_NUM_PROCESSES": "2", "JAX_PROCESS_ID": "1"},
            ["JAX_COORDINATOR_ADDRESS=a ", "HOST:PORT"],
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_RANK": "1"},
            ["4 processes of an Open MPI newer than 4", "JAX_COORDINATOR_ADDRESS=HOST:PORT"],
        ),
    ],
)
def test_half_a_job_is_refused_with_its_mend(environment: dict[str, str], names: list[str]) -> None:
    with pytest.raises(ConfigError) as error:
        named_processes(environment)
    assert all(name in str(error.value) for name in names), error.value


def test_the_variables_of_slurm_are_those_that_jax_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """A renamed one would leave every process alone."""
    from jax._src.clusters.slurm_cluster import SlurmCluster

    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    assert SlurmCluster.is_env_present() and SlurmCluster.get_process_count() == 2


# ---- what all must have alike ----


def test_processes_with_another_config_are_refused_but_for_what_is_a_hosts_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    config = Config(run_dir="r", model=ModelSection("m"), data=DataSection(train="t"))

    def gathered(**changes: Any) -> None:
        other = dataclasses.replace(config, **changes)
        monkeypatch.setattr(processes, "gather_objects", lambda x: [x, x, to_dict(other)])
        processes.check_same_config(config)

    gathered(data=DataSection(train="t", root="/mnt/disk2", workers=3))
    with pytest.raises(ConfigError, match=r"process 2 was started with seed=7 \(not 0\)"):
        gathered(seed=7)


def test_processes_that_find_other_checkpoints_are_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(processes, "gather_objects", lambda x: [x, x, 40])
    with pytest.raises(ConfigError, match="step 50 for process 0 and 40 for process 2: all hosts"):
        processes.check_same("the newest checkpoint is of step", 50)


# ---- a process that fails alone, and one that does not come ----

# One of two processes: 1 makes a mistake, while 0 waits for its part of a sum.
FAILS_ALONE = """
import os, sys
import jax
from jax.experimental import multihost_utils
from jaxgrpo import cli, config, processes
processes._LEAVE_TIMEOUT = 2.0
from jaxgrpo.evaluate import start_processes

def command(options):
    start_processes(config.Config("r", config.ModelSection("m"), config.DataSection(train="t")))
    if jax.process_index() == 1:
        raise config.ConfigError("this host alone has no disk")
    multihost_utils.sync_global_devices("for ever")

cli._run = command
sys.exit(cli.main(["eval", "unread.yaml"]))
"""


def started_script(script: str, index: int, port: int) -> subprocess.Popen[str]:
    several = {
        "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
        "JAX_NUM_PROCESSES": "2",
        "JAX_PROCESS_ID": str(index),
        "XLA_FLAGS": "",
    }
    return subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tiny_run.ROOT,
        env=os.environ | several,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_process_that_fails_alone_ends_and_so_do_the_others() -> None:
    port = tiny_run.free_port()
    jobs = [started_script(FAILS_ALONE, index, port) for index in range(2)]
    waiting, failed = [tiny_run.wait(job) for job in jobs]
    assert failed.code == 2 and "error: this host alone has no disk" in failed.out
    assert waiting.code == 1, waiting.out
    (line,) = (x for x in waiting.out.splitlines() if x.startswith("error: "))
    assert line.startswith("error: process 0 of 2 lost another one: ") and "127.0.0.1" in line
    assert "Traceback" not in waiting.out + failed.out


LEFT_WAITING = """
from jaxgrpo import config, processes
processes._JOIN_TIMEOUT = 3
processes.start_processes(
    config.Config("r", config.ModelSection("m"), config.DataSection(train="t"))
)
"""


def test_processes_that_do_not_all_come_end_with_the_address() -> None:
    port = tiny_run.free_port()
    alone = tiny_run.wait(started_script(LEFT_WAITING, 0, port))
    assert alone.code == 1, alone.out
    assert f"process 0 of 2 joins the others at 127.0.0.1:{port}" in alone.out
    expected = f"error: process 0 of 2 waited 3 s at 127.0.0.1:{port} and not all others came"
    assert expected in alone.out and "firewall" in alone.out


# ---- equal to one process, a process lost on the way ----


def killed_job(jobs: list[subprocess.Popen[str]], victim: int) -> None:
    """Waits until the victim is dead and for the others, which must end soon and say why."""
    dead = tiny_run.wait(jobs[victim])
    assert dead.code == -signal.SIGKILL, dead.out
    killed_at = time.monotonic()
    for job in jobs[:victim] + jobs[victim + 1 :]:
        ended = tiny_run.wait(job)
        assert ended.code in (1, -signal.SIGABRT), ended.out
        # Ours where the connection broke, jax's where the coordinator found out first.
        assert "lost another one" in ended.out or "JAX distributed service" in ended.out
    assert time.monotonic() - killed_at < END_WITHIN


def assert_equals_one_process(run_dir: Path, reference: Path) -> None:
    """By the lines of training, and by the norm of the difference of each saved array."""
    found, expected = (
        tiny_run.without_times(tiny_run.lines(x, "train")) for x in (run_dir, reference)
    )
    assert len(found) == len(expected)  # process 0 alone writes
    for line, other in zip(found, expected, strict=True):
        assert line == pytest.approx(other, abs=CLOSE)
    state, other_state = tiny_run.state_of(run_dir), tiny_run.state_of(reference)
    assert state.keys() == other_state.keys()
    for name, array in other_state.items():
        difference = np.linalg.norm((state[name] - array).ravel())
        close = CLOSE_MOMENT if name.startswith("['opt_state']") else CLOSE
        assert difference <= close * np.linalg.norm(array.ravel()), name


def test_two_processes_of_which_0_is_killed_go_on_when_restarted_and_equal_one(
    place: Workplace, reference: Path
) -> None:
    """Process 0 is the one that the others ask for each other."""
    run_dir = place.folder / "two"
    short = [*overrides(place), "eval.every=0", "eval.limit=4"]
    killed_job(tiny_run.start_processes(place, 2, run_dir, *short, kill=(0, "update:4")), victim=0)
    first, second = tiny_run.run_processes(place, 2, run_dir, *short)
    assert_equals_one_process(run_dir, reference)
    assert "wrote" in first.out and "wrote" not in second.out and "tvg/mIoU" not in second.out
    assert "process 1 of 2 is on" in second.out
    assert "compilation_cache is not used" in first.out
    counted = [line["compilations"] for line in tiny_run.lines(run_dir, "train")]
    # Between the saves: at a first one Orbax compiles copies between devices.
    assert [a == b for a, b in zip(counted[::2], counted[1::2], strict=True)] == [True] * 3


def test_two_processes_of_which_one_gets_sigterm_stop_at_the_same_step(
    place: Workplace, reference: Path
) -> None:
    """It is told in the middle of a step; both save that step, and go on from it."""
    run_dir = place.folder / "two_told"
    short = [*overrides(place), "mesh.data=1", "mesh.fsdp=2", "eval.every=0", "eval.limit=4"]
    for job in tiny_run.start_processes(place, 2, run_dir, *short, term=(1, "update:2")):
        ended = tiny_run.wait(job)
        assert ended.code == tiny_run.PREEMPTED, ended.out
        assert "SIGTERM: saved step" in ended.out
    tiny_run.run_processes(place, 2, run_dir, *short)
    assert_equals_one_process(run_dir, reference)


def test_four_processes_lose_one_and_two_go_on_with_their_run(
    place: Workplace, reference: Path
) -> None:
    """The tensor axis spans processes, whose rows are not neighbours, and one of each pair with the
    same rows can read a video that the other cannot. Two processes resume on another mesh.
    """
    run_dir, mesh = place.folder / "four", ["mesh.data=2", "mesh.fsdp=2", "mesh.tensor=2"]
    jobs = tiny_run.start_processes(
        place,
        4,
        run_dir,
        *overrides(place),
        *mesh,
        devices=2,
        kill=(2, f"update:{STEPS - 1}"),
        options=lambda index: ["--torus", *(["--sees-whole"] if index % 2 else [])],
    )
    killed_job(jobs, victim=2)
    scores = tiny_run.without_times(tiny_run.lines(run_dir, "eval"))
    expected = tiny_run.without_times(tiny_run.lines(reference, "eval"))
    assert [line["step"] for line in scores] == [0, 3]  # by all four
    for line, other in zip(scores, expected, strict=False):
        assert line == pytest.approx(other, abs=CLOSE)
    resumed = [*overrides(place), "mesh.data=1", "mesh.fsdp=2", "eval.every=0", "eval.limit=4"]
    tiny_run.run_processes(place, 2, run_dir, *resumed)
    assert_equals_one_process(run_dir, reference)


def test_two_processes_evaluate_as_one(place: Workplace, reference: Path) -> None:
    """A user's own reward among them, which weighs nothing here and is written down."""
    out = place.folder / "eval_two"
    (place.folder / "own_reward.py").write_text("def f(said): return [x.tokens / 99 for x in said]")
    arguments = [*tiny_run.mixed(place), f"model.path={reference}", "model.init=checkpoint"]
    own = {"function": "own_reward:f", "kind": "host", "weight": 0, "folder": place.folder}
    arguments += [f"reward.custom.{key}={value}" for key, value in own.items()]
    finished = tiny_run.run_processes(place, 2, out, *arguments, command="eval")
    expected = tiny_run.lines(reference, "eval")[-1]
    scores = json.loads((out / "eval.json").read_text())
    assert scores == pytest.approx({name: expected[name] for name in scores}, abs=CLOSE)
    assert (scores["items"], scores["items_failed"]) == (9, 1)
    lines = [json.loads(line) for line in (out / "predictions.jsonl").read_text().splitlines()]
    assert len(lines) == 9
    assert all(x["reward/custom"] == pytest.approx(x["tokens"] / 99) for x in lines)
    assert "wrote" in finished[0].out and "wrote" not in finished[1].out
