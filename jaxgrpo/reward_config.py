"""The `reward` section of the configuration: what completions are scored by."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Literal

from jaxgrpo.checks import RESUMABLE, accepted_by, at_least, check
from jaxgrpo.strict_yaml import ConfigError


@dataclass(frozen=True)
class LengthSection:
    """A bonus for right answers of a given length, as Video-R1 gives: 0.2 from 320 to 512."""

    weight: float = 0.0  # 0: none
    min: int = 320  # tokens
    max: int = 512  # tokens
    right: float = 0.5  # every score of the answer is at least this

    def __post_init__(self) -> None:
        from rewards.options import LengthBand  # not above: see `cli`

        accepted_by(LengthBand, "reward", self)


@dataclass(frozen=True)
class OverlongSection:
    """The soft penalty of long completions (DAPO, equation 13), up to rollout.max_new_tokens."""

    weight: float = 0.0  # 0: none
    cache: int = 128  # tokens before the limit over which it grows

    def __post_init__(self) -> None:
        from rewards.options import Overlong  # not above: see `cli`

        accepted_by(Overlong, "reward", self)


@dataclass(frozen=True)
class CustomSection:
    """Your own reward: docs/rewards.md has the contract."""

    function: str  # module:function
    kind: Literal["host", "jitted"]  # host: called with texts; jitted: traced with arrays
    weight: float = 0.5
    low: float = 0.0  # its values are never below
    high: float = 1.0  # nor above
    folder: str = field(default=".", metadata=RESUMABLE)  # of the module; appended to the path

    def __post_init__(self) -> None:
        from rewards.options import Custom  # not above: see `cli`

        accepted_by(Custom, "reward", self)


@dataclass(frozen=True)
class RewardSection:
    """Weight of each component in the total reward; the paper scores 0.5 IoU + 0.5 format."""

    format: float = 0.5
    choice: float = 0.5
    iou: float = 0.5  # of the temporal score, whatever its kind
    number: float = 0.5
    regression: float = 0.5
    ocr: float = 0.5
    text: float = 0.5
    temporal: Literal["iou", "giou", "tiou"] = "iou"  # generalised; Time-R1's, which looks at ends
    length: LengthSection = field(default_factory=LengthSection)
    overlong: OverlongSection = field(default_factory=OverlongSection)
    custom: CustomSection | None = None
    constant_steps: int = field(
        default=50, metadata=RESUMABLE
    )  # after which a component that never varied within a group is named; 0: never

    def __post_init__(self) -> None:
        from rewards.weights import RewardWeights  # not above: see `cli`

        names = [item.name for item in dataclasses.fields(RewardWeights)]
        weights = {name: self.__dict__[name] for name in names}
        try:
            RewardWeights(**weights)
        except ValueError as error:
            raise ConfigError(f"reward: {error}") from error
        own = self.custom.weight if self.custom else 0.0
        check("reward", weights, any(weights.values()) or own > 0, "at least one weight above 0")
        at_least("reward", self, constant_steps=0)
