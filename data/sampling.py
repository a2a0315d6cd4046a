"""The step plan: which items each step takes, a pure function of (seed, step).

All hosts must run the same shapes in the same step, so no host chooses: each computes the plan of
a step from the seed and the step's number alone. Nothing is remembered between steps, so a run
resumes at any step by naming it, and another number of hosts sees the same steps.

An item is a record's number. Items are sorted into buckets (of like token counts) beforehand.
P prompts in a step.

Weights. An item of weight w is drawn w times as often as one of weight 1. They are scaled to a mean
of 1 over all items, so that an epoch has as many draws as there are items: within it, an item of
scaled weight w occurs floor(w) or ceil(w) times. Who occurs once more is drawn anew in each epoch
by systematic sampling (items in random order as lengths w - floor(w) on a line, and a point every
1), so that over the epochs each item's mean is w. With equal weights each occurs exactly once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Final, NamedTuple, Protocol

import numpy as np

# What a stream of random numbers is for: no two purposes share one.
_ITEMS: Final = 0
_STEPS: Final = 1
_REPLACEMENTS: Final = 2
_LENGTHS: Final = 3
_EXTRAS: Final = 4
_POINTS: Final = 5

# Weights are counted in whole numbers of 2^-32, exact on every machine.
_BITS: Final = 32
_ONE: Final = 1 << _BITS


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

    With weights (see the top of the module) an epoch is a permutation with repetitions. The
    repetitions of an item lie evenly over the epoch, and no step holds an item twice unless the
    bucket's epoch is short (about 2P draws or fewer) or an item has almost as many turns as there
    are steps.

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
        weights: Mapping[int, float] | Sequence[float] | None = None,
        run: int = 1,
    ) -> None:
        """Plans steps of `prompts` items.

        Args:
          buckets: the item numbers of each bucket; a bucket may be empty and is then never drawn.
          prompts: P, items in a step.
          seed: any integer from 0 on.
          spares: per bucket the items of others that replace a bad one when its own are all bad.
          weights: of each item, by its number, above 0; None: all alike. Replacements ignore them.
          run: so many steps of a bucket follow each other, where there are as many.

        Raises:
          PlanError: no items at all, an item twice, prompts < 1, a negative seed, or a weight that
            is not above 0 or too small beside the others.
        """
        self.buckets = tuple(tuple(int(item) for item in bucket) for bucket in buckets)
        self.prompts = prompts
        self.seed = seed
        self._run = run
        self._spares = spares
        items = check_plan(self.buckets, prompts, seed)
        units = _in_units(items, weights)
        ends = np.cumsum([len(bucket) for bucket in self.buckets])[:-1]
        self._draws = [
            _Draws(bucket, part, prompts, seed) for bucket, part in enumerate(np.split(units, ends))
        ]

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
        # Epochs differ in length by at most two steps a bucket: start near, then walk.
        draws = sum(bucket.mean for bucket in self._draws)
        epoch = max(0, (step - 2 * len(self.buckets)) * self.prompts * _ONE // draws)
        while self.first_step(epoch + 1) <= step:
            epoch += 1
        return epoch

    def first_step(self, epoch: int) -> int:
        """The step with which an epoch begins; without weights first_step(1) steps see every item
        once."""
        return sum(self._steps_before(bucket, epoch) for bucket in range(len(self.buckets)))

    def replacement(self, step: int, slot: int, attempt: int) -> int:
        """The item to try in place of a bad one; the same on every host and after every resume.

        Args:
          step: the step.
          slot: the slot whose item is bad, 0 to P - 1.
          attempt: how many replacements have failed in this slot before.

        Raises:
          LookupError: there is no further item.
        """
        bucket, taken = self.step(step)
        spares = self._spares[bucket] if self._spares else ()
        return replacement(self.seed, step, taken, self.buckets[bucket], spares, slot, attempt)

    def _steps_before(self, bucket: int, epoch: int) -> int:
        """A bucket's steps in the epochs before `epoch`: enough for all their draws."""
        return -(-self._draws[bucket].before(epoch) // self.prompts)

    def _bucket_order(self, epoch: int) -> np.ndarray:
        """The buckets of an epoch's steps, in order, i64[steps]."""
        turns = tuple(
            self._steps_before(bucket, epoch + 1) - self._steps_before(bucket, epoch)
            for bucket in range(len(self.buckets))
        )
        return shuffled_turns(turns, self._run, self.seed, _STEPS, epoch)

    def _draw(self, bucket: int, turn: int) -> list[int]:
        """The items of a bucket's step number `turn`: the next P of its sequence of epochs."""
        items, draws = self.buckets[bucket], self._draws[bucket]
        drawn = []
        for position in range(turn * self.prompts, (turn + 1) * self.prompts):
            epoch = draws.epoch(position)
            drawn.append(items[_item_order(draws, epoch)[position - draws.before(epoch)]])
        return drawn


class _Draws:
    """One bucket's endless sequence of epochs: how long each is, and how often an item occurs.

    Attributes:
      size: items, which are called by their places from 0 on.
      mean: draws in an epoch, in units of 2^-32; each has that number rounded down or up.
    """

    def __init__(self, bucket: int, units: np.ndarray, prompts: int, seed: int) -> None:
        """`units` are the weights i64[size]."""
        self.size = len(units)
        self.mean = int(units.sum())
        self.prompts = prompts
        self.key = (seed, bucket)
        self._units = units
        self._start = int(raw_numbers(1, seed, _LENGTHS, bucket)[0]) >> _BITS

    def before(self, epoch: int) -> int:
        """Draws in the epochs before `epoch`."""
        return (epoch * self.mean + self._start) >> _BITS

    def epoch(self, draw: int) -> int:
        """The epoch that a draw, counted from 0 on, belongs to."""
        return -(-(((draw + 1) << _BITS) - self._start) // self.mean) - 1

    def counts(self, epoch: int) -> np.ndarray:
        """How often each item occurs in an epoch, i64[size]."""
        seed, bucket = self.key
        whole, part = self._units >> _BITS, self._units & (_ONE - 1)
        if not part.any():
            return whole
        steps, rest = divmod(int(part.sum()), _ONE)
        extra = self.before(epoch + 1) - self.before(epoch) - int(whole.sum())
        # Points first, first + 1, ...: a first point below the rest makes one point more.
        low, high = (0, rest) if extra > steps else (rest, _ONE)
        first = low + int(raw_numbers(1, seed, _POINTS, bucket, epoch)[0]) % (high - low)
        return whole + systematic(part, first, permutation(self.size, seed, _EXTRAS, bucket, epoch))


def _in_units(
    items: Sequence[int], weights: Mapping[int, float] | Sequence[float] | None
) -> np.ndarray:
    """The items' weights, scaled to a mean of 1, in units of 2^-32, i64[items]."""
    given = [1.0 if weights is None else float(weights[item]) for item in items]
    for item, weight in zip(items, given, strict=True):
        if not (math.isfinite(weight) and weight > 0):
            raise PlanError(f"weights: expected more than 0, found {weight} for item {item}")
    total = math.fsum(given)
    units = np.array([round(weight * len(given) / total * _ONE) for weight in given], np.int64)
    if not units.all():
        item = items[int(np.argmin(units))]
        raise PlanError(
            f"weights: item {item} would be drawn less than once in 2^32 epochs: leave it out"
        )
    return units


def check_plan(buckets: Sequence[Sequence[int]], prompts: int, seed: int) -> list[int]:
    """The items of all buckets, in their order.

    Raises:
      PlanError: there are none, an item is there twice, prompts < 1, or a negative seed.
    """
    items = [item for bucket in buckets for item in bucket]
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
    return items


def systematic(part: np.ndarray, first: int, order: np.ndarray) -> np.ndarray:
    """How many of the points first, first + 1, ... fall on each item, i64[items].

    Args:
      part: i64[items], each item's length on a line, in units of 2^-32.
      first: where the points begin, in the same units, 0 to 1.
      order: in which the items lie on the line.
    """
    points = (np.cumsum(part[order]) - first + _ONE - 1) >> _BITS  # below each item's end
    hit = np.empty(len(part), np.int64)
    hit[order] = np.diff(points, prepend=0)
    return hit


@lru_cache(maxsize=64)
def shuffled_turns(turns: tuple[int, ...], run: int, *key: int) -> np.ndarray:
    """Each bucket number as often as it has turns, in shuffled runs of `run`, i64[sum of turns].

    Example: turns (5, 2) in runs of 2 are [0, 0] [0, 0] [0] [1, 1] in some order.
    """
    runs = [
        [bucket] * min(run, count - begun)
        for bucket, count in enumerate(turns)
        for begun in range(0, count, run)
    ]
    order = permutation(len(runs), *key)
    return np.array([bucket for number in order for bucket in runs[number]], np.int64)


@lru_cache(maxsize=64)
def _item_order(draws: _Draws, epoch: int) -> np.ndarray:
    """One epoch of a bucket's places in the order of their draws.

    Its first places share a step with the last ones of the epoch before. Where they repeat those,
    they are exchanged with later places that do not; never with the last ones of this epoch, which
    thereby stay those of `_own_order`, so that no epoch depends on the one before that.
    """
    order = _own_order(draws, epoch).copy()
    size, prompts, begin = len(order), draws.prompts, draws.before(epoch)
    before = begin % prompts  # places of this epoch's first step that the last one filled
    head = prompts - before
    tail = (begin + size) % prompts
    if epoch == 0 or before == 0 or size < prompts:
        return order
    previous = _own_order(draws, epoch - 1)[-before:]
    steps = (before + np.arange(size)) // prompts
    for here in np.flatnonzero(np.isin(order[:head], previous)):
        middle = slice(head, size - tail)
        mine = np.concatenate([previous, order[:head]])
        theirs = np.isin(steps[middle], steps[order == order[here]])  # steps that hold it already
        free = head + np.flatnonzero(~np.isin(order[middle], mine) & ~theirs)
        if len(free):
            order[[here, free[0]]] = order[[free[0], here]]
    return order


@lru_cache(maxsize=64)
def _own_order(draws: _Draws, epoch: int) -> np.ndarray:
    """One epoch of a bucket's places, without a look at the epoch before.

    An item that occurs c times has its place of the permutation divided by c, and again 1/c, 2/c,
    ... of an epoch later.
    """
    seed, bucket = draws.key
    first = draws.before(epoch) % draws.prompts
    return spread(draws.counts(epoch), first, draws.prompts, seed, _ITEMS, bucket, epoch)


def spread(counts: np.ndarray, first: int, prompts: int, *key: int) -> np.ndarray:
    """Places 0, 1, ... in random order, each as often as `counts` i64[places] says, evenly.

    Args:
      first: how many draws of the first step others have taken already.
      prompts: draws of a step, in which a place is repeated only if it must be.
    """
    places = np.repeat(np.arange(len(counts)), counts)
    times = counts[places].astype(np.uint64)
    again = np.arange(len(places)) - np.repeat(np.cumsum(counts) - counts, counts)
    period = np.uint64(2**64 - 1) // times
    raw = raw_numbers(len(counts), *key)[places]
    order = places[np.argsort(raw // times + again.astype(np.uint64) * period, kind="stable")]
    if len(order) > prompts and counts.max() > 1:
        _part_repeats(order, (first + np.arange(len(order))) // prompts)
    return order


def _part_repeats(order: np.ndarray, steps: np.ndarray) -> None:
    """Exchanges places of `order`, in place, so that no step holds an item twice if possible.

    Each place that repeats an item of its step is exchanged with the nearest one whose step lacks
    that item, and whose own item its step lacks.

    Args:
      order: items[draws].
      steps: the step of each draw, rising.
    """
    by_step = np.lexsort((order, steps))  # stable: the first of equal ones comes first
    same = (np.diff(order[by_step]) == 0) & (np.diff(steps[by_step]) == 0)
    everywhere: set[int] = set()  # items that no step lacks
    for place in np.sort(by_step[1:][same]):
        item, mine = order[place], order[steps == steps[place]]
        if item in everywhere or np.count_nonzero(mine == item) < 2:
            continue
        holds = np.isin(steps, steps[order == item])
        if holds.all():
            everywhere.add(int(item))
            continue
        free = np.flatnonzero(~holds & ~np.isin(order, mine))
        if len(free):
            other = free[np.argmin(np.abs(free - place))]
            order[[place, other]] = order[[other, place]]


def replacement(
    seed: int,
    step: int,
    taken: Sequence[int],
    bucket: tuple[int, ...],
    spares: Sequence[int],
    slot: int,
    attempt: int,
) -> int:
    """The item to try in place of a bad one.

    Attempts 0, 1, ... go through the bucket's items outside of the step in a random order, each
    once, then through the step's other items, then through the bucket's spares. The slots of a step
    begin at different places of that order, so that two bad items are not replaced by the same one.

    Args:
      taken: the step's items.
      bucket, spares: see `StepPlan`.
      slot, attempt: see `StepPlan.replacement`.

    Raises:
      LookupError: there is no further item.
    """
    prompts = len(taken)
    # Each slot may come here many times; a bucket may be large.
    others = _replacements(seed, step, bucket, tuple(taken))
    if attempt < len(others):
        return int(others[(slot * len(others) // prompts + attempt) % len(others)])
    rest = [item for item in dict.fromkeys(taken) if item != taken[slot]]
    attempt -= len(others)
    if attempt < len(rest):
        return rest[(slot + attempt) % len(rest)]
    attempt -= len(rest)
    if attempt >= len(spares):
        raise LookupError(f"its bucket has no item left to replace one of step {step}")
    return spares[(step * prompts + slot + attempt) % len(spares)]


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
    return np.argsort(raw_numbers(size, *key), kind="stable")


def raw_numbers(size: int, *key: int) -> np.ndarray:
    """Philox's raw numbers, u64[size], the same for the same key on every machine."""
    return np.random.Philox(np.random.SeedSequence(key)).random_raw(size)


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
