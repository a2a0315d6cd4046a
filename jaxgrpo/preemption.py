"""SIGTERM: the machine is about to be taken away (spot capacity, maintenance, a batch system).

Before the first step there is nothing to save: the process ends at once, even in the middle of a
compilation. From then on the loop asks `told` at every step, saves, and raises `Preempted`. Both
end the process with EXIT_CODE, which says that the same command goes on with the run.

A signal belongs to the whole process, so its state is this module's.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import threading
from collections.abc import Iterator

EXIT_CODE = 75  # EX_TEMPFAIL of sysexits.h: try again

_told = threading.Event()
_deferred = threading.Event()


class Preempted(Exception):
    """The run was told to end and has saved; the message says what."""


@contextlib.contextmanager
def watching(words: str = "SIGTERM before the first step: nothing new to save") -> Iterator[None]:
    """Handles SIGTERM as the module says. Enter it in the main thread.

    Args:
      words: what is printed where it ends the process at once.

    Afterwards the signal has its former meaning, unless it has come: a process that is ending for
    it is not to be torn down by the next one.
    """
    # Python runs a handler between two lines of the main thread, which may be minutes inside a
    # compilation. The C handler writes to a socket at once, and a thread waits at its other end.
    read, write = socket.socketpair()
    write.setblocking(False)
    former = signal.signal(signal.SIGTERM, lambda *_: None)
    former_socket = signal.set_wakeup_fd(write.fileno(), warn_on_full_buffer=False)
    thread = threading.Thread(target=_watch, args=(read, words), name="SIGTERM", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former_socket)
        write.close()  # ends the thread
        thread.join()
        read.close()
        signal.signal(signal.SIGTERM, signal.SIG_IGN if _told.is_set() else former)
        _told.clear()
        _deferred.clear()


def defer() -> None:
    """From now on SIGTERM ends nothing by itself: the caller asks `told`, and saves."""
    _deferred.set()


def told() -> bool:
    """Whether this process has got SIGTERM; of several, perhaps only one does."""
    return _told.is_set()


def _watch(read: socket.socket, words: str) -> None:
    while received := read.recv(64):  # a byte per signal, of any kind
        if signal.SIGTERM in received:
            if not _deferred.is_set():
                print(f"\n{words}", file=sys.stderr)
                sys.stderr.flush()
                os._exit(EXIT_CODE)
            _told.set()
