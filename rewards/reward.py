"""A run's reward: the host's half and the device's half, under one set of options.

P prompts, G completions per prompt, M ground-truth spans.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np

from data.records import SPAN_TASKS, Record
from rewards.answers import Answers, read_answers
from rewards.custom import CustomReward
from rewards.dual import Truth, dual_reward, shown_seconds, truth_arrays
from rewards.options import DEFAULTS, RewardOptions
from rewards.parse import RewardError
from rewards.weights import RewardWeights


class Reward:
    """How completions are scored.

    Attributes:
      weights: of the components.
      options: what else decides.
      thinking: whether the format has a `<think>` block.
    """

    def __init__(
        self, weights: RewardWeights, options: RewardOptions = DEFAULTS, *, thinking: bool
    ):
        """Loads and checks a user's own function, if there is one; raises `RewardError`."""
        self.weights, self.options, self.thinking = weights, options, thinking
        self._custom = None
        if options.custom is not None:
            self._custom = CustomReward(options.custom, thinking=thinking)

    def read(
        self, texts: Sequence[Sequence[str]], records: Sequence[Record], lengths: np.ndarray
    ) -> Answers:
        """On the host: completions `texts[P][G]` of `lengths` i32[P, G] tokens -> arrays."""
        answers = read_answers(texts, records, lengths, thinking=self.thinking)
        if self._custom is None or self._custom.spec.kind != "host":
            return answers
        return answers._replace(custom=self._custom.on_host(texts, records, lengths))

    def truth(self, records: Sequence[Record], max_spans: int) -> Truth:
        """The right answers of P records, with M = `max_spans`; see `dual.truth_arrays`.

        Raises:
          RewardError: see there; also a span whose video has no known length, for "tiou".
        """
        if self.options.temporal == "tiou":
            for record in records:
                if record.task in SPAN_TASKS and shown_seconds(record) is None:
                    raise RewardError(
                        f"record {record.id!r}: reward.temporal=tiou needs the length of its "
                        "video; add the field 'duration' or 'clip' to its row, or choose iou or "
                        "giou."
                    )
        return truth_arrays(records, max_spans)

    def score(self, answers: Answers, truth: Truth) -> tuple[jax.Array, dict[str, jax.Array]]:
        """Pure, to be jitted: the total f32[P, G] and its components; see `dual_reward`."""
        jitted = self._custom is not None and self._custom.spec.kind == "jitted"
        function = self._custom.on_device if self._custom is not None and jitted else None
        return dual_reward(answers, truth, self.weights, self.options, function)

    def check(self, components: Mapping[str, np.ndarray]) -> None:
        """Raises `RewardError` where a user's own reward broke its bounds on the device."""
        if self._custom is not None:
            self._custom.check(components["custom"])
