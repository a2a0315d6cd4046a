"""The completions with the right answers, and what the configured reward gives for them.

It must be the most there is: a run cannot learn to do better than the right answer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from data.prompts import PromptError, target_text
from data.records import TASKS, Record
from jaxgrpo.rescore import Stored, rescore
from models.qwen2_5_vl.processor import Processor
from models.qwen2_5_vl.sizes import ProcessorError
from rewards.dual import bounds
from rewards.reward import Reward

# Times in a completion are rounded, by at most 0.2 % of the span (`data.prompts.target_text`).
_ROUNDED = 0.005


class Targets(NamedTuple):
    """A completion with the right answer for each record."""

    texts: list[str]
    tokens: list[int]  # with the stop token; 0 where there is no completion
    unwritten: dict[str, str]  # id -> why there is none


@dataclass(frozen=True)
class Short:
    """A right answer that does not earn the most."""

    id: str
    reward: float
    most: float
    components: dict[str, float]  # those of the task


@dataclass(frozen=True)
class RightAnswers:
    """What the completions with the right answers are, and what they earn.

    Their thought is the record's rationale, else empty. A bonus for length (`reward.length`) is
    left out: it is earned by thinking.
    """

    reward: float  # mean
    empty: float  # mean reward of an empty completion
    short: tuple[Short, ...]
    too_long: dict[str, int]  # id -> tokens, above the limit
    limit: int  # tokens of a completion
    unwritten: dict[str, str]  # id -> why no completion can be written


def write_targets(records: Sequence[Record], processor: Processor, thinking: bool) -> Targets:
    """What supervised training would teach for each record."""
    texts, tokens, unwritten = [], [], {}
    for record in records:
        text, count = "", 0
        try:
            text = target_text(record, thinking)
            count = len(processor.encode_completion(text))
        except (PromptError, ProcessorError) as error:
            unwritten[record.id] = str(error)
        texts.append(text)
        tokens.append(count)
    return Targets(texts, tokens, unwritten)


def score_targets(records: Sequence[Record], targets: Targets, reward: Reward) -> RightAnswers:
    """Scores them as a step of training would, each beside an empty completion.

    Raises:
      RewardError: see `rewards.reward.Reward.truth`.
    """
    texts, tokens, unwritten = targets
    limit, bonus = reward.options.overlong.limit, reward.options.length.weight
    completions = [
        Stored(said, length, record, (number,), {})
        for number, (record, text, count) in enumerate(zip(records, texts, tokens, strict=True))
        for said, length in ((text, count), ("", 1))  # an empty one is its stop token
    ]
    scores = rescore(completions, reward).after
    total = scores.pop("total")
    if bonus:
        total = total - bonus * scores.pop("length")
    highest = {task: bounds(task, reward.weights, reward.options)[1] - bonus for task in TASKS}
    short = []
    for number, record in enumerate(records):
        most = highest[record.task]
        earned = float(total[2 * number])
        if earned < most - _ROUNDED * abs(most) and record.id not in unwritten:
            of_task = {name: float(values[2 * number]) for name, values in scores.items()}
            of_task = {name: value for name, value in of_task.items() if not np.isnan(value)}
            short.append(Short(record.id, earned, most, of_task))
    return RightAnswers(
        reward=float(np.mean(total[::2])),
        empty=float(np.mean(total[1::2])),
        short=tuple(short),
        too_long={
            record.id: count for record, count in zip(records, tokens, strict=True) if count > limit
        },
        limit=limit,
        unwritten=unwritten,
    )
