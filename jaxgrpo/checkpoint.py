"""Checkpoints: what a run needs to go on as if it had never stopped, saved with Orbax.

`run_dir/checkpoints/STEP/` holds
  state     a tree of jax arrays (weights, optimiser, steps skipped in a row), bit for bit;
  data      JSON: the state of the data pipeline;
  config    JSON: the command and its configuration;
  metrics   JSON: the score that `checkpoint.best` names, if it does;
  manifest  the sizes and hashes of all files, see `manifest`.

Writing happens in the background and ends with a rename (in a bucket: a last file), so that a
process killed while it writes leaves the previous checkpoints and a temporary folder, which the
next start removes. The manifest is written after that, in the background too; a checkpoint whose
process was killed in between is used as it is, and that is said. A damaged checkpoint is named and
the one before is used.

All processes of a run call the same functions in the same order; only `read_identity` is free.
"""

from __future__ import annotations

import math
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import jax
import orbax.checkpoint as ocp
from etils import epath
from jax.experimental import multihost_utils
from orbax.checkpoint import args
from orbax.checkpoint.checkpoint_managers import AnyPreservationPolicy, BestN, LatestN

from data.storage import is_url
from jaxgrpo import config as configs
from jaxgrpo import manifest
from jaxgrpo.config import CheckpointSection, Config, ConfigError
from jaxgrpo.sharding import gather_objects, say

Command = Literal["sft", "train"]

CHECKPOINTS = "checkpoints"
_COMMITTED = "commit_success.txt"  # in a bucket, what makes a folder a checkpoint


class Checkpoints:
    """The checkpoints of one run. Use it as a context manager: leaving waits for the last write."""

    def __init__(self, config: Config, command: Command):
        """Opens `config.run_dir`, removing what an interrupted write left there.

        Checkpoints after the newest sound one are moved to `run_dir/damaged-STEP`, or deleted if
        that is in a bucket.

        Args:
          config: saved with every checkpoint; `config.checkpoint` says which ones are kept.
          command: what is running; an sft run is not resumed as a train run.

        Raises:
          ConfigError: the run directory holds a run of the other command, or of a config with
            which this one cannot go on (see `config.check_resume`), or damaged checkpoints only.
        """
        self._identity = {"command": command, "config": configs.to_dict(config)}
        self._section = config.checkpoint
        self._folder = _folder(config.run_dir)
        self._closing = threading.Event()
        self._manifest: threading.Thread | None = None
        # The identity is checked before anything is written or removed.
        saved = read_identity(config.run_dir)
        if jax.process_count() > 1:  # nobody makes the folder before all have looked for it
            multihost_utils.sync_global_devices("run identity")
        if saved is not None:
            check_identity(saved, config, command)
        _set_aside(self._folder, latest_step(config.run_dir))
        self._manager = _open(config.run_dir, _options(config.checkpoint))

    @property
    def latest(self) -> int | None:
        """The step of the newest whole checkpoint, or None."""
        return self._manager.latest_step()

    def save(
        self,
        step: int,
        state: Any,
        data: Mapping[str, Any],
        scores: Mapping[str, float] | None = None,
    ) -> None:
        """Starts writing a checkpoint; returns once the arrays have been copied to the host.

        A checkpoint that is still being written, or its manifest, is waited for first.

        Args:
          step: updates done, more than at the last save.
          state: a tree of jax arrays.
          data: the state of the data pipeline, JSON values.
          scores: the evaluation of this step, if there was one; for `checkpoint.best`.
        """
        if self._manifest is not None:
            self._manifest.join()  # saving removes old checkpoints
        best = self._section.best
        score = (scores or {}).get(best or "", math.nan)
        items = args.Composite(
            state=args.StandardSave(state),
            data=args.JsonSave(dict(data)),
            config=args.JsonSave(self._identity),
        )
        metrics = {best: score} if best and math.isfinite(score) else {}
        if not self._manager.save(step, args=items, metrics=metrics, force=True):
            raise RuntimeError(f"Orbax refused to save step {step} in {self._folder}")
        if jax.process_index() == 0:
            thread = threading.Thread(target=self._write_manifest, args=(step,), daemon=True)
            self._manifest = thread
            thread.start()

    def _write_manifest(self, step: int) -> None:
        """Waits for the checkpoint and hashes it; runs in a thread."""
        folder = self._folder / str(step)
        while not _is_committed(folder):
            closing = self._closing.wait(1.0 if is_url(folder) else 0.02)
            if closing and not _is_committed(folder):
                return  # writing it failed, which `close` raises
        limit = self._section.hash_gib
        try:
            hashed = manifest.write(folder, limit * 2**30)
        except OSError as error:
            print(f"{folder} gets no manifest: {error}", file=sys.stderr)
            return
        if not hashed:
            say(f"{folder} is above checkpoint.hash_gib={limit}: its manifest has no hashes")

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
            raise ConfigError(f"{self._folder} holds no checkpoint")
        items = args.Composite(state=args.StandardRestore(abstract_state), data=args.JsonRestore())
        found = self._manager.restore(step, args=items)
        return step, found["state"], found["data"]

    def close(self) -> None:
        """Waits for the last write and its manifest, and ends."""
        try:
            self._manager.close()
        finally:
            self._closing.set()
            if self._manifest is not None:
                self._manifest.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_part(
    run_dir: str | Path, abstract_part: dict[str, Any], step: int | None = None
) -> dict[str, Any]:
    """Reads some top-level entries of the state in a run's checkpoint, and only those.

    Args:
      abstract_part: for example {"params": ...}, as for `Checkpoints.restore`.
      step: of the checkpoint; None is the newest that is not damaged.

    Raises:
      ConfigError: there is no checkpoint, or none that is not damaged; see `check_step`.
    """
    if step is not None:
        check_step(run_dir, step)
    elif (step := latest_step(run_dir)) is None:
        raise ConfigError(f"{run_dir} holds no checkpoint yet: let the run reach its first one")
    with _open(run_dir, ocp.CheckpointManagerOptions(create=False)) as manager:
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
    """`{"command": ..., "config": ...}` of a run's newest checkpoint; None if it has none.

    A checkpoint is passed over if that part of it is damaged; the rest is not looked at.

    Raises:
      ConfigError: that part is damaged in all of them.
    """
    damage: dict[int, list[str]] = {}
    for step in reversed(_steps(run_dir)):
        damage[step] = manifest.check(_folder(run_dir) / str(step), below="config/").damage
        if not damage[step]:
            with _open(run_dir, ocp.CheckpointManagerOptions(create=False)) as manager:
                read = args.Composite(config=args.JsonRestore())
                return manager.restore(step, args=read)["config"]
    if damage:
        raise ConfigError(_all_damaged(run_dir, damage))
    return None


def latest_step(run_dir: str | Path) -> int | None:
    """The step of a run's newest checkpoint that is not damaged; None if it has none at all.

    Each process checks its share of the files.

    Raises:
      ConfigError: all are damaged.
    """
    damage: dict[int, list[str]] = {}
    for step in reversed(gather_objects(_steps(run_dir))[0]):
        folder = _folder(run_dir) / str(step)
        damage[step] = _damage(folder)
        if not damage[step]:
            return step
        say(f"{folder} is damaged and passed over: {'; '.join(damage[step])}")
    if damage:
        raise ConfigError(_all_damaged(run_dir, damage))
    return None


def check_step(run_dir: str | Path, step: int) -> None:
    """Makes sure that a run has kept the checkpoint of a step.

    Raises:
      ConfigError: it has not, and which it has; or that one is damaged.
    """
    kept = gather_objects(_steps(run_dir))[0]
    if step not in kept:
        raise ConfigError(
            f"{run_dir} holds no checkpoint of step {step}: it has kept "
            f"{', '.join(map(str, kept)) or 'none'}"
        )
    folder = _folder(run_dir) / str(step)
    if damage := _damage(folder):
        raise ConfigError(f"{folder} is damaged: {'; '.join(damage)}; choose another step")


def _damage(folder: epath.Path) -> list[str]:
    """What is wrong with a checkpoint. Each process checks its share of the files."""
    share = (jax.process_index(), jax.process_count())
    verdicts = [manifest.Verdict(*x) for x in gather_objects(manifest.check(folder, "", share))]
    lines = [line for verdict in verdicts for line in verdict.damage]
    if not lines and not verdicts[0].manifest:
        say(f"{folder} has no manifest (killed as it was saved?): used unverified")
    elif not lines and not verdicts[0].hashed:
        say(f"{folder}: sizes checked, no hashes taken (checkpoint.hash_gib)")
    return list(dict.fromkeys(lines))  # all read the manifest


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


def _all_damaged(run_dir: str | Path, damage: Mapping[int, list[str]]) -> str:
    lines = [f"  step {step}: {'; '.join(found)}" for step, found in damage.items()]
    return (
        f"{run_dir} holds damaged checkpoints only:\n" + "\n".join(lines) + "\nPut one back from a "
        "copy, or choose another run_dir to start anew."
    )


def _options(section: CheckpointSection) -> ocp.CheckpointManagerOptions:
    latest = LatestN(section.keep)
    if section.best is None:
        return ocp.CheckpointManagerOptions(
            preservation_policy=latest, cleanup_tmp_directories=True
        )

    def score(metrics: Mapping[str, float]) -> float:
        return metrics.get(str(section.best), -math.inf)

    best = BestN(get_metric_fn=score, n=1, keep_checkpoints_without_metrics=False)
    return ocp.CheckpointManagerOptions(
        preservation_policy=AnyPreservationPolicy([latest, best]),
        best_fn=score,  # without it the scores are not saved
        cleanup_tmp_directories=True,
    )


def _folder(run_dir: str | Path) -> epath.Path:
    path = epath.Path(run_dir) / CHECKPOINTS
    return path if is_url(path) else path.absolute()


def _steps(run_dir: str | Path) -> list[int]:
    """The steps of a run's whole checkpoints, rising."""
    folder = _folder(run_dir)
    if not folder.is_dir():
        return []
    names = [path.name for path in folder.iterdir() if path.name.isdigit()]
    return sorted(int(name) for name in names if _is_committed(folder / name))


def _is_committed(folder: epath.Path) -> bool:
    return (folder / _COMMITTED).exists() if is_url(folder) else folder.is_dir()


def _set_aside(folder: epath.Path, newest: int | None) -> None:
    """Moves the checkpoints after `newest`, which are damaged, out of the way of new ones.

    A bucket cannot rename a folder: there they are deleted.
    """
    if newest is None:
        return
    damaged = [step for step in _steps(folder.parent) if step > newest]
    for step in damaged if jax.process_index() == 0 else ():
        target = folder.parent / f"damaged-{step}"
        if is_url(folder):
            (folder / str(step)).rmtree()
            say(f"{folder / str(step)} was deleted")
            continue
        if target.exists():
            target.rmtree()
        (folder / str(step)).rename(target)
        say(f"{folder / str(step)} was moved to {target}")
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("damaged checkpoints")


def _open(run_dir: str | Path, options: ocp.CheckpointManagerOptions) -> ocp.CheckpointManager:
    return ocp.CheckpointManager(
        _folder(run_dir), options=options, item_names=("state", "data", "config")
    )
