"""Checkpoints: what a run needs to go on as if it had never stopped, saved with Orbax.

`run_dir/checkpoints/STEP/` holds three items:
  state   a tree of jax arrays (weights, optimiser, steps skipped in a row), bit for bit;
  data    JSON: the state of the data pipeline;
  config  JSON: the command and its configuration.

Writing happens in the background and ends with a rename, so that a process killed while it writes
leaves the previous checkpoints and a temporary folder, which the next start removes. All processes
of a run call the same methods in the same order.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import jax
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from orbax.checkpoint import args
from orbax.checkpoint.checkpoint_managers import LatestN

from jaxgrpo import config as configs
from jaxgrpo.config import Config, ConfigError

Command = Literal["sft", "train"]

CHECKPOINTS = "checkpoints"


class Checkpoints:
    """The checkpoints of one run. Use it as a context manager: leaving waits for the last write."""

    def __init__(self, config: Config, command: Command):
        """Opens `config.run_dir`, removing what an interrupted write left there.

        Args:
          config: saved with every checkpoint; `config.checkpoint.keep` newest ones are kept.
          command: what is running; an sft run is not resumed as a train run.

        Raises:
          ConfigError: the run directory holds a run of the other command, or of a config with
            which this one cannot go on (see `config.check_resume`).
        """
        self._identity = {"command": command, "config": configs.to_dict(config)}
        options = ocp.CheckpointManagerOptions(
            preservation_policy=LatestN(config.checkpoint.keep),
            cleanup_tmp_directories=True,
        )
        # The identity is checked before anything is written or removed.
        saved = read_identity(config.run_dir)
        if jax.process_count() > 1:  # nobody makes the folder before all have looked for it
            multihost_utils.sync_global_devices("run identity")
        if saved is not None:
            check_identity(saved, config, command)
        self._manager = _open(config.run_dir, options)

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(self, step: int, state: Any, data: Mapping[str, Any]) -> None:
        """Starts writing a checkpoint; returns once the arrays have been copied to the host.

        A checkpoint that is still being written is waited for first.

        Args:
          step: updates done, more than at the last save.
          state: a tree of jax arrays.
          data: the state of the data pipeline, JSON values.
        """
        items = args.Composite(
            state=args.StandardSave(state),
            data=args.JsonSave(dict(data)),
            config=args.JsonSave(self._identity),
        )
        if not self._manager.save(step, args=items, force=True):
            raise RuntimeError(f"Orbax refused to save step {step} in {self._manager.directory}")

    def data(self) -> dict[str, Any]:
        """The state of the data pipeline in the newest checkpoint; empty if there is none."""
        if self.latest is None:
            return {}
        found = self._manager.restore(self.latest, args=args.Composite(data=args.JsonRestore()))
        data: dict[str, Any] = found["data"]
        return data

    def restore(self, abstract_state: Any) -> tuple[int, Any, dict[str, Any]]:
        """Reads the newest checkpoint.

        Args:
          abstract_state: a tree like the one saved, of `jax.ShapeDtypeStruct` with the shardings
            that the arrays are to have, on any mesh (see `abstract`).

        Returns:
          The step, the state, and the state of the data pipeline.

        Raises:
          ConfigError: there is no checkpoint.
        """
        step = self.latest
        if step is None:
            raise ConfigError(f"{self._manager.directory} holds no checkpoint")
        items = args.Composite(state=args.StandardRestore(abstract_state), data=args.JsonRestore())
        found = self._manager.restore(step, args=items)
        return step, found["state"], found["data"]

    def close(self) -> None:
        """Waits for the last write and ends."""
        self._manager.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_part(run_dir: str | Path, abstract_part: dict[str, Any]) -> dict[str, Any]:
    """Reads some top-level entries of the state in a run's newest checkpoint, and only those.

    Args:
      abstract_part: for example {"params": ...}, as for `Checkpoints.restore`.

    Raises:
      ConfigError: there is no checkpoint.
    """
    with _open(run_dir, ocp.CheckpointManagerOptions(create=False)) as manager:
        step = manager.latest_step()
        if step is None:
            raise ConfigError(f"{run_dir} holds no checkpoint yet: let the run reach its first one")
        restore_args = ocp.checkpoint_utils.construct_restore_args(abstract_part)
        item = args.PyTreeRestore(abstract_part, restore_args=restore_args, partial_restore=True)
        part: dict[str, Any] = manager.restore(step, args=args.Composite(state=item))["state"]
        return part


def abstract(state: Any) -> Any:
    """The tree of shapes, types and shardings that describes a tree of jax arrays."""
    return jax.tree.map(
        lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding), state
    )


def read_identity(run_dir: str | Path) -> dict[str, Any] | None:
    """`{"command": ..., "config": ...}` of a run's newest checkpoint; None if it has none."""
    if not (Path(run_dir) / CHECKPOINTS).is_dir():
        return None
    with _open(run_dir, ocp.CheckpointManagerOptions(create=False)) as manager:
        step = manager.latest_step()
        if step is None:
            return None
        return manager.restore(step, args=args.Composite(config=args.JsonRestore()))["config"]


def latest_step(run_dir: str | Path) -> int | None:
    """The step of a run's newest checkpoint; None if it has none."""
    with _open(run_dir, ocp.CheckpointManagerOptions(create=False)) as manager:
        step: int | None = manager.latest_step()
        return step


def check_identity(saved: Mapping[str, Any], config: Config, command: Command) -> None:
    """Refuses to go on with a run of another command or config.

    Args:
      saved: as from `read_identity`.

    Raises:
      ConfigError: see `Checkpoints`.
    """
    if saved["command"] != command:
        raise ConfigError(
            f"{config.run_dir} holds a run of `jaxgrpo {saved['command']}`: choose another run_dir "
            f"for `jaxgrpo {command}`"
        )
    configs.check_resume(configs.from_dict(saved["config"], source=config.run_dir), config)


def _open(run_dir: str | Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        (Path(run_dir) / CHECKPOINTS).absolute(),
        options=options,
        item_names=("state", "data", "config"),
    )
