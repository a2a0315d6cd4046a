"""A limit on how long native code may go without progress.

A decoder that hangs (in a bug, or on a disk that does not answer) cannot be told to stop: Python
cannot end a thread, and a process that waits for a disk ignores even SIGKILL. So the work runs in
a thread of its own, which is left behind when it makes no progress. If it wakes up later, it ends
at its next sign of life; if it does not, it goes with the process.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from typing import Final, Generic, TypeVar

T = TypeVar("T")

# Looks within the limit. A machine that was suspended loses one of them, not its patience.
_LOOKS: Final = 10


class HungError(Exception):
    """No progress for too long."""


class _Left(BaseException):
    """Ends a thread that nobody waits for any more."""


class _Work(threading.Thread, Generic[T]):
    """A thread that works and counts its signs of life."""

    def __init__(self, work: Callable[[Callable[[], None]], T]) -> None:
        super().__init__(name="watched", daemon=True)
        self._work = work
        self.signs = 0
        self.left = False
        self.ended = threading.Event()
        self.result: T
        self.error: BaseException | None = None

    def run(self) -> None:
        try:
            self.result = self._work(self._sign)
        except BaseException as error:  # noqa: BLE001  the one who waits raises it
            self.error = error
        self.ended.set()

    def _sign(self) -> None:
        if self.left:
            raise _Left
        self.signs += 1


def watched(limit: float, work: Callable[[Callable[[], None]], T]) -> T:
    """Calls `work(sign)` and returns its result; `sign()` says that it gets on.

    Args:
      limit: seconds without a sign after which it is given up; infinity: never.

    Raises:
      HungError: it was given up. Anything that `work` raises.
    """
    if limit == math.inf:
        return work(lambda: None)
    thread = _Work(work)
    thread.start()
    quiet = 0
    while quiet < _LOOKS:
        before = thread.signs
        if thread.ended.wait(limit / _LOOKS):
            if thread.error is not None:
                raise thread.error
            return thread.result
        quiet = quiet + 1 if thread.signs == before else 0
    thread.left = True
    raise HungError(f"no progress within {limit:g} s")
