"""A run's reward: the host's half and the device's half, under one set of options.

P prompts, G completions per prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import numpy as np

from data.records import Record
from rewards.answers import Answers, read_answers
from rewards.dual import Truth, dual_reward
from rewards.weights import RewardWeights


@dataclasses.dataclass(frozen=True)
class Reward:
    """How completions are scored.

    Attributes:
      weights: of the components.
      thinking: whether the format has a `<think>` block.
    """

    weights: RewardWeights
    thinking: bool

    def read(
        self, texts: Sequence[Sequence[str]], records: Sequence[Record], lengths: np.ndarray
    ) -> Answers:
        """On the host: completions `texts[P][G]` of `lengths` i32[P, G] tokens -> arrays."""
        return read_answers(texts, records, lengths, thinking=self.thinking)

    def score(self, answers: Answers, truth: Truth) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Pure, to be jitted: the total f32[P, G] and its components; see `dual_reward`."""
        return dual_reward(answers, truth, self.weights)
