"""Which items teach: rules over what k completions of each have earned.

A group whose completions all earn the same has no advantages, and most items have such groups. The
paper keeps the items whose rewards disagree (Temporal-RLT, arXiv 2506.01908): of answers that are
right or wrong those that are sometimes right, of answers that are more or less right those whose
scores spread most. The format's reward has no say: what spreads by it are answers that broke off,
and those teach nothing about videos (docs/study.md has what came of it).
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from typing import Final, Literal, NamedTuple

DISCRETE: Final = ("choice", "number")  # components that are 0 or 1
CONTINUOUS: Final = ("iou", "regression", "ocr", "text")
TEMPORAL: Final = "temporal"  # a component in the place of "iou", where the reward has it

# What becomes of an item, in the order of the rules.
KEPT: Final = "kept"
VERDICTS: Final = (
    "failed",  # its video could not be used
    "always wrong",
    "always right",
    "too alike",
    "beyond the share",
    "beyond the budget",
    KEPT,
)


class Sampled(NamedTuple):
    """What k completions of an item have earned.

    Attributes:
      id, task: its record's.
      means, stds: by component of the answer's score, see DISCRETE and CONTINUOUS.
    """

    id: str
    task: str
    means: dict[str, float]
    stds: dict[str, float]

    @property
    def discrete(self) -> list[str]:
        """The components of its answer that are right or wrong."""
        return [name for name in DISCRETE if name in self.stds]

    @property
    def continuous(self) -> list[str]:
        """The components of its answer that are more or less right."""
        temporal = TEMPORAL in self.stds
        names = (TEMPORAL if name == "iou" and temporal else name for name in CONTINUOUS)
        return [name for name in names if name in self.stds]

    @property
    def spread(self) -> float:
        """Sum of the standard deviations of its answer's components."""
        return sum(self.stds[name] for name in [*self.discrete, *self.continuous])


class Rules(NamedTuple):
    """What an item must show to be kept.

    Attributes:
      right: of a discrete component, the share of right completions lies strictly between these.
      spread: of a continuous component, the standard deviation is at least this, and not 0.
      share: of a task's items that teach, so large a part is kept.
      budget: by task, so many of these at most; None: all.
      order: which these are: those that spread most, or drawn at random.
      seed: of the draw; also orders items that spread alike.
    """

    right: tuple[float, float]
    spread: float
    share: float
    budget: Mapping[str, int | None]
    order: Literal["spread", "random"]
    seed: int


def verdicts(items: Sequence[Sampled], rules: Rules) -> dict[str, str]:
    """What becomes of each item, by id: one of VERDICTS but "failed".

    An item of a task with two components is kept for either.
    """
    found: dict[str, str] = {}
    by_task: dict[str, list[Sampled]] = {}
    for item in items:
        found[item.id] = _alone(item, rules)
        if found[item.id] == KEPT:
            by_task.setdefault(item.task, []).append(item)
    for task, teaching in by_task.items():
        teaching.sort(key=lambda item: _draw(rules.seed, item.id))
        if rules.order == "spread":
            teaching.sort(key=lambda item: -item.spread)
        share = math.ceil(rules.share * len(teaching))
        budget = rules.budget.get(task)
        for place, item in enumerate(teaching):
            if place >= share:
                found[item.id] = "beyond the share"
            elif budget is not None and place >= budget:
                found[item.id] = "beyond the budget"
    return found


def _alone(item: Sampled, rules: Rules) -> str:
    """The verdict that does not look at other items."""
    low, high = rules.right
    verdict = "too alike"
    for name in item.discrete:
        right = item.means[name]
        if low < right < high:
            return KEPT
        verdict = "always wrong" if right <= low else "always right"
    for name in item.continuous:
        if item.stds[name] >= rules.spread and item.stds[name] > 0:
            return KEPT
        verdict = "too alike"
    return verdict


def _draw(seed: int, name: str) -> str:
    return hashlib.sha256(f"{seed}/{name}".encode()).hexdigest()
