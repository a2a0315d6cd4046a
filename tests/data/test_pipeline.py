"""The pipeline: the same batches however they are made, and an end to every error.

Loaders stand at the top of the module, so that worker processes can import them.
"""

from __future__ import annotations

import functools
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest

from data.pipeline import Batch, Failure, LoadError, NoUsableVideoError, batches
from data.sampling import StepPlan
from data.video import Frames, FrameSampling, VideoError, decode
from tests.data import clips

BAD = frozenset({3, 7, 13})
P = 4


class Example(NamedTuple):
    item: int
    pixels: np.ndarray  # large enough to pass between processes in shared memory


def plan_of(seed: int = 0) -> StepPlan:
    return StepPlan([range(12), range(12, 20)], P, seed)


def load(item: int) -> Example:
    time.sleep(item % 3 * 1e-3)  # so that threads finish out of order
    if item in BAD:
        raise VideoError("truncated", f"{item}.mp4: cut")
    return Example(item, np.full((64, 64), item, np.uint8))


def load_no_video(item: int) -> Example:
    raise VideoError("missing", f"{item}.mp4: gone")


class AwkwardError(Exception):
    """One that pickles but cannot be unpickled, so that it never leaves a worker process."""

    def __init__(self, first: str, second: str) -> None:
        super().__init__(first + second)


def load_with_a_mistake(item: int) -> Example:
    if item == 5:
        raise AwkwardError("no", "pe")
    return load(item)


def load_and_die(item: int) -> Example:
    if item == 5:
        os._exit(3)
    return load(item)


def load_video(item: int, *, folder: Path) -> Frames:
    return decode(folder / f"{item}.mp4", FrameSampling())


def collate(examples: list[Example], bucket: int) -> tuple[int, np.ndarray]:
    return bucket, np.stack([example.pixels for example in examples])


def run(
    load: Callable[[int], Example] = load, start_step: int = 0, num_steps: int = 12, **how: Any
) -> list[Batch]:
    with batches(
        plan_of(), load, collate, start_step=start_step, num_steps=num_steps, **how
    ) as steps:
        return list(steps)


def assert_same(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch[:4] for batch in found] == [batch[:4] for batch in expected]
    for a, b in zip(found, expected, strict=True):
        assert a.prompts[0] == b.prompts[0]
        np.testing.assert_array_equal(a.prompts[1], b.prompts[1])


def assert_ended(before: set[threading.Thread]) -> None:
    """Waits until no thread runs that did not run before."""
    deadline = time.monotonic() + 5
    while set(threading.enumerate()) - before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not set(threading.enumerate()) - before


@pytest.fixture(scope="module")
def reference() -> list[Batch]:
    """One after the other in this thread."""
    return run(threads=0, prefetch=0)


def test_a_batch_holds_what_the_plan_says(reference: list[Batch]) -> None:
    plan = plan_of()
    assert [batch.step for batch in reference] == list(range(12))
    for batch in reference:
        bucket, items = plan.step(batch.step)
        assert batch.bucket == batch.prompts[0] == bucket
        bad = [item for item in items if item in BAD]
        assert [item for item in batch.items if item in items] == [i for i in items if i not in BAD]
        assert not set(batch.items) & BAD
        assert set(bad) <= {failure.item for failure in batch.failures}
        assert [int(x) for x in batch.prompts[1][:, 0, 0]] == batch.items
    assert {item for batch in reference for item in batch.items} == set(range(20)) - BAD


def test_a_bad_item_is_reported_and_replaced_from_its_bucket(reference: list[Batch]) -> None:
    plan = plan_of()
    replaced = 0
    for batch in reference:
        _, planned = plan.step(batch.step)
        failures = []
        for slot, item in enumerate(planned):
            attempt = 0
            while item in BAD:
                failures.append(Failure(item, "truncated", f"{item}.mp4: cut"))
                item = plan.replacement(batch.step, slot, attempt)
                attempt += 1
            assert batch.items[slot] == item
            replaced += attempt > 0
        assert batch.failures == failures
    assert replaced >= 3


@pytest.mark.parametrize(
    ("threads", "prefetch"), [(0, 2), (1, 1), (2, 1), (2, 2), (3, 5), (8, 1), (2, 0)]
)
def test_threads_make_the_same_batches(reference: list[Batch], threads: int, prefetch: int) -> None:
    assert_same(run(threads=threads, prefetch=prefetch), reference)


def test_worker_processes_make_the_same_batches(reference: list[Batch]) -> None:
    assert_same(run(threads=1, workers=2, start_step=3, num_steps=6), reference[3:9])


@pytest.mark.parametrize("cut", [0, 1, 5, 11, 12])
def test_a_run_resumed_at_any_step_continues_the_same(reference: list[Batch], cut: int) -> None:
    with batches(plan_of(), load, collate, start_step=0, num_steps=12) as steps:
        before = [next(steps) for _ in range(cut)]
        state = steps.next_step
    assert state == cut
    after = run(start_step=state, num_steps=12 - cut)
    assert_same(before + after, reference)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_the_rows_of_hosts_partition_the_step(reference: list[Batch], hosts: int) -> None:
    share = P // hosts
    parts = [run(rows=range(host * share, (host + 1) * share)) for host in range(hosts)]
    for whole, *rows in zip(reference, *parts, strict=True):
        assert [row.bucket for row in rows] == [whole.bucket] * hosts
        assert [item for row in rows for item in row.items] == whole.items
        assert [failure for row in rows for failure in row.failures] == whole.failures
        np.testing.assert_array_equal(
            np.concatenate([r.prompts[1] for r in rows]), whole.prompts[1]
        )


def test_the_iteration_ends_after_the_last_step_and_stays_ended() -> None:
    steps = batches(plan_of(), load, collate, start_step=0, num_steps=2)
    assert len(list(steps)) == 2
    assert list(steps) == []
    assert run(num_steps=0) == []


@pytest.mark.parametrize("how", [{"threads": 0, "prefetch": 0}, {"threads": 2}])
def test_a_bucket_without_a_usable_video_ends_in_a_clear_error(how: dict[str, int]) -> None:
    with pytest.raises(NoUsableVideoError) as caught:
        run(load_no_video, ids=[f"name-{item}" for item in range(20)], **how)
    message = str(caught.value)
    bucket, items = plan_of().step(0)
    size = len(plan_of().buckets[bucket])
    assert f"step 0, slot 0: expected a video that can be used, tried {size} items" in message
    assert f"item {items[0]} (id 'name-{items[0]}'): {items[0]}.mp4: gone" in message
    assert f"... and {size - 5} more" in message


def test_a_large_bucket_is_given_up_after_a_few_attempts() -> None:
    tried = []

    def count(item: int) -> None:
        tried.append(item)
        raise VideoError("missing", "gone")

    plan = StepPlan([range(10_000)], 1, 0)
    with pytest.raises(NoUsableVideoError, match="tried 64 items"):
        next(batches(plan, count, list, start_step=0, num_steps=1, threads=0, prefetch=0))
    assert len(set(tried)) == len(tried) == 64


@pytest.mark.parametrize("how", [{"threads": 0, "prefetch": 0}, {"threads": 2}])
def test_a_mistake_in_the_loader_ends_the_iteration_and_names_the_record(
    how: dict[str, int],
) -> None:
    with pytest.raises(LoadError, match=r"item 5 \(id 'name-5'\) for step") as caught:
        run(load_with_a_mistake, ids=[f"name-{item}" for item in range(20)], **how)
    assert "AwkwardError: nope" in str(caught.value)
    assert "load_with_a_mistake" in str(caught.value)  # the traceback
    assert isinstance(caught.value.__cause__, AwkwardError)


@pytest.mark.parametrize(
    ("loader", "expected", "message"),
    [
        (load_with_a_mistake, LoadError, "AwkwardError: nope"),
        (load_and_die, RuntimeError, "exit code 3"),
    ],
)
def test_a_worker_that_fails_or_dies_blocks_nobody(
    loader: Callable[[int], Example], expected: type[Exception], message: str
) -> None:
    with pytest.raises(expected, match=message):
        run(loader, threads=1, workers=1)


# Its process group, workers included, is told to end from before they start on; it reads on, and
# then it is killed.
TOLD = """
import os, signal, threading, time
from tests.data.test_pipeline import batches, collate, load, plan_of
signal.signal(signal.SIGTERM, lambda *_: None)

def tell():
    while True:
        os.killpg(0, signal.SIGTERM)
        time.sleep(0.02)

threading.Thread(target=tell, daemon=True).start()
steps = batches(plan_of(), load, collate, start_step=0, num_steps=99, threads=1, workers=1)
print([next(steps).step for _ in range(3)], flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_workers_outlive_sigterm_to_their_group_but_not_their_parent() -> None:
    process = subprocess.Popen(
        [sys.executable, "-c", TOLD],
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        # The pipe is closed by the last process that holds it: the worker.
        told, _ = process.communicate(timeout=120)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    assert (told, process.returncode) == ("[0, 1, 2]\n", -signal.SIGKILL)


def test_a_mistake_in_collate_names_the_step() -> None:
    def fail(examples: list[Example], bucket: int) -> None:
        raise KeyError("length")

    with pytest.raises(KeyError, match="length") as caught:
        next(batches(plan_of(), load, fail, start_step=4, num_steps=2))
    assert any("collating step 4" in note for note in caught.value.__notes__)


def test_reading_ahead_is_bounded_by_prefetch() -> None:
    loaded: list[int] = []

    def record(item: int) -> Example:
        loaded.append(item)
        return Example(item, np.zeros((2, 2), np.uint8))

    with batches(
        plan_of(), record, collate, start_step=0, num_steps=1000, threads=2, prefetch=3
    ) as steps:
        assert loaded == []
        for taken in range(1, 4):
            next(steps)
            deadline, before = time.monotonic() + 0.3, -1
            while time.monotonic() < deadline or before != len(loaded):
                before = len(loaded)
                time.sleep(0.02)
            # The batches taken, one collated, and 3 steps of examples.
            assert len(loaded) == (taken + 1 + 3) * P


def test_closing_early_stops_the_threads() -> None:
    before = set(threading.enumerate())
    steps = batches(plan_of(), load, collate, start_step=0, num_steps=10_000)
    next(steps)
    steps.close()
    steps.close()
    assert list(steps) == []
    assert_ended(before)


def test_closing_does_not_wait_for_the_rest_of_a_batch() -> None:
    started = threading.Event()

    def slow(item: int) -> Example:
        started.set()
        time.sleep(0.2)
        return load(0)

    plan = StepPlan([range(100)], 50, 0)
    steps = batches(plan, slow, collate, start_step=0, num_steps=9, threads=1, prefetch=1)
    found: list[list[Batch]] = []
    reader = threading.Thread(target=lambda: found.append(list(steps)))
    reader.start()
    assert started.wait(5)
    begin = time.monotonic()
    steps.close()
    reader.join(5)
    assert found == [[]]
    assert time.monotonic() - begin < 3  # a whole batch would take 10 s


def test_a_decoder_that_hangs_does_not_hold_up_closing() -> None:
    started, release = threading.Event(), threading.Event()

    def hang(item: int) -> Example:
        started.set()
        release.wait(20)
        return load(0)

    steps = batches(plan_of(), hang, collate, start_step=0, num_steps=9)
    reader = threading.Thread(target=lambda: list(steps))
    reader.start()
    assert started.wait(5)
    steps.close()
    reader.join(5)
    assert not reader.is_alive()
    release.set()


def test_a_forgotten_iterator_stops_its_threads() -> None:
    before = set(threading.enumerate())
    steps = batches(plan_of(), load, collate, start_step=0, num_steps=10_000)
    next(steps)
    del steps
    assert_ended(before)


def test_numbers_that_cannot_be_are_refused() -> None:
    for wrong in ({"threads": -1}, {"prefetch": -1}, {"workers": -1}, {"start_step": -1}):
        with pytest.raises(ValueError, match=f"{next(iter(wrong))}: expected at least 0"):
            run(**wrong)
    with pytest.raises(ValueError, match="rows: expected some of the 4 slots"):
        run(rows=[4, 5])
    with pytest.raises(ValueError, match="prefetch of at least 1"):
        run(workers=2, prefetch=0)


def test_real_videos_walk_through_it(tmp_path: Path) -> None:
    for item in range(6):
        clips.write_mp4v(tmp_path / f"{item}.mp4", 25 + 25 * (item % 2))
    clips.write_cut(tmp_path / "4.mp4")
    plan = StepPlan([range(6)], 3, 0)
    loader = functools.partial(load_video, folder=tmp_path)
    with batches(plan, loader, list_of_shapes, start_step=0, num_steps=4) as steps:
        found = list(steps)
    assert {item for batch in found for item in batch.items} == {0, 1, 2, 3, 5}
    failed = [failure for batch in found for failure in batch.failures]
    assert {(failure.item, failure.kind) for failure in failed} == {(4, "truncated")}
    assert all(shape == (4, 48, 64, 3) for batch in found for shape in batch.prompts)


def list_of_shapes(examples: list[Frames], bucket: int) -> list[tuple[int, ...]]:
    return [example.frames.shape for example in examples]
