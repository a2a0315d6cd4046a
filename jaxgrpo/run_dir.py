"""The run directory: one run's checkpoints, metrics, samples and pictures.

checkpoints/STEP   weights, optimiser, data state, config
metrics.jsonl      a line per training step and per evaluation
completions.jsonl  sampled completions with their rewards
groups.jsonl       what each group of completions earned: the history of every item
tensorboard/       the same numbers for TensorBoard
wandb_id.txt       the run's id at Weights & Biases, with log.wandb
config.yaml        the whole config, defaults included
curves.png         written at the end

It may be in a bucket (gs://bucket/runs/1): checkpoints go there, the other files by `mirror`.
"""

from __future__ import annotations

import secrets
import time
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import jax

from data.pipeline import Batch
from data.probe import GIVEN_UP
from data.records import TASKS, Record, write_atomically
from data.storage import is_folder, is_url, join
from jaxgrpo import config as configs
from jaxgrpo import preemption
from jaxgrpo.checkpoint import (
    CHECKPOINTS,
    Checkpoints,
    Command,
    check_identity,
    read_identity,
)
from jaxgrpo.config import Config
from jaxgrpo.metrics import (
    COMPLETIONS,
    GROUPS,
    METRICS,
    TENSORBOARD,
    WANDB_ID,
    MetricsLog,
    plot_curves,
    read_metrics,
)
from jaxgrpo.mirror import Mirror
from jaxgrpo.processes import check_same
from jaxgrpo.sharding import gather_objects, say
from jaxgrpo.update import TrainState

CONFIG = "config.yaml"
CURVES = "curves.png"

_SEEN_WITHIN = 60.0  # seconds; a network disk may remember for a while that there was no file


class Noted(NamedTuple):
    """What all processes know of a batch, by its rows and items."""

    items: list[int]  # of the whole batch
    failed: list[int]  # items that were replaced because their videos cannot be used
    lines: list[str]  # for the user: what failed for the first time


class RunDir:
    """One run's files, opened fresh or for going on from the newest checkpoint.

    Attributes:
      first_step: updates already done; 0 for a new run.
      next_batch: the first batch of the data that they did not take.
      online: the state of `data.online.ItemValues` after them; None: a new run, or none is kept.
      excluded: what was left out when the run began, and why; see `inputs.Inputs`.
      failures: item id -> kind and message of its video's failure later, over the whole run.
      owes_evaluation: whether the evaluation after `first_step` updates is still to be made.
      stopping: whether a process of the run has got SIGTERM; the same on all of them.
    """

    def __init__(self, config: Config, command: Command):
        """Opens `config.run_dir`.

        Raises:
          ConfigError: it holds another run (see `checkpoint.Checkpoints`), with or without a
            checkpoint, or one that has gone further than this config asks.
        """
        self._run_dir = config.run_dir
        names = (METRICS, COMPLETIONS, GROUPS, CONFIG, TENSORBOARD, WANDB_ID)
        self._mirror = Mirror(config.run_dir, names)
        self.path = self._mirror.folder
        if is_url(config.run_dir):
            say(f"writing to {self.path}, copied to {config.run_dir} at every checkpoint")
        else:
            _check_shared(self.path)
        _check_begun(self.path, config, command)
        self._checkpoints = Checkpoints(config, command)
        self.first_step = self._checkpoints.latest or 0
        check_same(f"the newest checkpoint in {config.run_dir} is of step", self.first_step)
        steps = config.train.steps if command == "train" else config.sft.steps
        if self.first_step > steps:
            self._checkpoints.close()
            raise configs.ConfigError(
                f"{config.run_dir} is already at step {self.first_step}, past {command}.steps="
                f"{steps}: raise {command}.steps, or choose another run_dir"
            )
        saved = self._checkpoints.data()
        self.excluded: dict[str, str] = saved.get("excluded", {})
        self.failures: dict[str, str] = saved.get("failures", {})
        self.next_batch: int = saved.get("next_batch", self.first_step)
        self.online: dict[str, Any] | None = saved.get("online")
        self._plan: dict[str, Any] | None = saved.get("plan")
        self.stopping = False
        self._best = config.checkpoint.best
        self._scores: dict[int, Mapping[str, Any]] = {}  # of the last evaluation, by its step
        self.owes_evaluation: bool = saved.get("owes_evaluation", not saved and command == "train")
        self._log = MetricsLog(
            self.path,
            self._checkpoints.latest,
            tensorboard=config.log.tensorboard,
            wandb=config.log.wandb,
            config=configs.to_dict(config),
            owes_evaluation=self.owes_evaluation,
        )
        if jax.process_index() == 0:
            text = f"# jaxgrpo {command}\n{configs.to_yaml(config)}"
            write_atomically(self.path / CONFIG, text)

    def keep_to(
        self, plan: Mapping[str, Any], base: Sequence[int | None], excluded: Mapping[str, str]
    ) -> None:
        """Remembers what the steps depend on besides the config; a resumed run keeps to it.

        Args:
          plan: of the training data, see `inputs.Dataset.plan`.
          base: the steps of the checkpoints behind model.path that are read whenever the run
            starts, see `load.weight_steps`.
          excluded: as the attribute.

        Raises:
          ConfigError: the run began with another plan; names what changed.
        """
        now = {f"data.train, {name}": value for name, value in plan.items()}
        now["model.path, steps of its checkpoints"] = list(base)
        before = now if self._plan is None else self._plan
        changed = [
            f"  {name}: {before.get(name)} then, {value} now"
            for name, value in now.items()
            if value != before.get(name)
        ]
        if changed:
            changed += [
                f"  cannot be read now: {reason}"
                for name, reason in excluded.items()
                if name.startswith("data.train/") and name not in self.excluded
            ]
            raise configs.ConfigError(
                f"{self._run_dir} began with other data or weights than there are now:\n"
                + "\n".join(changed)
                + "\nTo go on with that run put them back; to start another choose a new run_dir."
            )
        self._plan, self.excluded = now, dict(excluded)

    def restore(self, shapes: TrainState) -> TrainState:
        """The newest checkpoint's state.

        Args:
          shapes: `jax.ShapeDtypeStruct`s with the shardings that the arrays are to have.
        """
        _, found, _ = self._checkpoints.restore(shapes._asdict())
        return TrainState(**found)

    def save(
        self,
        step: int,
        state: TrainState,
        *,
        owes_evaluation: bool = False,
        next_batch: int | None = None,
        online: dict[str, Any] | None = None,
    ) -> None:
        """Saves what is needed to go on after `step` updates.

        Args:
          owes_evaluation: whether the run that goes on is first to evaluate this step.
          next_batch, online: as the attributes; None: every update took one batch, nothing.
        """
        data = {
            "excluded": self.excluded,
            "failures": self.failures,
            "plan": self._plan,
            "owes_evaluation": owes_evaluation,
            "next_batch": step if next_batch is None else next_batch,
            "online": online,
        }
        self._push()
        self._checkpoints.save(step, state._asdict(), data, self._scores.get(step))

    def stop(self, step: int) -> NoReturn:
        """Ends a run that was told to, when the checkpoint of `step`, the last, is whole."""
        self.close()
        raise preemption.Preempted(
            f"SIGTERM: saved step {step} in {self._run_dir}; the same command goes on from there"
        )

    def check_best(self, tasks: Collection[str]) -> None:
        """Makes sure that an evaluation of questions of these tasks has `checkpoint.best`.

        Raises:
          ConfigError: it has not.
        """
        task, _, _ = (self._best or "").partition("/")
        if task in TASKS and task not in tasks:
            raise configs.ConfigError(
                f"checkpoint.best is {self._best!r}, but the evaluation asks {task} questions "
                f"nowhere: choose a score of {', '.join(sorted(tasks))}, format or reward/total"
            )

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """A line of metrics.jsonl."""
        if split == "eval":
            self._scores = {step: metrics}
        self._log.write(step, split, metrics)

    def write_completions(
        self, step: int, split: str, completions: Sequence[Mapping[str, Any]]
    ) -> None:
        """Lines of completions.jsonl."""
        self._log.write_completions(step, split, completions)

    def write_groups(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Lines of groups.jsonl."""
        self._log.write_groups(step, groups)

    def scores(self, step: int) -> dict[str, float]:
        """The evaluation written down for a step, on process 0; empty elsewhere or without one."""
        path = self.path / METRICS
        if jax.process_index() or not path.exists():
            return {}
        lines = read_metrics(path)
        found = [line for line in lines if (line["step"], line["split"]) == (step, "eval")]
        return {name: x for line in found for name, x in line.items() if isinstance(x, float)}

    def note(self, batch: Batch, rows: Sequence[int], records: Sequence[Record]) -> Noted:
        """What the processes have to tell each other of a batch; remembers the videos that failed.

        They also tell of SIGTERM, see `stopping`.

        Args:
          rows: those of this process; processes with the same rows have the same items.
        """
        failures = [(f.item, f"{f.kind}: {f.message}") for f in batch.failures]
        told = gather_objects([preemption.told(), list(rows), batch.items, failures])
        items: dict[int, int] = {}
        failed: dict[int, str] = {}
        for stopping, theirs, their_items, their_failures in told:
            self.stopping |= stopping
            items |= zip(theirs, their_items, strict=True)
            failed = dict(their_failures) | failed
        new = {
            records[item].id: reason
            for item, reason in failed.items()
            if records[item].id not in self.failures
        }
        self.failures |= new
        lines = [f"replaced {name}: {reason}" for name, reason in new.items()]
        return Noted([items[row] for row in sorted(items)], sorted(failed), lines)

    def bad_videos(self) -> str:
        """The items whose videos could not be used, by kind; empty where all could."""
        left_out = {
            key.partition("/")[2]: reason.removeprefix(f"{key.partition('/')[2]}: ")
            for key, reason in self.excluded.items()
        }
        kinds: dict[str, list[str]] = {}
        for name, reason in sorted((left_out | self.failures).items()):
            kinds.setdefault(reason.partition(":")[0], []).append(name)
        if not kinds:
            return ""
        count = sum(map(len, kinds.values()))
        lines = [f"{count} items had videos that could not be used:"]
        return "\n".join(
            [*lines, *(f"  {kind}: {', '.join(kinds[kind])}" for kind in sorted(kinds))]
        )

    def given_up(self, records: Sequence[Record]) -> dict[int, tuple[str, str]]:
        """Item -> kind and message of the videos whose decoder hung; see `feed.Feed`."""
        reasons = ((i, self.failures.get(record.id, "")) for i, record in enumerate(records))
        return {
            item: (GIVEN_UP, reason.removeprefix(f"{GIVEN_UP}: "))
            for item, reason in reasons
            if reason.startswith(f"{GIVEN_UP}: ")
        }

    def finish(self) -> None:
        """Waits for the last checkpoint and draws the curves."""
        self.close()
        if jax.process_index() == 0:
            plot_curves(self.path / METRICS, self.path / CURVES)
            self._push()

    def close(self) -> None:
        """Waits for the checkpoint being written and closes the files."""
        self._close(failed=False)

    def _push(self) -> None:
        if jax.process_index() == 0:
            self._mirror.push()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._close(failed=error[0] is not None)

    def _close(self, failed: bool) -> None:
        try:
            self._checkpoints.close()
        finally:
            self._log.close(failed)
            self._push()


def _check_shared(path: Path) -> None:
    """Refuses a folder that is not one and the same for all processes. A collective."""
    if jax.process_count() == 1:
        return
    mark = path / gather_objects(f".seen_by_all_{secrets.token_hex(8)}")[0]
    if jax.process_index() == 0:
        path.mkdir(parents=True, exist_ok=True)
        mark.write_text("Written to see that all hosts share this folder; may be deleted.\n")
    gather_objects("written")
    deadline = time.monotonic() + _SEEN_WITHIN
    while not (seen := mark.exists()) and time.monotonic() < deadline:
        time.sleep(0.5)
    found = gather_objects(seen)
    if jax.process_index() == 0:
        mark.unlink()
    if not all(found):
        raise configs.ConfigError(
            f"process {found.index(False)} does not find in {path} what process 0 has written "
            "there: run_dir must be one folder that all hosts share"
        )


def _check_begun(path: Path, config: Config, command: Command) -> None:
    """Refuses another run where one has written scores but no checkpoint yet.

    `path` is where this process reads the run's files.
    A folder without scores has nothing to lose: a start that failed at once left it.
    """
    metrics, written = path / METRICS, path / CONFIG
    begun = metrics.exists() and metrics.stat().st_size and written.exists()
    if not begun or read_identity(config.run_dir) is not None:
        return
    title = written.read_text(encoding="utf-8").partition("\n")[0]
    saved = configs.to_dict(configs.load(written))
    check_identity({"command": title.split()[-1], "config": saved}, config, command)


def is_run(path: str | Path) -> bool:
    """Whether a folder is a run directory (and not a model directory).

    Raises:
      StorageError: a bucket that cannot be read.
    """
    if is_url(path):  # epath knows fewer schemes, and takes a bucket out of reach for an empty one
        return is_folder(join(str(path), CHECKPOINTS))
    return (Path(path) / CHECKPOINTS).is_dir()


def read_config(run_dir: str | Path) -> Config:
    """The config of a run's newest checkpoint.

    Raises:
      ConfigError: it has none yet.
    """
    identity = read_identity(run_dir)
    if identity is None:
        raise configs.ConfigError(
            f"{run_dir} holds no checkpoint yet: let the run reach its first one"
        )
    return configs.from_dict(identity["config"], source=str(run_dir))
