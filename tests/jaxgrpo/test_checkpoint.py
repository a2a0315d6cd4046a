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

from jaxgrpo.checkpoint import (
    CHECKPOINTS,
    Checkpoints,
    abstract,
    latest_step,
    read_identity,
    read_part,
)
from jaxgrpo.config import (
    CheckpointSection,
    Config,
    ConfigError,
    DataSection,
    EvalSection,
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


# ---- damage ----


def files_of(step: Path) -> list[Path]:
    return sorted(path for path in step.rglob("*") if path.is_file())


def flip(path: Path) -> None:
    """One bit, in the middle."""
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(data)


def latest(run_dir: Path) -> int | None:
    with Checkpoints(config(run_dir), "train") as checkpoints:
        return checkpoints.latest


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """A run with checkpoints of steps 1 and 2."""
    save_steps(tmp_path / "run", 1, 2)
    return tmp_path / "run"


def test_one_flipped_bit_in_any_file_of_a_checkpoint_is_noticed(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = saved / CHECKPOINTS / "2"
    files = [path for path in files_of(step) if path.stat().st_size]
    assert {"manifest", "_CHECKPOINT_METADATA"} <= {path.name for path in files}
    assert len(files) > 8
    for path in files:
        flip(path)
        assert latest_step(saved) == 1, path
        told = capsys.readouterr().out
        assert f"{step} is damaged and passed over: {path.relative_to(step)}: " in told
        flip(path)
        assert latest_step(saved) == 2
        assert capsys.readouterr().out == ""


def test_a_missing_and_a_shortened_file_are_noticed(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    step = saved / CHECKPOINTS / "2"
    path = max(files_of(step / "state"), key=lambda path: path.stat().st_size)
    data = path.read_bytes()
    path.write_bytes(data[:-1])
    assert latest_step(saved) == 1
    assert f"{len(data) - 1} bytes, {len(data)} when it was written" in capsys.readouterr().out
    path.unlink()
    assert latest_step(saved) == 1
    assert f"{path.relative_to(step)}: missing" in capsys.readouterr().out


def test_the_checkpoint_before_a_damaged_one_is_used(saved: Path) -> None:
    flip(saved / CHECKPOINTS / "2" / "config" / "metadata")
    like = {"params": abstract(state((2, 2, 2)))["params"]}
    assert bits(read_part(saved, like)) == bits({"params": state((2, 2, 2), 1)["params"]})
    with pytest.raises(ConfigError, match="2 is damaged: .*metadata.*; choose another step"):
        read_part(saved, like, step=2)  # asked for by name
    identity = read_identity(saved)
    assert identity is not None and identity["command"] == "train"
    with Checkpoints(config(saved), "train") as checkpoints:
        step, after, data = checkpoints.restore(abstract(state((8, 1, 1))))
        assert (step, data, bits(after)) == (1, {"next": 1}, bits(state((8, 1, 1), 1)))
        checkpoints.save(2, state((8, 1, 1), 2), {"next": 2})  # in its place
    assert latest(saved) == 2
    assert files_of(saved / "damaged-2")


@pytest.mark.parametrize("name", ["config/metadata", "state/manifest.ocdbt", "manifest"])
def test_damaged_checkpoints_only_are_never_a_fresh_start(saved: Path, name: str) -> None:
    for step in ("1", "2"):
        flip(saved / CHECKPOINTS / step / name)
    for read in (latest, latest_step, lambda path: read_part(path, {})):
        with pytest.raises(ConfigError, match="holds damaged checkpoints only") as refusal:
            read(saved)
        assert f"step 1: {name}: " in str(refusal.value)
        assert f"step 2: {name}: " in str(refusal.value)
    assert found(saved) == ["1", "2"]


def test_a_checkpoint_killed_before_its_manifest_is_used_and_that_is_said(
    saved: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (saved / CHECKPOINTS / "2" / "manifest").unlink()
    assert latest(saved) == 2
    assert "2 has no manifest (killed as it was saved?): used unverified" in capsys.readouterr().out


def test_a_large_checkpoint_has_its_sizes_checked_only(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    section = CheckpointSection(hash_gib=1e-6)  # a thousand bytes
    large = dataclasses.replace(config(tmp_path), checkpoint=section)
    with Checkpoints(large, "train") as checkpoints:
        checkpoints.save(1, state((8, 1, 1)), {})
    assert "is above checkpoint.hash_gib=1e-06" in capsys.readouterr().out
    assert latest_step(tmp_path) == 1
    assert "sizes checked, no hashes taken" in capsys.readouterr().out
    path = max(files_of(tmp_path / CHECKPOINTS / "1"), key=lambda path: path.stat().st_size)
    path.write_bytes(path.read_bytes() + b"x")
    with pytest.raises(ConfigError, match=f"{path.name}: .* bytes"):
        latest_step(tmp_path)


# ---- the best ----


def test_the_best_is_kept_beside_the_newest(tmp_path: Path) -> None:
    section = CheckpointSection(keep=1, best="tvg/mIoU")
    best = dataclasses.replace(config(tmp_path), checkpoint=section, eval=EvalSection(every=50))
    scores = {1: 0.2, 2: 0.5, 3: float("nan"), 4: 0.4, 5: None}
    for step, score in scores.items():  # each in a process of its own, as far as it knows
        with Checkpoints(best, "train") as checkpoints:
            known = None if score is None else {"tvg/mIoU": score, "format": 1.0 - step / 10}
            checkpoints.save(step, state((8, 1, 1), step), {}, known)
    assert found(tmp_path) == ["2", "5"]
    with Checkpoints(best, "train") as checkpoints:
        checkpoints.save(6, state((8, 1, 1), 6), {}, {"tvg/mIoU": 0.6})
        checkpoints.save(7, state((8, 1, 1), 7), {}, {"tvg/mIoU": 0.1})
    assert found(tmp_path) == ["6", "7"]
    like = {"params": abstract(state((2, 2, 2)))["params"]}
    kept = bits({"params": state((2, 2, 2), 6)["params"]})
    assert bits(read_part(tmp_path, like, step=6)) == kept
    with pytest.raises(ConfigError, match="holds no checkpoint of step 2: it has kept 6, 7"):
        read_part(tmp_path, like, step=2)
