"""The dual reward: a weighted sum of format, choice, temporal IoU, and the scores of other answers.

A task earns the components it has: mcqa format and choice, tvg format and IoU, grounded video QA
(gqa) all three; number, regression, ocr and text format and a component of their own name. Every
component is returned beside the total, so that each can be logged.

P prompts, G completions per prompt, M ground-truth spans.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data.records import (
    CHOICE_TASKS,
    LATEST,
    LETTERS,
    NUMBER,
    NUMBER_TASKS,
    SPAN_TASKS,
    TASKS,
    Record,
    is_span,
)
from rewards.answers import Answers
from rewards.choice import choice_reward
from rewards.format import format_reward
from rewards.length import length_bonus, overlong_penalty
from rewards.options import DEFAULTS, RewardOptions, Temporal
from rewards.parse import RewardError
from rewards.regression import regression_reward
from rewards.temporal import generalised_iou, temporal_iou, timestamp_iou
from rewards.weights import RewardWeights


class Truth(NamedTuple):
    """The right answers of P prompts."""

    task: np.ndarray | jax.Array  # i32[P], a number in `data.records.TASKS`
    choice: np.ndarray | jax.Array  # i32[P], 0 is A; -1 where the task has no choice
    spans: np.ndarray | jax.Array  # f32[P, M, 2], seconds, padded with NaN
    number: np.ndarray | jax.Array  # f32[P], of number and regression; else NaN
    duration: np.ndarray | jax.Array  # f32[P], seconds that are shown; NaN where it is not known


def truth_arrays(records: Sequence[Record], max_spans: int) -> Truth:
    """The ground truth of P records as NumPy arrays of fixed shape.

    `max_spans` is M, at least 1: the most spans that any record of the run has, so that every
    step has the same shapes. What a task does not score is left out: an mcqa record's spans and a
    tvg record's answer. Raises `RewardError`, naming the record, where the task is unknown, the
    answer is not the letter of an option or not a number, a span is missing, negative, empty,
    reversed or past 1e6 seconds, or there are more than `max_spans`.
    """
    if max_spans < 1:
        raise RewardError(f"max_spans: expected at least 1, found {max_spans}.")
    count = len(records)
    task = np.zeros(count, np.int32)
    choice = np.full(count, -1, np.int32)
    spans = np.full((count, max_spans, 2), np.nan, np.float32)
    number = np.full(count, np.nan, np.float32)
    for p, record in enumerate(records):
        if record.task not in TASKS:
            raise RewardError(
                f"record {record.id!r}, task: expected one of {', '.join(TASKS)}, "
                f"found {record.task!r}."
            )
        task[p] = TASKS.index(record.task)
        if record.task in CHOICE_TASKS:
            choice[p] = _option_index(record)
        if record.task in SPAN_TASKS:
            _check_spans(record, max_spans)
            spans[p, : len(record.spans)] = record.spans
        if record.task in NUMBER_TASKS:
            number[p] = _number(record)
    shown = [shown_seconds(record) for record in records]
    duration = np.array([np.nan if x is None else x for x in shown], np.float32)
    return Truth(task, choice, spans, number, duration)


def shown_seconds(record: Record) -> float | None:
    """How long the clip of a record is, or its file where there is no clip; None if not known."""
    return record.clip[1] - record.clip[0] if record.clip else record.duration


def dual_reward(
    answers: Answers,
    truth: Truth,
    weights: RewardWeights,
    options: RewardOptions = DEFAULTS,
    custom: Callable[[Answers, Truth], jax.Array] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Total reward f32[P, G] and its components, each f32[P, G], by name.

    The total is finite and within `bounds`, the components of the weights within [0, 1]; NaN
    marks a component that the task does not have, so that `nanmean` averages the right prompts.
    With another temporal score than the IoU, it is the component "temporal", and weighs in place
    of "iou", which is still given. "length", "overlong" and "custom" are components where they
    are on. Pure; under `jax.jit` weights, options and `custom`, a user's jitted function, are
    static. Raises `RewardError` on shapes that disagree.

        tvg, span [2, 6] against [0, 4], well formed, default weights
        -> total 0.5 * 1 + 0.5 * 2/6, components format 1, iou 2/6, the others NaN
    """
    _check_shapes(answers, truth)
    match = jnp.asarray(answers.match)
    scores = {
        "format": format_reward(answers.format_ok),
        "choice": choice_reward(answers.choice, truth.choice),
        "iou": temporal_iou(answers.span, truth.spans),
        "number": match,
        "regression": regression_reward(answers.number, truth.number),
        "ocr": match,
        "text": match,
    }
    weighed = scores
    if options.temporal != "iou":
        weighed = {**scores, "iou": _temporal(options.temporal, answers, truth)}
    total = jnp.zeros_like(scores["format"])
    right = jnp.ones_like(total)  # the lowest score of the answer, format apart
    components = {}
    for name, weight in dataclasses.asdict(weights).items():
        has = _is_of(truth.task, _TASKS_OF.get(name, (name,)))
        total = total + weight * jnp.where(has, weighed[name], 0.0)
        components[name] = jnp.where(has, scores[name], jnp.nan)
        if name != "format":
            right = jnp.minimum(right, jnp.where(has, scores[name], 1.0))
        if weighed[name] is not scores[name]:
            components["temporal"] = jnp.where(has, weighed[name], jnp.nan)
    if options.length.weight:
        components["length"] = length_bonus(answers.length, right, options.length)
        total = total + options.length.weight * components["length"]
    if options.overlong.weight:
        components["overlong"] = overlong_penalty(answers.length, options.overlong)
        total = total + options.overlong.weight * components["overlong"]
    if options.custom is not None:
        own = jnp.asarray(answers.custom) if custom is None else custom(answers, truth)
        components["custom"] = own
        total = total + options.custom.weight * own
    return total, components


def bounds(task: str, weights: RewardWeights, options: RewardOptions) -> tuple[float, float]:
    """What the total of a completion of this task is never below and never above.

    Below: what the overlong penalty and a user's own reward can take away. Above: the weights of
    the task's components, of the length bonus, and of a user's own reward at its `high`.
    """
    own = options.custom
    low = -options.overlong.weight + (own.weight * own.low if own else 0.0)
    high = options.length.weight + (own.weight * own.high if own else 0.0)
    for name, weight in dataclasses.asdict(weights).items():
        high += weight if task in _TASKS_OF.get(name, (name,)) else 0.0
    return low, high


def _temporal(kind: Temporal, answers: Answers, truth: Truth) -> jax.Array:
    if kind == "giou":
        return generalised_iou(answers.span, truth.spans)
    return timestamp_iou(answers.span, truth.spans, truth.duration)


# The tasks that have a component; without an entry, the one of its own name.
_TASKS_OF = {"format": TASKS, "choice": CHOICE_TASKS, "iou": SPAN_TASKS}


def _is_of(task: np.ndarray | jax.Array, names: Sequence[str]) -> jax.Array:
    """bool[P, 1]: whether a prompt's task is among `names`."""
    numbers = jnp.array([TASKS.index(name) for name in names])
    return jnp.isin(jnp.asarray(task), numbers)[:, None]


def _number(record: Record) -> float:
    if record.answer is None or not NUMBER.fullmatch(record.answer):
        raise RewardError(
            f"record {record.id!r}, answer: expected a decimal number, found {record.answer!r}."
        )
    return float(record.answer)


def _option_index(record: Record) -> int:
    letters = list(LETTERS[: len(record.options)])
    if record.answer is None or record.answer not in letters:
        raise RewardError(
            f"record {record.id!r}, answer: expected the letter of one of its "
            f"{len(letters)} options, found {record.answer!r}."
        )
    return letters.index(record.answer)


def _check_spans(record: Record, max_spans: int) -> None:
    if not 1 <= len(record.spans) <= max_spans:
        raise RewardError(
            f"record {record.id!r}, spans: expected 1 to {max_spans} (max_spans), "
            f"found {len(record.spans)}."
        )
    for start, end in record.spans:
        if not is_span(start, end):
            raise RewardError(
                f"record {record.id!r}, spans: expected 0 <= start < end <= {LATEST:,.0f} in "
                f"seconds, found [{start}, {end}]."
            )


def _check_shapes(answers: Answers, truth: Truth) -> None:
    prompts, group = np.shape(answers.format_ok)
    found = {
        "answers.choice": (np.shape(answers.choice), (prompts, group)),
        "answers.span": (np.shape(answers.span), (prompts, group, 2)),
        "answers.number": (np.shape(answers.number), (prompts, group)),
        "answers.match": (np.shape(answers.match), (prompts, group)),
        "answers.length": (np.shape(answers.length), (prompts, group)),
        "truth.task": (np.shape(truth.task), (prompts,)),
        "truth.choice": (np.shape(truth.choice), (prompts,)),
        "truth.spans": (np.shape(truth.spans), (prompts, *np.shape(truth.spans)[1:2], 2)),
        "answers.custom": (np.shape(answers.custom), (prompts, group)),
        "truth.duration": (np.shape(truth.duration), (prompts,)),
        "truth.number": (np.shape(truth.number), (prompts,)),
    }
    for name, (shape, expected) in found.items():
        if shape != expected:
            raise RewardError(
                f"dual_reward, {name}: expected shape {expected} beside answers.format_ok "
                f"of shape {(prompts, group)}, found {shape}."
            )
