"""The host's half of the reward: from completions to arrays of fixed shape, without JAX.

What needs the text is scored here (`match`), what is arithmetic on the device (`rewards.dual`).

P prompts, G completions per prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from data.records import NUMBER, NUMBER_TASKS, Record
from rewards.parse import Answer, RewardError, parse
from rewards.written import SCORES


class Answers(NamedTuple):
    """What a batch of completions says."""

    format_ok: np.ndarray  # bool[P, G]
    choice: np.ndarray  # i32[P, G], -1 where there is none
    span: np.ndarray  # f32[P, G, 2], start and end in seconds, NaN where there is none
    number: np.ndarray  # f32[P, G], of number and regression; NaN where there is none
    match: np.ndarray  # f32[P, G] in [0, 1], of number, ocr and text: how well it fits the truth
    length: np.ndarray  # i32[P, G], tokens with the stop token
    custom: np.ndarray  # f32[P, G], of a user's own reward on the host; 0 without one


def read_answers(
    texts: Sequence[Sequence[str]],
    records: Sequence[Record],
    lengths: np.ndarray,
    *,
    thinking: bool,
) -> Answers:
    """Reads the completions `texts[P][G]`, of `lengths` i32[P, G] tokens, to P records.

    Raises `RewardError` where the sizes do not agree, a task is unknown, or a record of a number
    or a text has no answer.
    """
    if len(texts) != len(records):
        raise RewardError(
            f"read_answers: expected one record per prompt, found {len(records)} records for "
            f"{len(texts)} prompts."
        )
    group = len(texts[0]) if texts else 0
    for p, completions in enumerate(texts):
        if len(completions) != group:
            raise RewardError(
                f"read_answers: expected {group} completions for every prompt, as for prompt 0, "
                f"found {len(completions)} for prompt {p}."
            )
    shape = (len(texts), group)
    if np.shape(lengths) != shape:
        raise RewardError(
            f"read_answers, lengths: expected shape {shape}, found {np.shape(lengths)}."
        )
    answers = [
        (parse(text, record.task, thinking=thinking), record)
        for completions, record in zip(texts, records, strict=True)
        for text in completions
    ]
    numbers = [_number(answer, record) for answer, record in answers]
    matches = [_match(answer, record) for answer, record in answers]
    return Answers(
        np.array([a.format_ok for a, _ in answers], bool).reshape(shape),
        np.array([a.choice for a, _ in answers], np.int32).reshape(shape),
        np.array([(a.start, a.end) for a, _ in answers], np.float32).reshape(*shape, 2),
        np.array(numbers, np.float32).reshape(shape),
        np.array(matches, np.float32).reshape(shape),
        np.asarray(lengths, np.int32),
        np.zeros(shape, np.float32),
    )


def _number(answer: Answer, record: Record) -> float:
    if record.task not in NUMBER_TASKS or answer.text is None:
        return float("nan")
    return float(answer.text)


def _match(answer: Answer, record: Record) -> float:
    if record.task not in SCORES:
        return 0.0
    if record.answer is None:
        raise RewardError(f"record {record.id!r}, answer: expected a text, found none.")
    if record.task == "number" and not NUMBER.fullmatch(record.answer):
        raise RewardError(
            f"record {record.id!r}, answer: expected a decimal number, found {record.answer!r}."
        )
    return 0.0 if answer.text is None else SCORES[record.task](answer.text, record.answer)
