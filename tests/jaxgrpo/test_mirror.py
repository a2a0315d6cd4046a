"""A run in a bucket: its checkpoints and text files, against an emulator of Google's storage."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from etils import epath

from jaxgrpo.checkpoint import abstract, latest_step, read_part
from jaxgrpo.config import ConfigError
from jaxgrpo.mirror import Mirror
from jaxgrpo.run_dir import RunDir, is_run, read_config
from jaxgrpo.update import TrainState
from tests.gcs import emulated_bucket
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def bucket() -> Iterator[str]:
    """gs://runs, on this machine."""
    with emulated_bucket("runs") as url:
        yield url


def state(value: float) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState({"w": jnp.full(3, value)}, (zero,), zero)


def test_a_run_in_a_bucket_goes_on_on_another_machine(place: Workplace, bucket: str) -> None:
    config = tiny_run.load_config(place, f"run_dir={bucket}/a", "log.tensorboard=true")
    assert not is_run(config.run_dir)
    with RunDir(config, "train") as run:
        run.keep_to({}, [], {})
        run.write(0, "eval", {"format": 0.25})
        for step in (2, 4):
            run.write(step, "train", {"loss": 1.0 / step})
            run.save(step, state(step))
        run.write(5, "train", {"loss": 9.0})

    assert is_run(config.run_dir) and read_config(config.run_dir) == config
    part = read_part(config.run_dir, {"params": abstract(state(0.0).params)})
    np.testing.assert_array_equal(part["params"]["w"], [4.0, 4.0, 4.0])
    with RunDir(config, "train") as run:
        assert run.first_step == 4
        assert [line["step"] for line in tiny_run.lines(run.path)] == [0, 2, 4]
        np.testing.assert_array_equal(run.restore(abstract(state(0.0))).params["w"], [4, 4, 4])
        run.write(6, "train", {"loss": 0.1})
        run.save(6, state(6.0))
        run.finish()
    left = epath.Path(config.run_dir)
    assert (left / "metrics.jsonl").read_text().count("\n") == 4
    assert {"config.yaml", "curves.png", "tensorboard"} <= {path.name for path in left.iterdir()}
    assert len(list((left / "tensorboard").iterdir())) >= 2  # of both starts

    # Damage is noticed there too, and the checkpoint written anew.
    data = left / "checkpoints" / "6" / "data" / "metadata"
    data.write_bytes(data.read_bytes()[:-1])
    with RunDir(config, "train") as run:
        assert run.first_step == 4
        run.save(6, state(6.0))
    assert latest_step(config.run_dir) == 6
    with pytest.raises(ConfigError, match="holds a run of `jaxgrpo train`"):
        RunDir(config, "sft")


def test_a_folder_of_this_machine_is_its_own_mirror(tmp_path: Path) -> None:
    mirror = Mirror(str(tmp_path / "run"), ("metrics.jsonl",))
    assert mirror.folder == tmp_path / "run"
    mirror.push()
    assert not mirror.folder.exists()


def test_only_what_has_changed_is_copied_again(bucket: str) -> None:
    mirror = Mirror(f"{bucket}/b", ())
    for name in ("one", "folder/two"):
        (mirror.folder / name).parent.mkdir(exist_ok=True)
        (mirror.folder / name).write_text("x")
    mirror.push()
    left = epath.Path(f"{bucket}/b")
    (left / "one").unlink()
    (mirror.folder / "folder/two").write_text("xy")
    mirror.push()
    assert not (left / "one").exists() and (left / "folder/two").read_text() == "xy"
    again = Mirror(f"{bucket}/b", ("one", "folder"))
    assert [path.name for path in again.folder.rglob("*")] == ["folder", "two"]
