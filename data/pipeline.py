"""Batches of prompts: a plan's items loaded ahead by Grain, in threads or worker processes.

What a batch holds depends on the plan, the step and the files alone: not on threads, workers, the
step a run was resumed at, or how many hosts share the step. So the pipeline's whole state is one
integer, the next step.

    with batches(plan, load, collate, start_step=12, num_steps=100, rows=slice(0, 4)) as steps:
        for batch in steps:
            ...

P prompts in a step, R of them (`rows`) on this host.
"""

from __future__ import annotations

import traceback
from collections.abc import Callable, Iterator, Sequence
from types import TracebackType
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
    rows: slice = slice(None),
    threads: int = 2,
    workers: int = 0,
    prefetch: int = 2,
    ids: Sequence[str] | None = None,
) -> Batches:
    """An iterator of the batches of steps start_step, ..., start_step + num_steps - 1.

    A `VideoError` from `load` puts `plan.replacement` in the item's place, again until one loads;
    the batch lists them as failures. Anything else that `load` raises ends the iteration.

    Reading begins with the first batch asked for. Up to `prefetch` steps of examples are loaded
    ahead; beyond them one collated batch waits and another may be in the making.

    Args:
      plan: which items each step takes.
      load: from an item's number to an example. With workers it is pickled, and so is the example.
      collate: from R examples and their bucket to the batch's prompts; it runs in a thread of this
        process.
      start_step: the first step; the next one of an interrupted run.
      num_steps: how many.
      rows: the slots of each step, of all P, that this host takes.
      threads: examples loaded at once in each process; 0 loads them one after the other.
      workers: processes that load; 0 loads in this one. OpenCV and NumPy release the GIL while they
        work, so threads do as well for most purposes, start at once and copy nothing.
      prefetch: steps loaded ahead; 0 loads each batch when it is asked for.
      ids: per item what error messages call it, usually the record's id.

    Raises:
      ValueError: a number below what it may be, rows that select no slot, workers with prefetch 0.
      NoUsableVideoError, LoadError: while iterating.
    """
    numbers = {"start_step": start_step, "num_steps": num_steps, "threads": threads}
    for name, value in (numbers | {"workers": workers, "prefetch": prefetch}).items():
        if value < 0:
            raise ValueError(f"{name}: expected at least 0, found {value}")
    slots = range(plan.prompts)[rows]
    if not slots:
        raise ValueError(f"rows: expected some of the {plan.prompts} slots, found none in {rows}")
    if workers and not prefetch:
        raise ValueError("workers load ahead: expected prefetch of at least 1 with them, found 0")
    source = _Slots(start_step, num_steps, slots)
    dataset = grain.MapDataset.source(source).map(_Load(plan, load, ids))
    examples = _read_ahead(dataset, prefetch * len(slots), threads, workers)
    steps = iter(examples.batch(len(slots), batch_fn=_Assemble(plan, collate)))
    return Batches(steps, start_step, num_steps, background=prefetch > 0, workers=workers > 0)


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
        grain.MultiprocessingOptions(num_workers=workers, per_worker_buffer_size=ahead)
    )


class Batches(Iterator[Batch]):
    """The iterator that `batches` returns; close it, or use it in a with statement.

    Closing stops threads and workers. It waits at most for the examples being loaded, and with
    workers for the batch being made. The end of the iteration and an error close it too.

    Attributes:
      next_step: the step of the next batch: all there is to save for resuming.
    """

    def __init__(
        self,
        steps: grain.DatasetIterator,
        start_step: int,
        num_steps: int,
        *,
        background: bool,
        workers: bool,
    ) -> None:
        self.next_step = start_step
        self._stop_step = start_step + num_steps
        self._workers = workers
        self._steps: grain.DatasetIterator | None = steps
        # Collates the next batch while the caller works with this one.
        self._ahead: grain.DatasetIterator | None = (
            grain.experimental.ThreadPrefetchDatasetIterator(steps, int(background))
        )

    def __next__(self) -> Batch:
        if self._ahead is None or self.next_step == self._stop_step:
            self.close()
            raise StopIteration
        try:
            batch: Batch = next(self._ahead)
        except BaseException:
            self.close()
            raise
        self.next_step = batch.step + 1
        return batch

    def close(self) -> None:
        """Stops reading; further batches are not made. Safe to call again."""
        if self._ahead is None or self._steps is None:
            return
        if not self._workers:
            # Before its user, the collating thread, which would else load the rest of its batch.
            self._steps.close()
        # With workers that thread must have ended before: closed under its feet, Grain's iterator
        # leaves it waiting for ever.
        self._ahead.close()
        # Grain's iterators complain when they are collected only as the interpreter ends.
        self._ahead = self._steps = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


class _Slots:
    """Grain's source: element i is this host's (step, slot) number i."""

    def __init__(self, start_step: int, num_steps: int, slots: range) -> None:
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
    """From (step, slot) to an example of the plan's item, or of the first replacement that loads."""

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
            f"items of bucket {bucket}{left}, and found none; mend or remove these records:"
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
