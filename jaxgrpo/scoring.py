"""From the configuration to a run's reward."""

from __future__ import annotations

from jaxgrpo.config import Config
from rewards.reward import Reward
from rewards.weights import RewardWeights


def open_reward(config: Config) -> Reward:
    """The reward that `config.reward` describes, for completions of `config.data.thinking`."""
    section = config.reward
    weights = RewardWeights(
        section.format,
        section.choice,
        section.iou,
        section.number,
        section.regression,
        section.ocr,
        section.text,
    )
    return Reward(weights, config.data.thinking)
