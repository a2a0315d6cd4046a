"""The `lora` section of the configuration."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from jaxgrpo.checks import above_zero, at_least, check

if TYPE_CHECKING:
    from models.low_rank import Lora

Target = Literal["text.attention", "text.mlp", "vision.attention", "vision.mlp"]


@dataclass(frozen=True)
class LoraSection:
    """Low-rank adapters (arXiv 2106.09685), in the place of training the weights themselves.

    See docs/lora.md. Everything but the adapters is frozen and held in model.compute_dtype; a
    vision tower without adapters is run once a step, by the rollout.
    """

    rank: int = 0  # 0: no adapters, all weights are trained
    alpha: float = 32.0  # the product of a pair counts alpha / rank times
    targets: tuple[Target, ...] = ("text.attention", "text.mlp")  # what has adapters

    def __post_init__(self) -> None:
        at_least("lora", self, rank=0)
        above_zero("lora", self, "alpha")
        some = bool(self.targets) and len(set(self.targets)) == len(self.targets)
        check("lora.targets", list(self.targets), some, "one or more targets, each once")

    @property
    def vision(self) -> bool:
        """Whether the vision tower has adapters."""
        return bool(self.rank) and any(target.startswith("vision") for target in self.targets)

    @property
    def adapters(self) -> Lora:
        """What the model is built with."""
        from models.low_rank import NO_LORA, Lora  # not above: see `cli`

        return Lora(self.rank, self.alpha, self.targets) if self.rank else NO_LORA
