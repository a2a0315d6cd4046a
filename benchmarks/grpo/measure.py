"""Measuring one step after another: times, memory, and whether the machine was ours alone."""

from __future__ import annotations

import os
import resource
import time
from pathlib import Path
from typing import Any

_STAT = Path("/proc/stat")


def _busy_seconds() -> float:
    """CPU time that all processes of the machine have used since it started."""
    user, nice, system, _, _, irq, softirq = map(int, _STAT.read_text().split()[1:8])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    times = os.times()
    return times.user + times.system


class Stopwatch:
    """Times the phases of a step; `others` is the share of the CPUs that other processes used."""

    def __init__(self) -> None:
        self._phases: dict[str, float] = {}
        self._begun = self._last = time.perf_counter()
        self._busy, self._own = _busy_seconds(), _own_seconds()

    def phase(self, name: str) -> None:
        """Ends a phase; what it has sent to a device must be done."""
        now = time.perf_counter()
        self._phases[name] = now - self._last
        self._last = now

    def result(self) -> dict[str, Any]:
        """Seconds of each phase and of the whole step, and `others`."""
        whole = self._last - self._begun
        busy = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        others = max(busy, 0.0) / ((os.cpu_count() or 1) * whole)
        return {**self._phases, "step": whole, "others": others}


def peak_rss_gib() -> float:
    """The most memory that this process has had, GiB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
