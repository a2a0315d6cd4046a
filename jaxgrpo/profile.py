"""`profile=steps:10-12`: a `jax.profiler` trace of those steps, in the run's `profile/` folder."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path

import jax

from jaxgrpo.config import profiled_steps


class Profiler:
    """Traces the steps that a config names; process 0 does, of its own devices.

    Attributes:
      folder: where the trace was written; None so far.
    """

    def __init__(self, profile: str, run_folder: Path):
        """
        Args:
          profile: "steps:FIRST-LAST", numbered as in metrics.jsonl, or "" for none.
        """
        self.folder: Path | None = None
        self._steps = profiled_steps(profile) if jax.process_index() == 0 else range(0)
        self._target = run_folder / "profile"
        self._tracing = False
        self._step = ExitStack()

    def begin(self, step: int) -> None:
        """A step begins."""
        if step not in self._steps:
            return
        if not self._tracing:
            jax.profiler.start_trace(self._target)
            self._tracing = True
        self._step.enter_context(jax.profiler.StepTraceAnnotation("train", step_num=step))

    def end(self, step: int, *, last: bool) -> bool:
        """A step has ended, and what it left to the devices is done; whether a trace was written.

        Args:
          last: no other step follows.
        """
        self._step.close()
        if not self._tracing or (step + 1 in self._steps and not last):
            return False
        jax.profiler.stop_trace()
        self._tracing = False
        self.folder = self._target
        return True
