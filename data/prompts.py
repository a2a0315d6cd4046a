"""What a prompt asks for, and the completion that answers it: text only.

Every question ends with one sentence that asks for exactly the format that `rewards.parse` reads,
and `target_text` writes the completion with the largest reward, for supervised training and for
checking that the reward of the ground truth is what it should be.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Final

from data.records import CHOICE_TASKS, LETTERS, SPAN_TASKS, TAGS, Record, Span, merge_spans

_THINK: Final = "Think inside <think></think>, then "
_ANSWER_WITH: Final = {
    "mcqa": "answer with the letter of the right option inside <answer></answer>.",
    "tvg": "answer with when this happens in the video, in seconds, as "
    '<answer>{"start_time": "s", "end_time": "s"}</answer>.',
    "gqa": "answer with the letter of the right option and when the video shows it, in seconds, as "
    '<answer>{"option": "letter", "start_time": "s", "end_time": "s"}</answer>.',
    "number": "answer with the number, in digits, inside <answer></answer>.",
    "regression": "answer with your estimate, one number in digits, inside <answer></answer>.",
    "ocr": "answer with the text that the video shows, word for word, inside <answer></answer>.",
    "text": "answer in your own words inside <answer></answer>.",
}


class PromptError(ValueError):
    """A record or a rationale that cannot be written in the scored format."""


def question_text(record: Record, thinking: bool) -> str:
    """The text of a user's turn: the question, its options as lines "A. ...", and the format.

    A tvg question may be a question ("When does the door open?") or a description ("the door
    opens"). `thinking` asks for a `<think>` block. Raises `PromptError` on an unknown task.

        What is opened?
        A. door
        B. window
        Answer with the letter of the right option inside <answer></answer>.
    """
    _check_task(record)
    request = _ANSWER_WITH[record.task]
    request = _THINK + request if thinking else request[0].upper() + request[1:]
    options = record.options if record.task in CHOICE_TASKS else ()
    lines = [f"{letter}. {option}" for letter, option in zip(LETTERS, options, strict=False)]
    return "\n".join([record.question, *lines, request])


def target_text(record: Record, thinking: bool) -> str:
    """The completion with the largest reward that a completion can have.

    A number and a text are the record's own. Times have one decimal where that is exact, else two,
    and more only where the span is so short that rounding would cost over 0.2 % of it. Of several
    true spans it names the one stretch with the largest IoU. With thinking, the record's rationale
    is the text of the `<think>` block, which is empty without one. Raises `PromptError` where the
    record lacks an answer or a span that its task asks for, and where the rationale holds a tag of
    the format.
    """
    _check_task(record)
    rationale = record.rationale or ""
    for tag in TAGS:
        if tag in rationale:
            raise PromptError(
                f"record {record.id!r}: the rationale holds {tag!r}, which would end its block: "
                "remove the tag."
            )
    thought = f"<think>{rationale}</think>" if thinking else ""
    return f"{thought}<answer>{_answer(record)}</answer>"


def _check_task(record: Record) -> None:
    if record.task not in _ANSWER_WITH:
        raise PromptError(
            f"record {record.id!r}, task: expected one of {', '.join(_ANSWER_WITH)}, "
            f"found {record.task!r}."
        )


def _answer(record: Record) -> str:
    if record.task != "tvg" and record.answer is None:
        expected = "an option's letter" if record.task in CHOICE_TASKS else "a text"
        raise PromptError(f"record {record.id!r}, answer: expected {expected}, found none.")
    if record.task not in SPAN_TASKS:
        return f"{record.answer}"
    if not record.spans:
        raise PromptError(f"record {record.id!r}, spans: expected at least one, found none.")
    start, end = best_single_span(record.spans)
    decimals = _decimals(start, end)
    times = f'"start_time": "{start:.{decimals}f}", "end_time": "{end:.{decimals}f}"'
    if record.task == "tvg":
        return f"{{{times}}}"
    return f'{{"option": "{record.answer}", {times}}}'


def best_single_span(spans: tuple[Span, ...]) -> Span:
    """The one span whose IoU with the union of `spans` is largest; the earliest such one.

    It starts where a true stretch starts and ends where one ends: moving either end elsewhere
    adds a gap or loses truth.

        ((0, 4), (5, 9), (50, 51)) -> (0, 9), with an IoU of 8 / (9 + 1)
    """
    merged = merge_spans(spans)
    total = sum(end - start for start, end in merged)

    def iou(first: int, last: int) -> float:
        gaps = sum(b[0] - a[1] for a, b in pairwise(merged[first : last + 1]))
        covered = merged[last][1] - merged[first][0] - gaps
        return covered / (total + gaps)

    stretches = [(i, j) for i in range(len(merged)) for j in range(i, len(merged))]
    first, last = max(stretches, key=lambda stretch: iou(*stretch))
    return merged[first][0], merged[last][1]


def _decimals(start: float, end: float) -> int:
    """How many decimals write a span: 1 if exact, else as few from 2 to 9 as keep 99.8 % of it."""
    for decimals in range(1, 9):
        moved = abs(round(start, decimals) - start) + abs(round(end, decimals) - end)
        if moved <= (0.002 * (end - start) if decimals > 1 else 1e-9):
            return decimals
    return 9
