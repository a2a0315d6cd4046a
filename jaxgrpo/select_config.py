"""The keys of `jaxgrpo select`."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from jaxgrpo.checks import RESUMABLE, at_least, check


@dataclass(frozen=True)
class BudgetSection:
    """The most items of a task that are kept; null: all."""

    mcqa: int | None = None
    tvg: int | None = None
    gqa: int | None = None
    number: int | None = None
    regression: int | None = None
    ocr: int | None = None
    text: int | None = None

    def __post_init__(self) -> None:
        for task, budget in self.__dict__.items():
            if budget is not None:
                at_least("select.budget", self, **{task: 0})


@dataclass(frozen=True)
class SelectSection:
    """`jaxgrpo select`; see `data.selection` for the rules, which may change afterwards."""

    samples: int = 8  # completions of each item
    batch: int = 16  # items in a batch
    # Discrete scores: the share of right answers lies strictly between these.
    right: tuple[float, ...] = field(default=(0.0, 1.0), metadata=RESUMABLE)
    spread: float = field(default=0.0, metadata=RESUMABLE)  # continuous ones: least deviation
    share: float = field(default=1.0, metadata=RESUMABLE)  # of a task's items that teach
    budget: BudgetSection = field(default_factory=BudgetSection, metadata=RESUMABLE)
    # What share and budget keep: those whose answers spread most, or drawn by seed.
    order: Literal["spread", "random"] = field(default="spread", metadata=RESUMABLE)

    def __post_init__(self) -> None:
        at_least("select", self, samples=2, batch=1, spread=0)
        pair = len(self.right) == 2 and 0 <= self.right[0] < self.right[1] <= 1
        check("select.right", list(self.right), pair, "two shares, rising, such as [0, 1]")
        check("select.share", self.share, 0 < self.share <= 1, "more than 0 and at most 1")
