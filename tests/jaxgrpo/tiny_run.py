"""A whole run in seconds: a handful of clips, a small model, and real processes to run it in.

    python -m tests.jaxgrpo.tiny_run --kill checkpoint:4 train tiny.yaml run_dir=...

is `python -m jaxgrpo.cli train tiny.yaml run_dir=...` that is killed with SIGKILL at a chosen
point (`--term`: gets SIGTERM there), and that writes down with `--counts FILE` what was compiled.

What is expensive is made once per test session, by whichever pytest-xdist worker needs it first.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import fcntl
import functools
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import yaml

if TYPE_CHECKING:
    from jaxgrpo.config import Config

ROOT = Path(__file__).resolve().parents[2]
TINY = ROOT / "models" / "tiny"
CUT = "cut.mp4"  # its second half did not arrive
NOTES = "notes.mp4"  # a text file
STEPS = 6  # of the runs that are compared
PREEMPTED = 75  # the exit code after SIGTERM
_PATIENCE = 540  # seconds that a process may take; a busy machine is slow

# The weights of models/tiny are not used, so that these tests do not change with them.
CONFIG: dict[str, Any] = {
    "run_dir": "unset",
    "seed": 3,
    "model": {
        "path": str(TINY),
        "init": "random",
        "compute_dtype": "float32",
        "remat": "none",
        "logit_chunk": 0,
    },
    "data": {
        "min_pixels": 784,
        "max_pixels": 784,
        "thinking": False,
        "buckets": [104],
        "threads": 2,
    },
    "rollout": {"prompts": 4, "group": 2, "max_new_tokens": 30},
    "grpo": {"kl": 0.01, "entropy": 0.001},
    "optim": {"learning_rate": 5e-4, "warmup_steps": 2, "decay": "linear", "weight_decay": 0.01},
    "train": {"steps": STEPS},
    "sft": {"steps": 16, "batch": 6},
    "eval": {"every": 3, "batch": 4},
    "checkpoint": {"every": 2, "keep": 2},
    "log": {"tensorboard": False, "samples": -1},
}


class Workplace(NamedTuple):
    """Where the files of a test session are.

    Attributes:
      folder: for what tests make.
      config: a YAML file; run_dir is given with every run.
      clips: the data root. Manifests: train.jsonl and eval.jsonl, whole clips only;
        mixed.jsonl and mixed_eval.jsonl also ask about CUT, and mixed.jsonl about NOTES.
    """

    folder: Path
    config: Path
    clips: Path


def session_folder(base: Path) -> Path:
    """The folder that all workers share, from `tmp_path_factory.getbasetemp()`."""
    return base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """`folder` as `make` left it; other workers wait for the one that makes it."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    done = folder.with_name(f"{folder.name}.done")
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            make(folder)
            done.touch()
    return folder


@functools.cache
def workplace(base: Path) -> Workplace:
    """The clips and the config of a session."""
    folder = once(session_folder(base) / "tiny", _make_workplace)
    return Workplace(folder, folder / "tiny.yaml", folder / "clips")


def _make_workplace(folder: Path) -> None:
    from data.records import read_manifest, write_manifest
    from data.synthetic import SyntheticSpec, write_dataset
    from tests.data.clips import write_cut

    clips = folder / "clips"
    spec = SyntheticSpec(train_clips=4, eval_clips=3, seconds=(4.0, 5.0), events=(1, 1))
    train, evaluation = (
        read_manifest(path, clips) for path in write_dataset(clips, spec, threads=2)
    )
    write_cut(clips / CUT)
    (clips / NOTES).write_text("not a video\n")
    grounding = next(record for record in train if record.task == "tvg")
    cut = dataclasses.replace(grounding, id="cut", video=CUT, duration=None)
    notes = dataclasses.replace(grounding, id="notes", video=NOTES, duration=None)
    write_manifest(clips / "mixed.jsonl", [*train[:5], cut, notes, *train[5:]])
    write_manifest(clips / "mixed_eval.jsonl", [*evaluation[:4], cut, *evaluation[4:]])
    manifests = {
        "root": str(clips),
        "train": str(clips / "train.jsonl"),
        "eval": str(clips / "eval.jsonl"),
    }
    config = CONFIG | {"data": CONFIG["data"] | manifests}
    (folder / "tiny.yaml").write_text(yaml.safe_dump(config, sort_keys=False))


def mixed(place: Workplace) -> list[str]:
    """Overrides that put the unreadable and the truncated video into the data."""
    return [f"data.{k}={place.clips / v}" for k, v in MIXED.items()]


MIXED = {"train": "mixed.jsonl", "eval": "mixed_eval.jsonl"}


COLD_START = ("optim.learning_rate=5e-3", "optim.decay=constant")


def cold_start(place: Workplace) -> Path:
    """The run directory of a short supervised training: a model that knows the formats."""

    def make(folder: Path) -> None:
        run(place, "sft", folder, *COLD_START)

    return once(place.folder / "cold_start", make)


def reference(place: Workplace) -> Path:
    """The run directory of a GRPO run that nobody killed."""

    def make(folder: Path) -> None:
        finished = run(place, "train", folder, *started(place), *mixed(place))
        (folder / "printed.txt").write_text(finished.out)

    return once(place.folder / "reference", make)


def random_model(place: Workplace) -> Path:
    """A model directory of random weights."""

    def make(folder: Path) -> None:
        import jax

        from jaxgrpo.config import MeshSection
        from jaxgrpo.export import export_params
        from jaxgrpo.sharding import make_mesh, param_shardings
        from models.qwen2_5_vl.config import ModelConfig
        from models.qwen2_5_vl.model import random_params

        config = ModelConfig.load(TINY)
        mesh = make_mesh(MeshSection(), jax.local_devices()[:1])
        params = random_params(config, 0, param_shardings(config, mesh))
        export_params(params, config, TINY, folder, "float32")

    return once(place.folder / "random_model", make)


def load_config(place: Workplace, *overrides: str) -> Config:
    """The config as a command reads it."""
    from jaxgrpo import config

    return config.load(place.config, ["run_dir=unset", *overrides])


def started(place: Workplace) -> list[str]:
    """Overrides with which a run starts from `cold_start`."""
    return [f"model.path={cold_start(place)}", "model.init=checkpoint"]


# ---- processes ----


def remembering(place: Workplace) -> str:
    """An override with which runs in processes of their own share what they compile."""
    return f"compilation_cache={place.folder / 'compiled'}"


def environment(devices: int = 1) -> dict[str, str]:
    """Of a process with so many CPU devices."""
    flags = (
        f"--xla_force_host_platform_device_count={devices}",
        "--xla_backend_optimization_level=0",  # compiling is what takes time here
        "--xla_llvm_disable_expensive_passes=true",
    )
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": " ".join(flags),
        "HF_HUB_OFFLINE": "1",
    }


class Finished(NamedTuple):
    """A process that has ended: its exit code, negative for a signal, and what it printed."""

    code: int
    out: str


def start(
    *arguments: str,
    devices: int = 1,
    module: str = "jaxgrpo.cli",
    env: dict[str, str] | None = None,
) -> subprocess.Popen[str]:
    """Starts a command; stdout and stderr come through one pipe."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments],
        cwd=ROOT,
        env=environment(devices) | (env or {}),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    )


def wait(process: subprocess.Popen[str]) -> Finished:
    """Waits for its end; a process that hangs is killed and fails the test."""
    try:
        out, _ = process.communicate(timeout=_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    return Finished(process.returncode, out)


def run(
    place: Workplace,
    command: str,
    run_dir: Path,
    *overrides: str,
    devices: int = 1,
    kill: str = "",
    term: str = "",
    counts: Path | None = None,
    hangs: str = "",
    code: int | None = None,
) -> Finished:
    """Runs `jaxgrpo COMMAND tiny.yaml run_dir=...` in a process of its own to its end.

    Args:
      kill: a point to be killed at, see `arm`.
      term: a point to get SIGTERM at.
      counts: where to write how often each program was compiled or read from the cache, the number
        of those read, and how often each module fetched something from the device, as
        [{program: times}, read, {module: times}].
      hangs: the name of a video whose decoder hangs.
      code: the exit code expected; by default that of success, of SIGKILL, or of preemption.
    """
    config = [str(place.config), f"run_dir={run_dir}", remembering(place)]
    arguments = [command, *config, *overrides]
    module = "jaxgrpo.cli"
    if kill or term or counts or hangs:
        module = "tests.jaxgrpo.tiny_run"
        options = [f"--kill={kill}", f"--term={term}", f"--counts={counts or ''}"]
        arguments = [*options, f"--hang={hangs}", *arguments]
    finished = wait(start(*arguments, devices=devices, module=module))
    usual = -signal.SIGKILL if kill else PREEMPTED if term else 0
    assert finished.code == (usual if code is None else code), finished.out
    return finished


def free_port() -> int:
    """One on which nothing listens just now."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port: int = free.getsockname()[1]
        return port


def start_processes(
    place: Workplace,
    count: int,
    run_dir: Path,
    *overrides: str,
    command: str = "train",
    devices: int = 1,
    kill: tuple[int, str] = (-1, ""),
    term: tuple[int, str] = (-1, ""),
    options: Callable[[int], Sequence[str]] = lambda index: (),
) -> list[subprocess.Popen[str]]:
    """Starts `jaxgrpo COMMAND` in `count` processes that work as one job.

    Each looks at the run directory half a second later than the one before: they need not keep
    step.

    Args:
      devices: of each process.
      kill, term: a process and a point at which it gets SIGKILL or SIGTERM, see `arm`.
      options: of this module, by process.
    """
    port = free_port()
    return [
        start(
            f"--kill={kill[1] if index == kill[0] else ''}",
            f"--term={term[1] if index == term[0] else ''}",
            f"--late={index / 2}",
            *options(index),
            *(command, str(place.config), f"run_dir={run_dir}", remembering(place), *overrides),
            module="tests.jaxgrpo.tiny_run",
            devices=devices,
            env={
                "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                "JAX_NUM_PROCESSES": str(count),
                "JAX_PROCESS_ID": str(index),
            },
        )
        for index in range(count)
    ]


def run_processes(
    place: Workplace, count: int, run_dir: Path, *overrides: str, **how: Any
) -> list[Finished]:
    """Runs processes (see `start_processes`) to their end, which must be a success."""
    finished = [wait(x) for x in start_processes(place, count, run_dir, *overrides, **how)]
    assert [process.code for process in finished] == [0] * count, [x.out for x in finished]
    return finished


# ---- what a run left ----


def lines(run_dir: Path, split: str | None = None) -> list[dict[str, Any]]:
    """metrics.jsonl, parsed."""
    found = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if split in (None, line["split"])]


def without_times(found: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """The lines without what a clock measured, and what a process compiled, or found in the frame
    store, since its start."""
    timed = ("time/", "throughput/", "compilations", "data/frame_store")
    return [{k: v for k, v in line.items() if not k.startswith(timed)} for line in found]


def state_of(run_dir: Path) -> dict[str, np.ndarray]:
    """Every array of the newest checkpoint: weights, optimiser, counters."""
    import jax
    import orbax.checkpoint as ocp

    steps = [int(path.name) for path in (run_dir / "checkpoints").iterdir() if path.name.isdigit()]
    path = run_dir / "checkpoints" / str(max(steps)) / "state"
    with ocp.PyTreeCheckpointer() as reader:
        shapes = reader.metadata(path.absolute()).item_metadata.tree
        on_host = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), shapes)
        tree = reader.restore(path.absolute(), restore_args=on_host)
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in flat}


def assert_same_bits(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    """Fails unless both hold the same arrays, bit for bit."""
    assert found.keys() == expected.keys()
    different = [k for k in expected if found[k].tobytes() != expected[k].tobytes()]
    assert not different


# ---- the killed process ----


def arm(point: str, number: signal.Signals) -> None:
    """Makes this process send itself a signal at a point of its run.

    Points: "update:N", N updates were done and the last is not yet written down; "line:N", the
    N-th line of metrics.jsonl is half written; "checkpoint:N", the one of step N is being written
    in the background; "evaluation:N", in the middle of this process's N-th evaluation.
    """
    from jaxgrpo import evaluate
    from jaxgrpo.run_dir import RunDir

    name, _, ordinal = point.partition(":")
    count = int(ordinal)

    def die() -> None:
        """By SIGKILL no exit handler runs and no buffer is written."""
        os.kill(os.getpid(), number)

    write, save, summarise = RunDir.write, RunDir.save, evaluate.summarise
    evaluations = collections.Counter[str]()

    def killing_write(self: RunDir, step: int, split: str, metrics: Any) -> None:
        here = split == "train" and step == count
        if here and name == "update":
            die()
        write(self, step, split, metrics)
        if here and name == "line":
            with open(self.path / "metrics.jsonl", "r+b") as file:
                file.truncate(file.seek(0, os.SEEK_END) - 40)
            die()

    def killing_save(self: RunDir, step: int, state: Any, **options: bool) -> None:
        save(self, step, state, **options)
        if name == "checkpoint" and step == count:
            die()

    def killing_summarise(predictions: Sequence[evaluate.Prediction]) -> dict[str, float]:
        evaluations["done"] += 1
        if name == "evaluation" and evaluations["done"] == count:
            die()
        return summarise(predictions)

    RunDir.write, RunDir.save = killing_write, killing_save  # type: ignore[method-assign]
    evaluate.summarise = killing_summarise


def be_late(seconds: float) -> None:
    """Makes this process look at its run directory so much later."""
    from jaxgrpo import checkpoint

    read_identity = checkpoint.read_identity

    def late_read_identity(run_dir: str | Path) -> dict[str, Any] | None:
        time.sleep(seconds)
        return read_identity(run_dir)

    checkpoint.read_identity = late_read_identity


def lie_on_a_torus() -> None:
    """Lays out 4 processes of 2 devices as on a v5p:4x4x4: a host's rows are not neighbours.

    On the mesh 2 x 2 x 2 processes 0 and 1 feed rows 0 and 2, processes 2 and 3 rows 1 and 3.
    """
    from jax.experimental import mesh_utils

    def torus(shape: Sequence[int], devices: Sequence[Any], **_: Any) -> np.ndarray:
        assert tuple(shape) == (2, 2, 2)
        fsdp_tensor_data = np.array(devices).reshape(2, 2, 2)
        return fsdp_tensor_data.transpose(2, 0, 1)

    mesh_utils.create_device_mesh = torus


def see_whole() -> None:
    """Makes this process find a whole video in CUT, as if its host had a better copy."""
    from jaxgrpo import inputs

    decode = inputs.decode

    def seeing_decode(path: Path, *how: Any) -> Any:
        whole = path.with_name("train") / "clip_00001.mp4"
        return decode(whole if path.name == CUT else path, *how)

    inputs.decode = seeing_decode


def hang(name: str) -> None:
    """Makes the decoder hang, whenever it opens the file of this name."""
    from data import video

    open_video = video.open_video

    def hanging_open_video(file: Any) -> Any:
        if Path(str(file)).name == name:
            time.sleep(_PATIENCE)
        return open_video(file)

    video.open_video = hanging_open_video


def count_fetches() -> collections.Counter[str]:
    """Counts the calls of `jax.device_get` by the modules that make them."""
    import jax

    fetches = collections.Counter[str]()
    device_get = jax.device_get

    def counting_device_get(x: Any) -> Any:
        fetches[sys._getframe(1).f_globals["__name__"]] += 1
        return device_get(x)

    jax.device_get = counting_device_get
    return fetches


def main() -> int:
    """See the top of the module."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--kill", default="")
    parser.add_argument("--term", default="")
    parser.add_argument("--counts", default="")
    parser.add_argument("--late", type=float, default=0.0)
    parser.add_argument("--torus", action="store_true")
    parser.add_argument("--sees-whole", action="store_true")
    parser.add_argument("--hang", default="")
    parser.add_argument("rest", nargs=argparse.REMAINDER)
    options = parser.parse_args()
    import jax

    from jaxgrpo import cli, processes
    from jaxgrpo.metrics import CompileCounter

    processes.HEARTBEAT_TIMEOUT = 20  # a test should not take minutes; a busy machine is slow
    if options.kill:
        arm(options.kill, signal.SIGKILL)
    if options.term:
        arm(options.term, signal.SIGTERM)
    if options.late:
        be_late(options.late)
    if options.torus:
        lie_on_a_torus()
    if options.sees_whole:
        see_whole()
    if options.hang:
        hang(options.hang)
    fetches = count_fetches()
    events = collections.Counter[str]()
    jax.monitoring.register_event_listener(lambda event, **_: events.update([event]))
    with CompileCounter() as counter:
        code = cli.main(options.rest)
    if options.counts:
        read = events["/jax/compilation_cache/cache_hits"]
        Path(options.counts).write_text(json.dumps([counter.counts, read, fetches]))
    return code


if __name__ == "__main__":
    sys.exit(main())
