"""Batches of prompts: a plan's items loaded ahead by Grain, in threads or worker processes.

What a batch holds depends on the plan, the step and the files alone: not on threads, workers, the
step a run was resumed at, or how many hosts share the step. So the pipeline's whole state is one
integer, the next step.

    with batches(plan, load, collate, start_step=12, num_steps=100, rows=[0, 1]) as steps:
        for batch in steps:
            ...

P prompts in a step, R of them (`rows`) on this host.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import traceback
import weakref
from collections.abc import Callable, Iterator, Sequence
from multiprocessing import resource_tracker
from typing import Any, Final, Generic, NamedTuple, Self, TypeVar

# Grain 0.2.18 imports jax on its own, in worker processes too; nothing here uses it.
import grain
from absl import flags

from data.probe import VideoError
from data.sampling import Plan

Example = TypeVar("Example")
Prompts = TypeVar("Prompts")

# Items tried for one slot before the run stops: where nine files of ten are bad, all of 64 fail in
# one slot of a thousand; where all are (a folder that is not mounted), nobody waits for 100,000.
MOST_ATTEMPTS: Final = 64

_FAILURES_SHOWN: Final = 5
_WORKERS_END_WITHIN: Final = 10.0  # seconds


class LoadError(RuntimeError):
    """`load` failed with something other than a `VideoError`: a mistake, not a bad file.

    Its message names the item and holds the traceback, since a worker process cannot pass on the
    exception itself (some do not survive pickling, and Grain would wait for them for ever).
    """


class NoUsableVideoError(ValueError):
    """A slot for which every item tried was bad; the message names the first of them and why."""


class Failure(NamedTuple):
    """An item that could not be used: its number, and the kind and message of its `VideoError`."""

    item: int
    kind: str
    message: str


class Batch(NamedTuple):
    """This host's rows of one step.

    Attributes:
      step: its number.
      bucket: the plan's bucket, the same on every host.
      items: the items used, R of them, replacements included.
      failures: the items of this host's rows that were replaced; one per attempt.
      prompts: what `collate` returned.
    """

    step: int
    bucket: int
    items: list[int]
    failures: list[Failure]
    prompts: Any


def batches(
    plan: Plan,
    load: Callable[[int], Example],
    collate: Callable[[list[Example], int], Prompts],
    *,
    start_step: int,
    num_steps: int,
    rows: Sequence[int] | None = None,
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 2,
    ids: Sequence[str] | None = None,
) -> Batches:
    """An iterator of the batches of steps start_step, ..., start_step + num_steps - 1.

    A `VideoError` from `load` puts `plan.replacement` in the item's place, again until one loads;
    the batch lists them as failures. Anything else that `load` raises ends the iteration.

    Reading begins with the first batch asked for. Then up to `prefetch` steps of examples are
    loaded ahead, and one more is collated.

    Args:
      plan: which items each step takes.
      load: from an item's number to an example. With workers it is pickled, and so is the example.
      collate: from R examples and their bucket to the batch's prompts; it runs in a thread of this
        process.
      start_step: the first step; the next one of an interrupted run.
      num_steps: how many.
      rows: the slots of each step that this host takes, in this order; None takes all P.
      threads: examples loaded at once in each process; 0 loads them one after the other.
      workers: processes that load; 0 loads in this one. OpenCV and NumPy release the GIL while they
        work, so threads do as well for most purposes, start at once and copy nothing.
      prefetch: steps loaded ahead; 0 loads each batch when it is asked for.
      ids: per item what error messages call it, usually the record's id.

    Raises:
      ValueError: a number below what it may be, rows that are no slots, workers with prefetch 0.
      NoUsableVideoError, LoadError: while iterating.
    """
    numbers = {"start_step": start_step, "num_steps": num_steps, "threads": threads}
    for name, value in (numbers | {"workers": workers, "prefetch": prefetch}).items():
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, found {value}")
    slots = range(plan.prompts) if rows is None else tuple(rows)
    if not slots or not set(slots) <= set(range(plan.prompts)):
        raise ValueError(f"rows: expected some of the {plan.prompts} slots, found {list(slots)}")
    if workers and not prefetch:
        raise ValueError("workers load ahead: expected prefetch of at least 1 with them, found 0")
    source = _Slots(start_step, num_steps, slots)
    dataset = grain.MapDataset.source(source).map(_Load(plan, load, ids))
    examples = _read_ahead(dataset, prefetch * len(slots), threads, workers)
    steps = iter(examples.batch(len(slots), batch_fn=_Assemble(plan, collate)))
    return Batches(_Ahead(steps, workers > 0) if prefetch else steps, start_step, num_steps)


def _read_ahead(
    dataset: grain.MapDataset, examples: int, threads: int, workers: int
) -> grain.IterDataset:
    """Loads up to `examples` elements ahead, in threads or workers, in order.

    Grain's defaults (16 threads, 500 elements) would hold gigabytes of frames.
    """
    if not workers:
        buffer = examples if threads else 0
        options = grain.ReadOptions(min(threads, buffer), buffer)
        return dataset.to_iter_dataset(options)
    # A worker holds elements in its own reader, in its queue, and in the buffer of the thread here
    # that empties the queue; the last two have one size.
    share = max(1, examples // workers)
    readers = min(threads, share)
    ahead = max(1, (share - readers) // 2)
    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()  # Grain reads absl's flags when it starts workers
    return dataset.to_iter_dataset(grain.ReadOptions(readers, readers)).mp_prefetch(
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead),
        worker_init_fn=_end_with_parent,
    )


def _end_with_parent(worker: int, workers: int) -> None:
    """Lets this worker process end when its parent was killed; Grain's would read on for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def watch() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=watch, name="parent", daemon=True).start()


class Batches(Iterator[Batch]):
    """The iterator that `batches` returns; close it, or use it in a with statement.

    The end of the iteration and an error close it too.

    Attributes:
      next_step: the step of the next batch: all there is to save for resuming.
    """

    def __init__(
        self, source: grain.DatasetIterator | _Ahead, start_step: int, num_steps: int
    ) -> None:
        self.next_step = start_step
        self._stop_step = start_step + num_steps
        self._source: grain.DatasetIterator | _Ahead | None = source
        # Also when it is forgotten, or the program ends.
        self._close = weakref.finalize(self, source.close)

    def __next__(self) -> Batch:
        source = self._source
        if source is None or self.next_step == self._stop_step:
            self.close()
            raise StopIteration
        try:
            batch: Batch = next(source)
        except BaseException:
            self.close()
            raise
        self.next_step = batch.step + 1
        return batch

    def close(self) -> None:
        """Stops reading; further batches are not made. Safe to call again, and from any thread.

        Threads end by themselves after the example they are loading; worker processes are given
        10 s to.
        """
        self._close()
        # Grain's iterators complain when they are collected only as the interpreter ends.
        self._source = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class _Ahead:
    """Makes the next batch in a thread, while the caller works with this one.

    Grain has a prefetching thread as well, but closing that one waits for the batch in the making,
    for ever if a decoder hangs, and a caller that waits for a batch meanwhile is not woken.
    """

    def __init__(self, steps: grain.DatasetIterator, workers: bool) -> None:
        self._steps = steps
        self._workers = workers
        self._changed = threading.Condition()
        self._made: Batch | BaseException | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._make, name="collate", daemon=True)

    def __next__(self) -> Batch:
        with self._changed:
            if self._thread.ident is None and not self._closed:
                self._thread.start()
            self._changed.wait_for(lambda: self._closed or self._made is not None)
            made, self._made = self._made, None
            self._changed.notify_all()
        if made is None:
            raise StopIteration  # closed
        if isinstance(made, BaseException):
            raise made
        return made

    def _make(self) -> None:
        if self._workers:
            # Worker processes, which are started from here, inherit this: a SIGTERM to the whole
            # process group, as at a shutdown, leaves them to the last steps before the save.
            resource_tracker.ensure_running()  # starting it later would undo the next line
            signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
        made: Batch | BaseException | None = None
        while not isinstance(made, BaseException):
            with self._changed:
                self._changed.wait_for(lambda: self._closed or self._made is None)
                if self._closed:
                    break
            try:
                made = next(self._steps)
            except BaseException as error:  # noqa: BLE001  StopIteration too: the caller raises it
                made = error
            with self._changed:
                self._made = made
                self._changed.notify_all()
        # In this thread: closed under the feet of one that reads, Grain's iterator over worker
        # processes leaves it waiting for ever.
        self._steps.close()

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._made = None
            self._changed.notify_all()
        if not self._workers:
            self._steps.close()  # else the thread would first load the rest of its batch
        elif self._thread.ident is not None:
            self._thread.join(_WORKERS_END_WITHIN)


class _Slots:
    """Grain's source: element i is this host's (step, slot) number i."""

    def __init__(self, start_step: int, num_steps: int, slots: Sequence[int]) -> None:
        self._start_step = start_step
        self._num_steps = num_steps
        self._slots = slots

    def __len__(self) -> int:
        return self._num_steps * len(self._slots)

    def __getitem__(self, i: int) -> tuple[int, int]:
        step, row = divmod(i, len(self._slots))
        return self._start_step + step, self._slots[row]

    def __repr__(self) -> str:
        return f"_Slots(start_step={self._start_step}, num_steps={self._num_steps})"


class _Loaded(NamedTuple):
    step: int
    item: int
    failures: list[Failure]
    example: Any


class _Load(Generic[Example]):
    """From (step, slot) to an example of the plan's item, or the first replacement that loads."""

    def __init__(
        self, plan: Plan, load: Callable[[int], Example], ids: Sequence[str] | None
    ) -> None:
        self._plan = plan
        self._load = load
        self._ids = ids

    def __call__(self, place: tuple[int, int]) -> _Loaded:
        step, slot = place
        bucket, items = self._plan.step(step)
        item = items[slot]
        failures: list[Failure] = []
        while True:
            try:
                return _Loaded(step, item, failures, self._load(item))
            except VideoError as error:
                failures.append(Failure(item, error.kind, error.message))
            except Exception as error:
                trace = "".join(traceback.format_exception(error))
                raise LoadError(
                    f"loading {self._name(item)} for step {step} failed: "
                    f"{type(error).__name__}: {error}\n{trace}"
                ) from error
            if len(failures) == MOST_ATTEMPTS:
                raise NoUsableVideoError(self._summary(step, slot, bucket, failures))
            try:
                item = self._plan.replacement(step, slot, len(failures) - 1)
            except LookupError:
                raise NoUsableVideoError(self._summary(step, slot, bucket, failures)) from None

    def _name(self, item: int) -> str:
        return f"item {item}" if self._ids is None else f"item {item} (id {self._ids[item]!r})"

    def _summary(self, step: int, slot: int, bucket: int, failures: list[Failure]) -> str:
        left = "" if len(failures) == MOST_ATTEMPTS else ", all that there are"
        first = (
            f"step {step}, slot {slot}: expected a video that can be used, tried {len(failures)} "
            f"items for bucket {bucket}{left}, and found none; mend or remove these records:"
        )
        shown = [f"{self._name(f.item)}: {f.message}" for f in failures[:_FAILURES_SHOWN]]
        hidden = len(failures) - len(shown)
        return "\n".join([first, *shown, *([f"... and {hidden} more"] if hidden else [])])


class _Assemble(Generic[Example, Prompts]):
    """From the R loaded examples of a step to its batch."""

    def __init__(self, plan: Plan, collate: Callable[[list[Example], int], Prompts]) -> None:
        self._plan = plan
        self._collate = collate

    def __call__(self, loaded: Sequence[_Loaded]) -> Batch:
        step = loaded[0].step
        bucket = self._plan.step(step).bucket
        items = [row.item for row in loaded]
        failures = [failure for row in loaded for failure in row.failures]
        try:
            prompts = self._collate([row.example for row in loaded], bucket)
        except Exception as error:
            error.add_note(f"while collating step {step}, bucket {bucket}, items {items}")
            raise
        return Batch(step, bucket, items, failures, prompts)
