"""A job of several processes, one per host: how they find each other, and how they end.

All take the same decisions: what decides is either computed from the same values everywhere, or
gathered from all (`sharding.gather_objects`). A process that fails or dies ends all of them, in
bounded time, and the same command starts them again.
"""

from __future__ import annotations

import contextlib
import os
import socket
import sys
import threading
from collections.abc import Iterator, Mapping
from typing import Any

import jax

from jaxgrpo.config import Config, ConfigError, diff, from_dict, to_dict
from jaxgrpo.sharding import gather_objects

# Seconds. A pause of a machine (a migration) must not end a job; a lost one should not cost much.
HEARTBEAT_TIMEOUT = 60  # of silence, after which a process counts as lost and the others end
_JOIN_TIMEOUT = 300  # for all processes of a job to start
_LEAVE_TIMEOUT = 10.0  # that a failed process waits for the others to fail as well

# Keys that may differ between the hosts of a job.
_OF_A_HOST = (
    *("data.root", "data.threads", "data.workers", "data.prefetch"),
    "reward.custom.folder",
)
# In the messages of gloo (CPU), NCCL (GPU) and the coordination service.
_SIGNS_OF_LOSS = (
    "closed by peer",
    "reset by peer",
    "Broken pipe",
    "remote process exited",
    "heartbeat",
    "coordination service",
)


def start_processes(config: Config) -> None:
    """Joins the other processes of the job, if the environment says that there are any.

    JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID name them; without the last two
    jax finds them itself on Cloud TPU, GKE (TPU), Slurm and Open MPI 4, and where nothing shows a
    job this process is alone. Call it before anything touches a device.

    From then on a process that dies takes the others with it: they end when the connection to it
    breaks, or at the latest when nothing was heard of it for HEARTBEAT_TIMEOUT. XLA's message names
    it by number.

    Raises:
      ConfigError: the environment shows only a part of a job, or the processes were started with
        different configs.
    """
    if jax.distributed.is_initialized():
        return
    named = named_processes(os.environ)
    if not named and not jax_finds_processes(os.environ):
        return
    # On CPU a program would start before the last one has ended, and their messages get mixed.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    # It would take SIGTERM away from `preemption`, which agrees on the step by itself.
    jax.config.update("jax_enable_preemption_service", False)
    with _giving_up(named):
        jax.distributed.initialize(
            **named,
            initialization_timeout=_JOIN_TIMEOUT + 60,  # jax would abort without saying why
            heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT,
        )
    # XLA knows the processes by these numbers.
    host = socket.gethostname()
    print(f"process {jax.process_index()} of {jax.process_count()} is on {host}", flush=True)
    check_same_config(config)


def named_processes(environment: Mapping[str, str]) -> dict[str, Any]:
    """What `jax.distributed.initialize` is to be told; nothing where it is to look by itself.

    Raises:
      ConfigError: an address without numbers, or Open MPI 5, which jax cannot ask.
    """
    address = environment.get("JAX_COORDINATOR_ADDRESS")
    if address is None:
        ranks = environment.get("OMPI_COMM_WORLD_SIZE", "1")
        if ranks != "1" and "OMPI_MCA_orte_hnp_uri" not in environment:
            raise ConfigError(
                f"this is one of {ranks} processes of an Open MPI newer than 4, of which jax finds "
                "no coordinator: set JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES="
                "$OMPI_COMM_WORLD_SIZE and JAX_PROCESS_ID=$OMPI_COMM_WORLD_RANK in each"
            )
        return {}
    numbers = ("JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
    if jax_finds_processes(environment) and not any(name in environment for name in numbers):
        return {}  # jax reads the address too
    try:
        count, index = (int(environment[name]) for name in numbers)
    except (KeyError, ValueError) as error:
        raise ConfigError(
            "JAX_COORDINATOR_ADDRESS is set, so JAX_NUM_PROCESSES and JAX_PROCESS_ID must be "
            f"numbers too: {error}"
        ) from error
    if not 0 <= index < count or ":" not in address:
        raise ConfigError(
            f"JAX_COORDINATOR_ADDRESS={address} JAX_NUM_PROCESSES={count} JAX_PROCESS_ID={index}: "
            "expected HOST:PORT of process 0, and an id from 0 to one less than the number"
        )
    return {
        "coordinator_address": address,
        "num_processes": count,
        "process_id": index,
        # Under srun jax would give this process one GPU of its host instead of all that it sees.
        "cluster_detection_method": "deactivate",
    }


@contextlib.contextmanager
def _giving_up(named: Mapping[str, Any]) -> Iterator[None]:
    """Ends this process with a message if the others do not come; says how it waits for them."""
    where = "the coordinator that jax finds by itself"
    who = "this process"
    if named:
        where = named["coordinator_address"]
        who = f"process {named['process_id']} of {named['num_processes']}"
    print(f"{who} joins the others at {where}", flush=True)
    advice = (
        "see which processes did not print that they join (and why), whether process 0 runs at "
        "that address, and whether a firewall lets its port through"
    )

    def give_up() -> None:
        waited = f"{who} waited {_JOIN_TIMEOUT} s at {where} and not all others came"
        print(f"error: {waited}: {advice}", file=sys.stderr, flush=True)
        os._exit(1)  # the main thread is deep in jax

    timer = threading.Timer(_JOIN_TIMEOUT, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except RuntimeError as error:  # a port in use, a name that does not resolve
        raise ConfigError(f"{who} cannot join the others at {where}: {error}; {advice}") from error
    finally:
        timer.cancel()


def check_same_config(config: Config) -> None:
    """Checks that all processes were started with the same config. A collective.

    Raises:
      ConfigError: names the first process that differs and the keys.
    """
    first, *others = gather_objects(to_dict(config))
    for process, other in enumerate(others, start=1):
        pair = (from_dict(x, source=f"process {process}") for x in (first, other))
        unlike = [d for d in diff(*pair) if d.key not in _OF_A_HOST]
        if unlike:
            shown = ", ".join(f"{d.key}={d.after!r} (not {d.before!r})" for d in unlike)
            raise ConfigError(
                f"process {process} was started with {shown}: start all processes alike"
            )


def check_same(what: str, value: Any) -> None:
    """Checks that all processes found the same JSON-like value in files. A collective.

    Args:
      what: the beginning of a sentence that the value ends.

    Raises:
      ConfigError: names the first process that found another one than process 0.
    """
    first, *others = gather_objects(value)
    for process, other in enumerate(others, start=1):
        if other != first:
            raise ConfigError(
                f"{what} {first} for process 0 and {other} for process {process}: all hosts must "
                "see the same files; start again when they do, and when nothing writes there"
            )


def end_soon(code: int) -> None:
    """Makes a failed process of several end with `code` within seconds; alone it does nothing.

    As the interpreter ends, jax waits minutes for the other processes. Where all fail alike they
    part in peace at once; where this one failed alone they wait for its part of a computation, and
    end when it has gone.
    """
    if jax.distributed.is_initialized():
        timer = threading.Timer(_LEAVE_TIMEOUT, os._exit, [code])
        timer.daemon = True
        timer.start()


def lost_process(error: BaseException) -> str | None:
    """What to tell the user if `error` says that another process has gone; None if not."""
    text = str(error)
    if not jax.distributed.is_initialized() or not any(sign in text for sign in _SIGNS_OF_LOSS):
        return None
    return (
        f"process {jax.process_index()} of {jax.process_count()} lost another one: "
        f"{text.splitlines()[0]}\nThe log of the one that ended first says why. Start all again "
        "with the same command: a run goes on from its last checkpoint."
    )


def jax_finds_processes(environment: Mapping[str, str]) -> bool:
    """Whether `jax.distributed.initialize()` is to look for other processes by itself.

    It fails where it finds none, so the variables that it looks at must show a job of several.
    """
    # jax sets this one as it is imported where it finds TPU chips.
    if "TPU_ML_PLATFORM" in environment and "tpu" in (environment.get("JAX_PLATFORMS") or "tpu"):
        hosts = environment.get("TPU_PROCESS_ADDRESSES", environment.get("TPU_WORKER_HOSTNAMES"))
        if hosts is None:  # not GKE: jax asks the machine's metadata server, unless told not to
            return "TPU_SKIP_MDS_QUERY" not in environment
        return "," in hosts or int(environment.get("MEGASCALE_NUM_SLICES") or 1) > 1
    if "SLURM_STEP_NODELIST" in environment:  # started by srun, not in the shell that calls it
        return int(environment.get("SLURM_NTASKS", "1")) > 1
    if "OMPI_MCA_orte_hnp_uri" in environment:
        return int(environment.get("OMPI_COMM_WORLD_SIZE", "1")) > 1
    return False
