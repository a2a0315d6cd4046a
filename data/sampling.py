"""The step plan: which items each step takes, a pure function of (seed, step).

All hosts must run the same shapes in the same step, so no host chooses: each computes the plan of
a step from the seed and the step's number alone. Nothing is remembered between steps, so a run
resumes at any step by naming it, and another number of hosts sees the same steps.

An item is a record's number. Items are sorted into buckets (of like token counts) beforehand.
P prompts in a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

import numpy as np

# What a stream of random numbers is for: no two purposes share one.
_ITEMS: Final = 0
_STEPS: Final = 1
_REPLACEMENTS: Final = 2


class PlanError(ValueError):
    """Buckets or a number of prompts that no plan can be made from."""


class PlannedStep(NamedTuple):
    """What a step takes: its bucket and the items[P] of its slots."""

    bucket: int
    items: list[int]


class Plan(Protocol):
    """What the pipeline asks of a plan."""

    prompts: int  # P

    def step(self, step: int) -> PlannedStep: ...

    def replacement(self, step: int, slot: int, attempt: int) -> int: ...


class StepPlan:
    """Shuffled epochs inside each bucket; steps of the buckets in random order.

    Each bucket is an endless sequence of epochs, each a fresh permutation of its items, and a step
    takes the next P of it, so that every item is drawn equally often however P divides the bucket.
    A step that spans two epochs of a bucket of at least 2P - 1 items holds no item twice: the
    second permutation starts with others. In smaller buckets it may, and it must where the bucket
    has fewer than P.

    Epoch e of the whole data is over when every bucket has been through e + 1 of its own epochs.
    Buckets take turns in proportion to their sizes, in a random order that is fresh in each epoch.

    With one bucket of items 0 to 4, P = 2 and seed 0, five steps make two epochs:

        [0, 3] [1, 2] [4, 0] [3, 1] [2, 4]
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[int]],
        prompts: int,
        seed: int,
        spares: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Plans steps of `prompts` items.

        Args:
          buckets: the item numbers of each bucket; a bucket may be empty and is then never drawn.
          prompts: P, items in a step.
          seed: any integer from 0 on.
          spares: per bucket the items of others that replace a bad one when its own are all bad.

        Raises:
          PlanError: no items at all, an item twice, prompts < 1 or a negative seed.
        """
        self.buckets = tuple(tuple(int(item) for item in bucket) for bucket in buckets)
        self.prompts = prompts
        self.seed = seed
        self._spares = spares
        items = [item for bucket in self.buckets for item in bucket]
        if not items:
            raise PlanError(
                "buckets: expected at least one item, found none; is every record too long, or "
                "every video unreadable?"
            )
        if len(set(items)) != len(items):
            twice = next(item for item in items if items.count(item) > 1)
            raise PlanError(f"buckets: expected every item once, found item {twice} again")
        if prompts < 1:
            raise PlanError(f"prompts: expected at least 1, found {prompts}")
        if seed < 0:
            raise PlanError(f"seed: expected at least 0, found {seed}")

    def step(self, step: int) -> PlannedStep:
        """The bucket and the P items of a step, from 0 on."""
        if step < 0:
            raise PlanError(f"step: expected at least 0, found {step}")
        epoch = self.epoch(step)
        order = self._bucket_order(epoch)
        i = step - self.first_step(epoch)
        bucket = int(order[i])
        turn = self._steps_before(bucket, epoch) + int(np.count_nonzero(order[:i] == bucket))
        return PlannedStep(bucket, self._draw(bucket, turn))

    def epoch(self, step: int) -> int:
        """The epoch that a step belongs to, from 0 on."""
        # Epochs differ in length by less than one step a bucket: start near, then walk.
        items = sum(map(len, self.buckets))
        epoch = max(0, (step - len(self.buckets)) * self.prompts // items)
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    def first_step(self, epoch: int) -> int:
        """The step with which an epoch begins; first_step(1) steps see every item once."""
        return sum(self._steps_before(bucket, epoch) for bucket in range(len(self.buckets)))

    def replacement(self, step: int, slot: int, attempt: int) -> int:
        """The item to try in place of a bad one; the same on every host and after every resume.

        Attempts 0, 1, ... go through the bucket's items outside of the step in a random order, each
        once, then through the step's other items, then through the bucket's spares. The slots of a
        step begin at different places of that order, so that two bad items are not replaced by the
        same one.

        Args:
          step: the step.
          slot: the slot whose item is bad, 0 to P - 1.
          attempt: how many replacements have failed in this slot before.

        Raises:
          LookupError: there is no further item.
        """
        bucket, taken = self.step(step)
        # Each slot may come here many times; a bucket may be large.
        others = _replacements(self.seed, step, self.buckets[bucket], tuple(taken))
        if attempt < len(others):
            return int(others[(slot * len(others) // self.prompts + attempt) % len(others)])
        rest = [item for item in dict.fromkeys(taken) if item != taken[slot]]
        attempt -= len(others)
        if attempt < len(rest):
            return rest[(slot + attempt) % len(rest)]
        attempt -= len(rest)
        spares = self._spares[bucket] if self._spares else ()
        if attempt >= len(spares):
            raise LookupError(f"bucket {bucket} has no item left to replace one of step {step}")
        return spares[(step * self.prompts + slot + attempt) % len(spares)]

    def _steps_before(self, bucket: int, epoch: int) -> int:
        """A bucket's steps in the epochs before `epoch`: enough to see each item that often."""
        return -(-epoch * len(self.buckets[bucket]) // self.prompts)

    def _bucket_order(self, epoch: int) -> np.ndarray:
        """The buckets of an epoch's steps, in order, i64[steps]."""
        turns = tuple(
            self._steps_before(bucket, epoch + 1) - self._steps_before(bucket, epoch)
            for bucket in range(len(self.buckets))
        )
        return _shuffled_turns(self.seed, epoch, turns)

    def _draw(self, bucket: int, turn: int) -> list[int]:
        """The items of a bucket's step number `turn`: the next P of its sequence of epochs."""
        items = self.buckets[bucket]
        drawn = []
        for position in range(turn * self.prompts, (turn + 1) * self.prompts):
            epoch, place = divmod(position, len(items))
            order = _item_order(self.seed, bucket, epoch, len(items), self.prompts)
            drawn.append(items[order[place]])
        return drawn


@lru_cache(maxsize=64)
def _shuffled_turns(seed: int, epoch: int, turns: tuple[int, ...]) -> np.ndarray:
    """Each bucket number as often as it has turns, shuffled."""
    buckets = np.repeat(np.arange(len(turns)), turns)
    return buckets[permutation(len(buckets), seed, _STEPS, epoch)]


@lru_cache(maxsize=64)
def _item_order(seed: int, bucket: int, epoch: int, size: int, prompts: int) -> np.ndarray:
    """One epoch's permutation of a bucket's places, i64[size].

    Its first places share a step with the last ones of the epoch before. Where they repeat those,
    they are exchanged with later places that do not; never with the last ones of this epoch, which
    thereby stay those of the plain permutation, so that no epoch depends on the one before that.
    """
    order = permutation(size, seed, _ITEMS, bucket, epoch)
    before = epoch * size % prompts  # places of this epoch's first step that the last one filled
    head = prompts - before
    tail = (epoch + 1) * size % prompts
    if epoch == 0 or before == 0 or size < prompts:
        return order
    previous = permutation(size, seed, _ITEMS, bucket, epoch - 1)[-before:]
    repeated = np.isin(order, previous)
    conflicts = np.flatnonzero(repeated[:head])
    free = head + np.flatnonzero(~repeated[head : size - tail])
    exchanged = min(len(conflicts), len(free))
    here, there = conflicts[:exchanged], free[:exchanged]
    order[here], order[there] = order[there], order[here]
    return order


@lru_cache(maxsize=16)
def _replacements(
    seed: int, step: int, items: tuple[int, ...], taken: tuple[int, ...]
) -> np.ndarray:
    """A bucket's items outside of a step, in random order, i64[items]."""
    others = np.setdiff1d(items, taken)
    return others[permutation(len(others), seed, _REPLACEMENTS, step)]


def permutation(size: int, *key: int) -> np.ndarray:
    """A random order of 0..size-1, i64[size], the same for the same key on every machine.

    Philox's raw numbers are sorted instead of calling `Generator.permutation`, whose results NumPy
    may change between versions.
    """
    bits = np.random.Philox(np.random.SeedSequence(key))
    return np.argsort(bits.random_raw(size), kind="stable")


class OnePass:
    """Every item once, in order, bucket by bucket, for evaluation.

    The last step of a bucket is filled up with its first items again. With one bucket of items
    0..4 and P = 2 the steps are [0, 1] [2, 3] [4, 0].
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[int]],
        prompts: int,
        spares: Sequence[Sequence[int]] | None = None,
    ) -> None:
        """Plans steps of `prompts` items; the buckets hold item numbers and may be empty.

        `spares` are, per bucket, the items of others that may fill a slot in place of a bad one.
        """
        self.prompts = prompts
        self._buckets = buckets
        self._spares = spares
        self._steps = [
            PlannedStep(bucket, [items[i % len(items)] for i in range(first, first + prompts)])
            for bucket, items in enumerate(buckets)
            for first in range(0, len(items), prompts)
        ]

    @property
    def steps(self) -> int:
        """Steps of the whole pass."""
        return len(self._steps)

    def step(self, step: int) -> PlannedStep:
        """The bucket and the P items of a step, from 0 on."""
        return self._steps[step]

    def replacement(self, step: int, slot: int, attempt: int) -> int:
        """What fills the slot of an item that cannot be loaded; it is not to be scored.

        Raises:
          LookupError: every other item of the bucket and its spares failed too.
        """
        bucket, items = self._steps[step]
        others = [item for item in self._buckets[bucket] if item != items[slot]]
        return [*others, *(self._spares[bucket] if self._spares else ())][attempt]
