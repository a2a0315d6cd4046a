"""Online sampling: items are drawn by how much their groups' rewards disagree, as training sees it.

Training tells the deviation of each group's rewards; an item's value is a running mean of its own.
Steps come in rounds. A round's weights are those of the values known one round before it begins,
so that loading a little ahead does not wait for them, and the plan is a pure function of (seed,
step, those values): the same for any number of threads, workers and hosts, and after every resume.
Who loads further ahead, as many workers do for few rows each, waits.

Weights. Within a stratum (the questions of one manifest and task) an item of value v has the weight
`floor + (1 - floor) * min(v / mean v, most)`, times what the manifest and the task give it. An item
not seen yet counts for as much as the best that was (optimism), one whose video failed for nothing.
The floor lets none starve. Strata keep the shares of draws that manifests and tasks give them.
Example: values 3, 1, 0, 0 and a floor of 0.2 give weights 2.6, 1, 0.2, 0.2: of 100 draws 65, 25, 5
and 5.

Draws. In a round of R steps of P prompts a bucket has n steps, in proportion to its items' weights,
and an item of weight w has n P w / sum of w draws, rounded down or up, by systematic sampling (see
`sampling`): the mean over rounds is exact.
"""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from data.npy import load_array
from data.sampling import (
    PlannedStep,
    check_plan,
    permutation,
    raw_numbers,
    replacement,
    shuffled_turns,
    spread,
    systematic,
)

# What a stream of random numbers is for; `sampling` has others, and keys of other lengths.
_BUCKETS: Final = 100
_BUCKET_POINT: Final = 101
_TURNS: Final = 102
_COUNTS: Final = 103
_COUNT_POINT: Final = 104
_ORDER: Final = 105

_POLL: Final = 0.01  # seconds
_ONE: Final = 1 << 32  # weights are counted in units of 2^-32 draws, exact on every machine


class Rules(NamedTuple):
    """How values become weights; see the top of the module.

    Attributes:
      round: R, steps drawn with the same weights.
      memory: how much of an item's value its newest group is, above 0 to 1.
      floor: the share of draws that does not depend on values, above 0 to 1.
      most: the largest value that counts, in means of its stratum; at least 1.
    """

    round: int
    memory: float
    floor: float
    most: float


def draw_weights(
    values: Sequence[float | None],
    base: Sequence[float],
    strata: Sequence[int],
    rules: Rules,
) -> list[float]:
    """How often each item is to be drawn, relative to the others.

    The same to the last bit on every machine: sums are exact.

    Args:
      values: of each item; None: not seen yet.
      base: what manifest and task give it, above 0.
      strata: which stratum it belongs to.
    """
    weights = [0.0] * len(values)
    for stratum in sorted(set(strata)):
        items = [i for i, other in enumerate(strata) if other == stratum]
        seen = [v for v in (values[i] for i in items) if v is not None]
        best = max(seen, default=0.0) or 1.0
        known = [best if (v := values[i]) is None else v for i in items]
        total = math.fsum(base[i] for i in items)
        mean = math.fsum(base[i] * v for i, v in zip(items, known, strict=True)) / total
        for i, value in zip(items, known, strict=True):
            relative = min(value / mean, rules.most) if mean > 0 else 1.0
            weights[i] = base[i] * (rules.floor + (1 - rules.floor) * relative)
        scale = total / math.fsum(weights[i] for i in items)  # what `most` cut goes to all
        for i in items:
            weights[i] *= scale
    return weights


class OnlinePlan:
    """A plan (`sampling.Plan`) whose steps follow weights that are published round by round.

    It is pickled into worker processes, so weights travel as files in a folder of this machine.
    """

    def __init__(
        self,
        buckets: Sequence[Sequence[int]],
        prompts: int,
        seed: int,
        folder: Path,
        *,
        round_steps: int,
        spares: Sequence[Sequence[int]] | None = None,
        run: int = 1,
    ) -> None:
        """Plans steps of `prompts` items.

        Args:
          buckets, prompts, seed, spares, run: see `sampling.StepPlan`.
          folder: an empty one, for the weights; when it goes, nobody waits for any.
          round_steps: R, steps of a round.

        Raises:
          PlanError: see `sampling.StepPlan`.
        """
        self.buckets = tuple(tuple(int(item) for item in bucket) for bucket in buckets)
        self.prompts = prompts
        self.seed = seed
        self.round_steps = round_steps
        self.run = run
        self._folder = folder
        self._spares = spares
        check_plan(self.buckets, prompts, seed)

    def publish(self, number: int, weights: Sequence[float]) -> None:
        """Makes a round's weights known, by item number, here and in worker processes."""
        scratch = self._folder / f".{number}.npy"
        np.save(scratch, np.asarray(weights, np.float64), allow_pickle=False)
        scratch.rename(self._folder / f"{number}.npy")
        (self._folder / f"{number - 3}.npy").unlink(missing_ok=True)

    def weights(self, number: int) -> np.ndarray:
        """A round's weights f64[items]; waits until they are published.

        Training never waits for itself: it asks for the first step of a round when it has told all
        but the last step of the round before, and the weights were published a round earlier.

        Raises:
          RuntimeError: training has ended, and with it the folder.
        """
        path = self._folder / f"{number}.npy"
        while not path.exists():
            if not self._folder.exists():
                raise RuntimeError(f"training ended before the weights of round {number} came")
            time.sleep(_POLL)
        return load_array(path)

    def step(self, step: int) -> PlannedStep:
        """The bucket and the P items of a step, from 0 on; see `weights`, which may wait."""
        number, i = divmod(step, self.round_steps)
        return _planned(self, number)[i]

    def replacement(self, step: int, slot: int, attempt: int) -> int:
        """The item to try in place of a bad one, see `sampling.replacement`."""
        bucket, taken = self.step(step)
        spares = self._spares[bucket] if self._spares else ()
        return replacement(self.seed, step, taken, self.buckets[bucket], spares, slot, attempt)


@lru_cache(maxsize=4)
def _planned(plan: OnlinePlan, number: int) -> list[PlannedStep]:
    """The steps of a round."""
    key = (plan.seed, number)
    weights = plan.weights(number)
    of_bucket = [math.fsum(weights[list(bucket)]) for bucket in plan.buckets]
    turns = _counts(of_bucket, plan.round_steps, _BUCKETS, _BUCKET_POINT, key)
    draws = [
        _drawn(plan, bucket, int(count) * plan.prompts, weights, key)
        for bucket, count in enumerate(turns)
    ]
    steps = []
    given = [0] * len(plan.buckets)
    for bucket in shuffled_turns(tuple(turns.tolist()), plan.run, *key, _TURNS):
        first = given[bucket]
        given[bucket] += plan.prompts
        steps.append(PlannedStep(int(bucket), draws[bucket][first : given[bucket]]))
    return steps


def _drawn(
    plan: OnlinePlan, bucket: int, draws: int, weights: np.ndarray, key: tuple[int, int]
) -> list[int]:
    """A bucket's items of a round, in the order of their draws."""
    items = plan.buckets[bucket]
    if not draws:
        return []
    of_bucket = (*key, bucket)
    counts = _counts(weights[list(items)].tolist(), draws, _COUNTS, _COUNT_POINT, of_bucket)
    order = spread(counts, 0, plan.prompts, *of_bucket, _ORDER)
    return [items[place] for place in order]


def _counts(
    weights: Sequence[float], draws: int, order: int, point: int, key: tuple[int, ...]
) -> np.ndarray:
    """How many of `draws` each weight gets: its share, rounded down or up at random, i64[weights].

    The numbers sum to `draws`, and each one's mean is its share.
    """
    total = math.fsum(weights)
    units = np.array([round(weight / total * draws * _ONE) for weight in weights], np.int64)
    units[np.argmax(units)] += draws * _ONE - int(units.sum())  # what rounding lost or won
    whole, part = units // _ONE, units % _ONE
    first = int(raw_numbers(1, *key, point)[0]) >> 32
    return whole + systematic(part, first, permutation(len(units), *key, order))


class ItemValues:
    """The trainer's half: the value of each item, and the weights of the rounds to come."""

    def __init__(
        self,
        plan: OnlinePlan,
        base: Sequence[float],
        strata: Sequence[int],
        rules: Rules,
        saved: Mapping[str, Any] | None = None,
    ) -> None:
        """Publishes the weights of the rounds that may be read first.

        Args:
          plan: what follows them.
          base, strata: see `draw_weights`.
          saved: `state()` at the step that the run goes on from; None: a new run.
        """
        self._plan = plan
        self._rules = rules
        self._base, self._strata = base, strata
        unseen: list[float | None] = [None] * len(base)
        self.values: list[float | None] = list(saved["values"]) if saved else unseen
        # Of the rounds that are being read: the values that their weights come from.
        rounds = saved["rounds"] if saved else {"0": unseen, "1": unseen}
        self._rounds = {int(number): list(values) for number, values in rounds.items()}
        for number, values in self._rounds.items():
            plan.publish(number, self._weights(values))

    def observe(
        self, step: int, items: Sequence[int], deviations: Sequence[float], failed: Sequence[int]
    ) -> None:
        """What a step has shown; steps come one after another.

        Args:
          items: of the whole step.
          deviations: of their groups' rewards, finite.
          failed: items that were replaced because their videos cannot be used.
        """
        memory = self._rules.memory
        for item, deviation in zip(items, deviations, strict=True):
            before = self.values[item]
            if before is None:
                self.values[item] = float(deviation)
            else:
                self.values[item] = before + memory * (float(deviation) - before)
        for item in failed:
            self.values[item] = 0.0
        done = step + 1
        if done % self._rules.round == 0:
            number = done // self._rules.round + 1
            self._rounds.pop(number - 2, None)
            self._rounds[number] = list(self.values)
            self._plan.publish(number, self._weights(self.values))

    def state(self) -> dict[str, Any]:
        """JSON values from which the next step's plan, and all later ones, can be made again."""
        rounds = {str(number): values for number, values in self._rounds.items()}
        return {"values": list(self.values), "rounds": rounds}

    def _weights(self, values: Sequence[float | None]) -> list[float]:
        return draw_weights(values, self._base, self._strata, self._rules)
