"""How often questions are drawn: several manifests, weights, and what training has seen of them."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from jaxgrpo.checks import RESUMABLE, at_least, check
from jaxgrpo.strict_yaml import ConfigError


@dataclass(frozen=True)
class ManifestSection:
    """One manifest of `data.eval_mixture`."""

    manifest: str  # a JSONL manifest, or a folder of what `jaxgrpo pack` wrote
    root: str | None = field(
        default=None, metadata=RESUMABLE
    )  # folder or bucket path of its videos; null: data.root
    prefix: str = ""  # put in front of its ids, where another manifest has the same ones

    def __post_init__(self) -> None:
        if not self.manifest:
            raise ConfigError("data.mixture: manifest is empty, expected a JSONL manifest")


@dataclass(frozen=True)
class MixtureSection(ManifestSection):
    """One manifest of `data.mixture`."""

    weight: float = 1.0  # draws of each of its questions, relative to those of weight 1

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_weight(f"data.mixture, weight of {self.manifest}", self.weight, "the manifest")


@dataclass(frozen=True)
class TaskWeightsSection:
    """Draws of each question of a task, relative to those of weight 1, in training."""

    mcqa: float = 1.0
    tvg: float = 1.0
    gqa: float = 1.0
    number: float = 1.0
    regression: float = 1.0
    ocr: float = 1.0
    text: float = 1.0

    def __post_init__(self) -> None:
        for task, weight in dataclasses.asdict(self).items():
            _check_weight(f"data.task_weights.{task}", weight, "its rows of the manifests")


@dataclass(frozen=True)
class OnlineSection:
    """Drawing more of the questions whose groups' rewards disagree; see `data.online`."""

    # Rollouts drawn with the same weights, those known one round before; at least as many as are
    # loaded ahead, or loading waits.
    round: int = 16
    memory: float = 0.5  # how much of a question's value its newest group is
    floor: float = 0.2  # the share of draws that does not look at values: none starves
    most: float = 5.0  # the largest value that counts, in means of the task's and manifest's

    def __post_init__(self) -> None:
        at_least("data.online", self, round=1, most=1)
        for name in ("memory", "floor"):
            share = self.__dict__[name]
            check(f"data.online.{name}", share, 0 < share <= 1, "more than 0 and at most 1")


def _check_weight(key: str, weight: float, what: str) -> None:
    if not (math.isfinite(weight) and weight > 0):
        raise ConfigError(
            f"{key} is {weight:g}, expected more than 0: to train without, leave out {what}"
        )
