"""From the configuration to a run's reward, what hosts must agree on, and what it tells nothing of.

P prompts, G completions per prompt.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from data.records import Record
from jaxgrpo.config import Config
from jaxgrpo.programs import Scores
from jaxgrpo.sharding import gather_objects, shares_rows
from rewards.answers import Answers
from rewards.options import Custom, LengthBand, Overlong, RewardOptions
from rewards.reward import Reward
from rewards.weights import RewardWeights


def open_reward(config: Config, max_new_tokens: int | None = None) -> Reward:
    """The reward that `config.reward` describes, for completions of `config.data.thinking`.

    Args:
      max_new_tokens: where completions are cut, for the overlong penalty; None: as in training.

    Raises:
      RewardError: a user's own reward cannot be loaded, or does not keep its contract.
    """
    section = config.reward
    names = [item.name for item in dataclasses.fields(RewardWeights)]
    custom = None if section.custom is None else Custom(**dataclasses.asdict(section.custom))
    options = RewardOptions(
        section.temporal,
        LengthBand(**dataclasses.asdict(section.length)),
        Overlong(
            section.overlong.weight,
            section.overlong.cache,
            max_new_tokens or config.rollout.max_new_tokens,
        ),
        custom,
    )
    weights = RewardWeights(**{name: section.__dict__[name] for name in names})
    return Reward(weights, options, thinking=config.data.thinking)


def agreed(reward: Reward, mesh: Mesh, rows: list[int], answers: Answers) -> Answers:
    """The answers, with a user's host reward as the first process with the same rows found it.

    A collective where processes feed the same rows. What we score ourselves is the same on all of
    them; if a user's function is not, copies of one row would let the copies of the weights drift.
    """
    custom = reward.options.custom
    if custom is None or custom.kind != "host" or not shares_rows(mesh):
        return answers
    found = gather_objects([rows, answers.custom.tolist()])
    values = next(values for others, values in found if others == rows)
    return answers._replace(custom=np.array(values, np.float32))


def group_line(record: Record, scores: Scores, row: int) -> dict[str, Any]:
    """Mean and deviation of what an item's completions earned, in total and by component."""
    line: dict[str, Any] = {"id": record.id, "task": record.task}
    for name, values in {"": scores.total, **scores.components}.items():
        of_item = values[row].astype(np.float64)
        if not np.isnan(of_item).any():
            suffix = f"/{name}" if name else ""
            equal = of_item.max() == of_item.min()
            line[f"mean{suffix}"] = float(of_item.mean())
            line[f"std{suffix}"] = 0.0 if equal else float(of_item.std())
    return line


class ConstantWatch:
    """Notices components that never vary within a group: they teach nothing."""

    def __init__(self, steps: int):
        """Speaks of a component after `steps` steps that have it; 0: never."""
        self._steps = steps
        self._seen: dict[str, int] = {}  # steps with the component, while it has not varied
        self._varied: set[str] = set()

    def update(self, components: Mapping[str, np.ndarray]) -> list[str]:
        """One more step, with f32[P, G] of each component; a line for each one to warn of, once."""
        lines = []
        for name, values in components.items():
            defined = values[~np.isnan(values[:, 0])]
            if name in self._varied or not len(defined):
                continue
            if (defined.max(axis=-1) != defined.min(axis=-1)).any():
                self._varied.add(name)
                continue
            self._seen[name] = self._seen.get(name, 0) + 1
            if self._seen[name] == self._steps:
                lines.append(
                    f"warning: in {self._steps} steps reward/{name} has not varied within any "
                    f"group (now {defined.mean():.3g} on average): it teaches nothing; look at "
                    "the completions, or set its weight to 0"
                )
        return lines
