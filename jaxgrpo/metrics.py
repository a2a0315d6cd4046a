"""What a run writes: metrics, completions, rewards by item, TensorBoard, W&B, progress, curves.

The .jsonl files hold one JSON object a line, appended and flushed at once, so that a killed process
leaves at most one torn line, the last. A line belongs to a `step`: the number of updates done when
it was written (0 before the first). When a run resumes from the checkpoint of step s, the torn line
and the lines of steps after s are cut; so a step's lines must be written before its checkpoint.

JSON has no NaN: null stands for a number that is not defined in a step (the IoU of a batch without
grounding questions) or not finite.
"""

from __future__ import annotations

import collections
import json
import math
import os
import secrets
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from tqdm import tqdm

METRICS = "metrics.jsonl"
COMPLETIONS = "completions.jsonl"
GROUPS = "groups.jsonl"
WANDB_ID = "wandb_id.txt"
TENSORBOARD = "tensorboard"

_COMPILE_EVENT = "/jax/core/compile/backend_compile_duration"


class MetricsError(ValueError):
    """A metrics file that this program did not write, or that was edited."""


class MetricsLog:
    """Appends to the files of a run directory. Only process 0 writes; others do nothing."""

    def __init__(
        self,
        run_dir: str | Path,
        resume_step: int | None = None,
        *,
        tensorboard: bool = True,
        wandb: str = "",
        config: Mapping[str, Any] | None = None,
        owes_evaluation: bool = False,
    ):
        """Makes the files ready to be appended to.

        Args:
          run_dir: made if it does not exist.
          resume_step: the step of the checkpoint that the run goes on from; None is a new run,
            which starts with empty files.
          tensorboard: whether to mirror the numbers to `run_dir/tensorboard`.
          wandb: the Weights & Biases project to mirror them to; empty for none.
          config: what Weights & Biases shows as the run's configuration.
          owes_evaluation: whether the evaluation of `resume_step` will be written (again).

        Raises:
          MetricsError: an existing file is damaged before its last line, or Weights & Biases is not
            installed or refuses.
        """
        self._run_dir = Path(run_dir)
        self._writes = jax.process_index() == 0
        self._board = None
        self._wandb: WandbRun | None = None
        if not self._writes:
            return
        self._run_dir.mkdir(parents=True, exist_ok=True)
        for name in (METRICS, COMPLETIONS, GROUPS):
            _cut(self._run_dir / name, resume_step, owes_evaluation)
        if tensorboard:
            from tensorboardX import SummaryWriter  # not above: it imports torch where there is one

            purge = 0 if resume_step is None else resume_step + 1  # hides what is written again
            self._board = SummaryWriter(str(self._run_dir / TENSORBOARD), purge_step=purge)
        if wandb:
            self._wandb = WandbRun(self._run_dir, wandb, config or {})

    def write(self, step: int, split: str, metrics: Mapping[str, Any]) -> None:
        """Appends one line to metrics.jsonl.

        Args:
          step: updates done.
          split: "train" or "eval".
          metrics: flat names, such as "reward/iou", to numbers or scalar arrays.
        """
        numbers = {name: _number(value) for name, value in metrics.items()}
        self._append(METRICS, {"step": step, "split": split, **numbers})
        if self._board is not None:
            for name, number in numbers.items():
                if number is not None:
                    self._board.add_scalar(f"{split}/{name}", number, step)
        if self._wandb is not None:
            self._wandb.write(step, split, numbers)

    def write_groups(self, step: int, groups: Sequence[Mapping[str, Any]]) -> None:
        """Appends what groups of completions earned, a line each: texts, numbers as in `write`."""
        for group in groups:
            values = {k: v if isinstance(v, str) else _number(v) for k, v in group.items()}
            self._append(GROUPS, {"step": step, **values})

    def write_completions(
        self, step: int, split: str, completions: Sequence[Mapping[str, Any]]
    ) -> None:
        """Appends sampled completions, one line each: texts and records (plain values, finite
        numbers) as they are, numbers as in `write`.
        """
        for completion in completions:
            values = {
                name: value if isinstance(value, (str, dict)) else _number(value)
                for name, value in completion.items()
            }
            self._append(COMPLETIONS, {"step": step, "split": split, **values})

    def close(self, failed: bool = False) -> None:
        """Ends the mirrors, W&B's as a failed or a finished run; the files are always whole."""
        if self._board is not None:
            self._board.close()
            self._board = None
        if self._wandb is not None:
            self._wandb.close(failed)
            self._wandb = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close(failed=error[0] is not None)

    def _append(self, name: str, line: dict[str, Any]) -> None:
        if self._writes:
            text = json.dumps(line, ensure_ascii=False, allow_nan=False)
            with open(self._run_dir / name, "ab") as file:
                # A lone surrogate, which UTF-8 has not, becomes its JSON escape.
                file.write(text.encode("utf-8", "backslashreplace") + b"\n")


class WandbRun:
    """The numbers of a run at Weights & Biases, where a resumed run goes on under its own id.

    W&B numbers its lines by a `step` that must rise. The line of (step, split) gets 2 * step, and
    one more for "eval": so the two of a step are apart, and what a resumed run writes again is
    known to be there and left out. Charts are drawn over the run's own steps.
    """

    def __init__(self, run_dir: Path, project: str, config: Mapping[str, Any]):
        """Starts or goes on with the run whose id is in `run_dir`.

        Raises:
          MetricsError: wandb is not installed, or cannot start (no account, no network).
        """
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise MetricsError(
                f"log.wandb is {project!r}, but wandb is not installed: pip install -e '.[wandb]', "
                "or set log.wandb= to do without"
            ) from error
        file = run_dir / WANDB_ID
        if not file.exists():
            file.write_text(f"{secrets.token_hex(4)}\n", encoding="utf-8")
        try:
            self._run = wandb.init(
                project=project,
                id=file.read_text(encoding="utf-8").strip(),
                name=run_dir.name,
                resume="allow",
                config=dict(config),
            )
        except wandb.Error as error:
            raise MetricsError(
                f"log.wandb is {project!r}, but Weights & Biases cannot start: {error}\nRun `wandb "
                "login`, set WANDB_MODE=offline, or set log.wandb= to do without"
            ) from error
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, split: str, numbers: Mapping[str, float | int | None]) -> None:
        """One line, unless it is there already."""
        number = 2 * step + (split == "eval")
        if number >= self._run.step:
            named = {f"{split}/{name}": x for name, x in numbers.items() if x is not None}
            self._run.log({"step": step, **named}, step=number, commit=True)

    def close(self, failed: bool) -> None:
        """Sends what is left."""
        self._run.finish(exit_code=int(failed))


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl or completions.jsonl; a torn last line is left out.

    Raises:
      MetricsError: another line is not a JSON object with a step.
    """
    return [line for line, _ in each_line(path)]


def each_line(path: str | Path) -> Iterator[tuple[dict[str, Any], bytes]]:
    """The lines of such a file one by one, parsed and as they stand; see `read_metrics`."""
    with open(path, "rb") as file:
        for number, text in enumerate(file, start=1):
            if not text.endswith(b"\n"):  # torn
                return
            try:
                line = json.loads(text)
            except ValueError as error:
                raise MetricsError(
                    f"{path}:{number} is not valid JSON ({error}): remove that line"
                ) from error
            if not isinstance(line, dict) or not isinstance(line.get("step"), int):
                raise MetricsError(f"{path}:{number} has no step: remove that line")
            yield line, text


# The metrics that the progress bar shows when a step has them, and its words for them.
_SHOWN = {
    "loss": "loss",
    "reward/total": "reward",
    "reward/iou": "IoU",
    "kl": "KL",
    "throughput/tokens_per_second": "tokens/s",
}


class Progress:
    """A bar on stderr: steps, a few numbers, time left. Silent on all but process 0."""

    def __init__(self, title: str, steps: int, done: int = 0):
        """Starts at `done` of `steps`."""
        interactive = sys.stderr.isatty()
        self._bar: tqdm[Any] = tqdm(
            total=steps,
            initial=done,
            desc=title,
            unit="step",
            dynamic_ncols=interactive,
            mininterval=0.5 if interactive else 10.0,  # in a log file every refresh is a line
            disable=jax.process_index() != 0,
        )

    def update(self, metrics: Mapping[str, Any]) -> None:
        """One more step is done, with these metrics."""
        numbers = {word: _number(metrics.get(name)) for name, word in _SHOWN.items()}
        shown = {word: f"{number:.3g}" for word, number in numbers.items() if number is not None}
        if "tokens/s" in shown:
            shown["tokens/s"] = f"{numbers['tokens/s']:,.0f}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update()

    def print(self, text: str) -> None:
        """Prints a line above the bar."""
        if not self._bar.disable:
            tqdm.write(text, file=sys.stderr)

    def close(self) -> None:
        """Leaves the bar as it is."""
        self._bar.close()


class Laps:
    """Seconds of a step, by what they were spent on."""

    def __init__(self) -> None:
        self.begun = self._last = time.perf_counter()
        self._seconds: dict[str, float] = collections.defaultdict(float)

    def lap(self, name: str) -> None:
        """What has passed since the last lap was spent on this."""
        now = time.perf_counter()
        self._seconds[name] += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        """By the names of metrics.jsonl, with the whole."""
        return {f"time/{name}": x for name, x in self._seconds.items()} | {
            "time/step": self._last - self.begun
        }


class CompileCounter:
    """Counts the executables that XLA makes (or loads from its cache) while it is open.

    `counts` maps a program's name, "jit(update)" for a jitted function `update`, to how often it
    was compiled; small array operations outside jit are programs too.
    """

    def __init__(self) -> None:
        self.counts: collections.Counter[str] = collections.Counter()

    def __enter__(self) -> Self:
        jax.monitoring.register_event_duration_secs_listener(self._listen)
        return self

    def __exit__(self, *error: object) -> None:
        jax.monitoring.unregister_event_duration_listener(self._listen)

    @property
    def total(self) -> int:
        """All compilations so far."""
        return self.counts.total()

    def _listen(self, event: str, duration_secs: float, **kwargs: str | int) -> None:
        if event == _COMPILE_EVENT:
            self.counts[str(kwargs.get("fun_name", "unnamed"))] += 1


# The panels of the picture: a title, then the metrics drawn in it.
_PANELS: tuple[tuple[str, str, tuple[str, ...]], ...] = (
    (
        "training reward",
        "train",
        (
            *("reward/total", "reward/format", "reward/choice", "reward/iou", "reward/number"),
            *("reward/regression", "reward/ocr", "reward/text", "reward/custom"),
        ),
    ),
    (
        "held-out score",
        "eval",
        (
            *("tvg/mIoU", "tvg/mIoU_constant_span", "mcqa/accuracy", "gqa/acc_at_iou0.5"),
            *("number/accuracy", "regression/score", "ocr/score", "text/rouge", "format"),
        ),
    ),
    ("KL and entropy", "train", ("kl", "entropy")),
    ("completion tokens", "train", ("completion/length",)),
)


def plot_curves(metrics_path: str | Path, out_png: str | Path) -> None:
    """Draws a run's reward, score, KL and length over its steps.

    Raises:
      MetricsError: see `read_metrics`.
    """
    lines = read_metrics(metrics_path)
    figure = Figure(figsize=(11, 7), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, split, names) in zip(figure.subplots(2, 2).flat, _PANELS):
        chosen = [line for line in lines if line["split"] == split]
        for name in names:
            points = [(line["step"], line[name]) for line in chosen if line.get(name) is not None]
            if points:
                steps, values = zip(*points)
                axes.plot(steps, values, label=name, marker="o" if split == "eval" else None)
        axes.set(title=title, xlabel="step")
        axes.grid(alpha=0.3)
        axes.set_visible(bool(axes.lines))
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(out_png, dpi=120)


def _number(value: Any) -> float | int | None:
    """A JSON number, or None for None and for what is not finite; integers stay integers."""
    if value is None:
        return None
    scalar = np.asarray(value).item()
    if isinstance(scalar, (bool, int)):
        return int(scalar)
    return scalar if math.isfinite(scalar) else None


def _cut(path: Path, resume_step: int | None, owes_evaluation: bool) -> None:
    """Drops a torn last line and the lines that a resumed run will write, atomically."""
    if not path.exists():
        return
    again = resume_step if owes_evaluation else None
    temporary = path.with_suffix(".tmp")
    with open(temporary, "wb") as kept:
        if resume_step is not None:
            kept.writelines(
                text
                for line, text in each_line(path)
                if line["step"] <= resume_step
                and (line["step"], line.get("split")) != (again, "eval")
            )
    os.replace(temporary, path)
