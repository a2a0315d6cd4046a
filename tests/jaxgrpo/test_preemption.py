"""SIGTERM ends a process at once, or lets it save first."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgrpo import preemption

CLONE = Path(preemption.__file__).parents[1]

# A call that neither returns to Python nor holds its lock, as a compilation is.
BUSY = """
import hashlib, sys
from jaxgrpo import preemption
with preemption.watching():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 2**31 - 1)
"""

# Told twice, it still does what it has to, and the third signal comes when it is about to end.
SAVING = """
import os, signal, sys, time
from jaxgrpo import preemption
assert not preemption.told()
with preemption.watching():
    preemption.defer()
    for _ in range(2):
        os.kill(os.getpid(), signal.SIGTERM)
        while not preemption.told():
            time.sleep(0.001)
os.kill(os.getpid(), signal.SIGTERM)
print("saved", flush=True)
"""


def start(code: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", code],
        cwd=CLONE,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_a_process_with_nothing_to_save_ends_in_the_middle_of_a_long_call() -> None:
    process = start(BUSY)
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    told, _ = process.communicate(timeout=30)
    assert process.returncode == preemption.EXIT_CODE == 75
    assert "SIGTERM before the first step" in told


def test_a_process_that_saves_is_not_ended_by_further_signals() -> None:
    process = start(SAVING)
    told, _ = process.communicate(timeout=30)
    assert (process.returncode, told) == (0, "saved\n")


def test_without_a_signal_all_is_as_before() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyError), preemption.watching():
        assert signal.getsignal(signal.SIGTERM) != before
        raise KeyError
    assert signal.getsignal(signal.SIGTERM) == before and not preemption.told()
