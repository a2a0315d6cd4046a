"""Checkpoints: what is saved comes back bit for bit, whatever happened in between."""

from __future__ import annotations

import dataclasses
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrpo.checkpoint import CHECKPOINTS, Checkpoints, abstract, read_identity, read_part
from jaxgrpo.config import (
    CheckpointSection,
    Config,
    ConfigError,
    DataSection,
    ModelSection,
    TrainSection,
    to_dict,
)

CLONE = Path(__file__).parents[2]


def config(run_dir: Path, keep: int = 2) -> Config:
    return Config(
        run_dir=str(run_dir),
        model=ModelSection("models/tiny"),
        data=DataSection(train="train.jsonl"),
        checkpoint=CheckpointSection(keep=keep),
    )


def state(shape: tuple[int, int, int], seed: int = 0) -> dict[str, Any]:
    """A state of every type a run has, laid out on a data x fsdp x tensor mesh of this shape."""
    mesh = jax.make_mesh(shape, ("data", "fsdp", "tensor"))
    everywhere = NamedSharding(mesh, PartitionSpec())
    shardings = {
        "params": {
            "w": NamedSharding(mesh, PartitionSpec("fsdp", "tensor")),
            "b": NamedSharding(mesh, PartitionSpec(("data", "fsdp"))),
        },
        "opt_state": (everywhere, ()),
        "step": everywhere,
        "rng": everywhere,
    }

    weights = np.random.default_rng(seed).normal(size=(16, 8)).astype(np.float32)
    weights[0, :2] = np.inf, -0.0

    def make() -> dict[str, Any]:
        return {
            "params": {"w": jnp.array(weights), "b": jnp.array(weights[:, 1], jnp.bfloat16)},
            "opt_state": (jnp.array(2 * weights), ()),
            "step": jnp.int32(seed),
            "rng": jax.random.key(seed),
        }

    made: dict[str, Any] = jax.jit(make, out_shardings=shardings)()
    return made


def bits(tree: Any) -> list[tuple[str, bytes]]:
    leaves = [
        jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
        for x in jax.tree.leaves(tree)
    ]
    return [(str(x.dtype), np.asarray(x).tobytes()) for x in leaves]


def save_steps(run_dir: Path, *steps: int, keep: int = 2) -> None:
    with Checkpoints(config(run_dir, keep), "train") as checkpoints:
        for step in steps:
            checkpoints.save(step, state((8, 1, 1), step), {"next": step})


def found(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / CHECKPOINTS).iterdir())


def test_a_state_comes_back_bit_for_bit_on_another_mesh(tmp_path: Path) -> None:
    before = state((8, 1, 1), seed=5)
    target = abstract(state((2, 2, 2)))
    with Checkpoints(config(tmp_path), "train") as checkpoints:
        checkpoints.save(5, before, {"next": 5, "failures": {"a": "truncated"}})
    with Checkpoints(config(tmp_path), "train") as checkpoints:
        step, after, data = checkpoints.restore(target)
        assert checkpoints.data() == data
    assert (step, data) == (5, {"next": 5, "failures": {"a": "truncated"}})
    assert bits(after) == bits(before)
    assert jax.tree.map(lambda x: x.sharding, after) == jax.tree.map(lambda x: x.sharding, target)
    drawn, expected = (np.asarray(jax.random.normal(s["rng"], (4,))) for s in (after, before))
    np.testing.assert_array_equal(drawn, expected)


def test_an_array_saved_is_the_array_at_the_call(tmp_path: Path) -> None:
    """Writing goes on in the background while the next update reuses (donates) the buffers."""
    before = state((8, 1, 1), seed=1)
    expected = bits(before["params"])
    update = jax.jit(lambda s: jax.tree.map(lambda x: x * 0, s), donate_argnums=0)
    with Checkpoints(config(tmp_path), "train") as checkpoints:
        checkpoints.save(1, {"params": before["params"]}, {})
        update(before["params"])
    with Checkpoints(config(tmp_path), "train") as checkpoints:
        _, after, _ = checkpoints.restore({"params": abstract(state((8, 1, 1)))["params"]})
    assert bits(after["params"]) == expected


def test_a_part_is_read_alone(tmp_path: Path) -> None:
    save_steps(tmp_path, 3)
    part = read_part(tmp_path, {"params": abstract(state((2, 2, 2)))["params"]})
    assert bits(part) == bits({"params": state((2, 2, 2), 3)["params"]})


def test_the_newest_are_kept(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 7, 9, keep=2)
    assert found(tmp_path) == ["7", "9"]


def test_a_new_run_directory_has_no_checkpoint(tmp_path: Path) -> None:
    with Checkpoints(config(tmp_path / "new"), "train") as checkpoints:
        assert checkpoints.latest is None
        assert checkpoints.data() == {}
        with pytest.raises(ConfigError, match="holds no checkpoint"):
            checkpoints.restore(abstract(state((8, 1, 1))))
    assert read_identity(tmp_path / "new") is None
    assert read_identity(tmp_path / "nowhere") is None
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        read_part(tmp_path / "new", {})


def test_the_identity_of_a_run_is_its_command_and_config(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    assert read_identity(tmp_path) == {"command": "train", "config": to_dict(config(tmp_path))}


def test_a_run_of_another_config_is_refused_and_left_alone(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    other = dataclasses.replace(config(tmp_path), seed=3)
    with pytest.raises(ConfigError, match="seed: saved 0, now 3"):
        Checkpoints(other, "train")
    with pytest.raises(ConfigError, match="a run of `jaxgrpo train`: choose another run_dir"):
        Checkpoints(config(tmp_path), "sft")
    assert found(tmp_path) == ["1"]


def test_a_longer_run_goes_on(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    longer = dataclasses.replace(config(tmp_path), train=TrainSection(steps=900))
    with Checkpoints(longer, "train") as checkpoints:
        assert checkpoints.latest == 1


def test_an_unfinished_checkpoint_is_ignored_and_removed(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    unfinished = tmp_path / CHECKPOINTS / "3.orbax-checkpoint-tmp"
    shutil.copytree(tmp_path / CHECKPOINTS / "2", unfinished)
    (unfinished / "commit_success.txt").unlink(missing_ok=True)
    shutil.rmtree(unfinished / "state")
    with Checkpoints(config(tmp_path), "train") as checkpoints:
        assert checkpoints.latest == 2
        checkpoints.save(3, state((8, 1, 1), 3), {"next": 3})
    with Checkpoints(config(tmp_path), "train") as checkpoints:
        assert checkpoints.restore(abstract(state((8, 1, 1))))[0] == 3
    assert found(tmp_path) == ["2", "3"]


# Saves step after step, the array of step n being full of n, and says when each save is under way.
SAVER = """
import sys
import jax.numpy as jnp
from jaxgrpo.checkpoint import Checkpoints
from jaxgrpo.config import *
config = Config(run_dir=sys.argv[1], model=ModelSection("m"), data=DataSection(train="x"),
                checkpoint=CheckpointSection(keep=1))
with Checkpoints(config, "train") as checkpoints:
    for step in range(1, 1000):
        state = {str(i): jnp.full(2**20, step + i, jnp.float32) for i in range(8)}
        checkpoints.save(step, state, {"next": step})
        print(step, flush=True)
"""


def test_a_process_killed_while_it_saves_leaves_a_whole_checkpoint(tmp_path: Path) -> None:
    """32 MB a step, killed at several moments of a write; only one checkpoint is kept."""
    children = []
    for number in range(4):
        command = [sys.executable, "-c", SAVER, str(tmp_path / str(number))]
        children.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=CLONE))
    for number, child in enumerate(children):
        assert child.stdout is not None
        for line in child.stdout:
            if int(line) == 2 + number:  # the save before is whole, this one under way
                break
        time.sleep(0.017 * number)
        os.kill(child.pid, signal.SIGKILL)
        child.stdout.close()
        child.wait()
    # Else none of them died while it wrote.
    assert any("tmp" in name for number in range(4) for name in found(tmp_path / str(number)))
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    array = jax.ShapeDtypeStruct((2**20,), jnp.float32, sharding=device)
    for number in range(4):
        own = Config(
            run_dir=str(tmp_path / str(number)),
            model=ModelSection("m"),
            data=DataSection(train="x"),
            checkpoint=CheckpointSection(keep=1),
        )
        with Checkpoints(own, "train") as checkpoints:
            step, after, data = checkpoints.restore({str(i): array for i in range(8)})
            assert step >= 1 + number
            assert data == {"next": step}
            for name, values in after.items():
                assert np.all(np.asarray(values) == step + int(name))
            checkpoints.save(step + 1, after, data)
        assert found(Path(own.run_dir)) == [str(step + 1)]  # what was half written is gone


# One of two processes of 4 devices each: saves on 8x1x1 and restores on 2x2x2.
WORKER = """
import sys
from pathlib import Path
import jax
rank, port, run_dir = int(sys.argv[1]), sys.argv[2], Path(sys.argv[3])
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"127.0.0.1:{port}", 2, rank)
from jaxgrpo.checkpoint import Checkpoints, abstract
from tests.jaxgrpo.test_checkpoint import config, state
with Checkpoints(config(run_dir), "train") as checkpoints:
    checkpoints.save(4, state((8, 1, 1), 4), {"next": 4})
with Checkpoints(config(run_dir), "train") as checkpoints:
    step, after, data = checkpoints.restore(abstract(state((2, 2, 2))))
assert (step, data) == (4, {"next": 4})
expected = state((2, 2, 2), 4)
same = jax.jit(lambda a, b: (a == b).all())
for key in "w", "b":
    assert bool(same(after["params"][key], expected["params"][key]))
print("restored", flush=True)
"""


def test_two_processes_save_and_restore_together(tmp_path: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=4",
        "PYTHONPATH": str(CLONE),
    }
    workers = []
    for rank in range(2):
        command = [sys.executable, "-c", WORKER, str(rank), port, str(tmp_path)]
        worker = subprocess.Popen(
            command,
            text=True,
            env=environment,
            cwd=CLONE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        workers.append(worker)
    for worker in workers:
        told, _ = worker.communicate(timeout=120)
        assert "restored" in told, told[-3000:]
    # What two processes saved, one reads.
    with Checkpoints(config(tmp_path), "train") as checkpoints:
        _, after, _ = checkpoints.restore(abstract(state((1, 4, 2))))
    assert bits(after) == bits(state((1, 4, 2), 4))
