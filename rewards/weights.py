"""What each component of the dual reward weighs. Needs no JAX: configs are checked at once."""

from __future__ import annotations

import dataclasses

from rewards.parse import RewardError


def check_weight(name: str, weight: float) -> None:
    """Raises RewardError unless the total stays finite in float32; NaN does not."""
    if not 0 <= weight <= 1e6:
        raise RewardError(f"{name}: expected a number from 0 to 1e6, found {weight}.")


@dataclasses.dataclass(frozen=True)
class RewardWeights:
    """What each component adds to the total at its best, 0 to 1e6.

    The default scores tvg as the paper does, 0.5 IoU + 0.5 format, and gives the others the same.
    Hashable: a static argument under `jax.jit`.
    """

    format: float = 0.5
    choice: float = 0.5
    iou: float = 0.5
    number: float = 0.5
    regression: float = 0.5
    ocr: float = 0.5
    text: float = 0.5

    def __post_init__(self) -> None:
        for name, weight in dataclasses.asdict(self).items():
            check_weight(f"weight {name!r}", weight)
