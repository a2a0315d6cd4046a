"""Native code is waited for as long as it gets on, and no longer."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable

import pytest

from data.watch import HungError, watched


def test_the_result_and_the_errors_are_those_of_the_work() -> None:
    def fail(sign: Callable[[], None]) -> None:
        raise KeyError("mine")

    for limit in (5.0, math.inf):
        assert watched(limit, lambda sign: 3) == 3
        with pytest.raises(KeyError, match="mine"):
            watched(limit, fail)


def test_work_that_stands_still_is_given_up_and_ends_when_it_wakes() -> None:
    wake, ended = threading.Event(), threading.Event()

    def hang(sign: Callable[[], None]) -> None:
        wake.wait(30)
        try:
            sign()
        except BaseException:
            ended.set()
            raise

    with pytest.raises(HungError, match=r"no progress within 0.2 s"):
        watched(0.2, hang)
    assert not ended.is_set()
    wake.set()
    assert ended.wait(10)


def test_work_may_take_longer_than_the_limit_while_it_gives_signs() -> None:
    def slow(sign: Callable[[], None]) -> str:
        for _ in range(30):
            time.sleep(0.05)
            sign()
        return "done"

    begun = time.monotonic()
    assert watched(1.0, slow) == "done"
    assert time.monotonic() - begun > 1.0


def test_without_a_limit_no_thread_is_started() -> None:
    assert watched(math.inf, lambda sign: threading.current_thread()) is threading.current_thread()
