"""What a reward is made of besides its weights. Needs no JAX: configs are checked at once."""

from __future__ import annotations

import dataclasses
from typing import Final, Literal

from rewards.parse import RewardError
from rewards.weights import check_weight

Temporal = Literal["iou", "giou", "tiou"]  # see `rewards.temporal`


@dataclasses.dataclass(frozen=True)
class LengthBand:
    """A bonus for right answers of a given length, as of Video-R1 (arXiv 2503.21776).

    Adds `weight` where the length is within [min, max] tokens and every score of the task's answer
    (the choice, the IoU, ...) is at least `right`. A weight of 0 is off. Video-R1: 0.2, 320, 512.
    """

    weight: float = 0.0
    min: int = 320
    max: int = 512
    right: float = 0.5

    def __post_init__(self) -> None:
        check_weight("length.weight", self.weight)
        if not 0 <= self.min <= self.max:
            raise RewardError(f"length: expected 0 <= min <= max, found {self.min} and {self.max}.")
        if not 0 < self.right <= 1:
            raise RewardError(f"length.right: expected more than 0, at most 1, found {self.right}.")


@dataclasses.dataclass(frozen=True)
class Overlong:
    """The soft penalty of long completions: DAPO (arXiv 2503.14476), equation 13.

    Subtracts up to `weight`: nothing up to `limit - cache` tokens, all of it at `limit`, linear in
    between. A weight of 0 is off. DAPO: a weight of 1, a cache of a fifth of the limit.
    """

    weight: float = 0.0
    cache: int = 128
    limit: int = 512

    def __post_init__(self) -> None:
        check_weight("overlong.weight", self.weight)
        if self.cache < 1 or self.limit < 1:
            raise RewardError(
                f"overlong: expected a cache and a limit of at least 1 token, found {self.cache} "
                f"and {self.limit}."
            )


@dataclasses.dataclass(frozen=True)
class Custom:
    """A user's own reward; `rewards.custom` has the contract.

    Attributes:
      function: "module:function".
      kind: "host" is called with the texts, "jitted" is traced with the arrays.
      weight: of its value in the total.
      low, high: what the value is never below and above.
      folder: that holds the module; appended to the path, so that it shadows nothing.
    """

    function: str
    kind: Literal["host", "jitted"]
    weight: float = 0.5
    low: float = 0.0
    high: float = 1.0
    folder: str = "."

    def __post_init__(self) -> None:
        module, colon, name = self.function.partition(":")
        if not (colon and name.isidentifier() and all(map(str.isidentifier, module.split(".")))):
            raise RewardError(
                f"custom.function: expected module:function, such as my_rewards:short_thoughts, "
                f"found {self.function!r}."
            )
        check_weight("custom.weight", self.weight)
        if not -1e6 <= self.low < self.high <= 1e6:
            raise RewardError(
                f"custom: expected -1e6 <= low < high <= 1e6, found {self.low} and {self.high}."
            )


@dataclasses.dataclass(frozen=True)
class RewardOptions:
    """Which kind of temporal score, and what is added to the weighted sum. Hashable."""

    temporal: Temporal = "iou"
    length: LengthBand = LengthBand()
    overlong: Overlong = Overlong()
    custom: Custom | None = None


DEFAULTS: Final = RewardOptions()
