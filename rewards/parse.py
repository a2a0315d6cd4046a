r"""Reading completions: what one says, on the host, without JAX.

The scored formats, with thinking:

    mcqa <think>...</think><answer>B</answer>
    tvg  <think>...</think><answer>{"start_time": "3.5", "end_time": "7.0"}</answer>
    gqa  <think>...</think><answer>{"option": "B", "start_time": "3.5", "end_time": "7.0"}</answer>

    number, regression        <think>...</think><answer>-3.50</answer>
    ocr, text                 <think>...</think><answer>any text</answer>

and without thinking the `<answer>...</answer>` alone. Times are in seconds.

A policy under reinforcement learning finds every hole in a reward, so the rules are few and strict:

- **Answer.** It is read if the text has exactly one `<answer>` and, after it, exactly one
  `</answer>`, wherever they stand: what surrounds them costs the format, not the answer. It is
  read whole or not at all: a gqa object with an unreadable time has no option either.
- **Format.** The answer is readable, the tags of the format stand once each and in order, and
  nothing but whitespace stands outside them. The thought may be empty or hold any text without
  those tags. Without thinking, a `<think>` block breaks the format.
- **Letter.** One upper-case ASCII letter: not "b", "(B)", "B." or the option's text.
- **Object.** Flat JSON with exactly the keys of the task, in any order, without escapes.
- **Time.** A JSON string or JSON number, ASCII digits: 1 to 6, no leading zero, then optionally a
  point and 1 to 18 more. No sign, exponent, unit ("3.5s"), NaN, infinity or "0:07".
- **Number.** As a time without quotes, with at most 15 digits before the point, and a minus sign
  where it is negative; no unit, percent sign or thousands separator.
- **Text.** Whatever stands in the answer, stripped, if it is not empty, holds none of the tags and
  has at most 2,000 characters: comparing texts takes time in the square of their length.
- **Whitespace** is space, tab, newline and carriage return, as in JSON.
- Format is about form alone. An empty or reversed span, a span past the end of the video and a
  letter that is not among the options are well formed; they earn nothing in their own component.

Every text has an outcome: nothing raises, and the time is linear in the text's length.

docs/rewards.md has tables, which tests read, of what this does to hostile completions, and of where
it differs from the scorer that the paper released.
"""

from __future__ import annotations

import re
from typing import Final, NamedTuple

from data.records import (
    LETTERS,
    LONGEST_TEXT,
    NUMBER,
    NUMBER_TASKS,
    TAGS,
    TASKS,
)

_SPACE: Final = " \t\n\r"
_NAN: Final = float("nan")


class RewardError(ValueError):
    """A reward was asked for with a wrong task, weight, shape or ground truth."""


class Answer(NamedTuple):
    """What one completion says."""

    format_ok: bool
    choice: int  # 0 is A; -1 where there is none
    start: float  # seconds, NaN where there is none
    end: float
    text: str | None = None  # of a number as it is written, of ocr and text the stripped answer


_NO_ANSWER: Final = Answer(False, -1, _NAN, _NAN)


def parse(text: str, task: str, *, thinking: bool) -> Answer:
    """Reads one completion of a task (of `data.records.TASKS`) by the rules of this module.

    `thinking` says whether the format has a `<think>` block. Any text is fine; an unknown task
    raises `RewardError`.

        parse('<think>It opens.</think><answer>B</answer>', "mcqa", thinking=True)
        -> Answer(format_ok=True, choice=1, start=nan, end=nan)
    """
    if task not in TASKS:
        raise RewardError(f"task: expected one of {', '.join(TASKS)}, found {task!r}.")
    if text.count("<answer>") != 1 or text.count("</answer>") != 1:
        return _NO_ANSWER
    before, _, rest = text.partition("<answer>")
    content, closing, after = rest.partition("</answer>")
    if not closing:
        return _NO_ANSWER
    framed = _is_framed(before, after, thinking)
    if task in _OBJECT:
        read = _read_object(content, task)
        return _NO_ANSWER if read is None else Answer(framed, *read)
    if task == "mcqa":
        choice = _read_letter(content)
        return _NO_ANSWER if choice is None else Answer(framed, choice, _NAN, _NAN)
    written = _read_text(content, task)
    return _NO_ANSWER if written is None else Answer(framed, -1, _NAN, _NAN, written)


# Flat objects of two or three members. Possessive quantifiers (`*+`) never backtrack, and every
# other repetition is bounded, so matching is linear.
_S = r"[ \t\n\r]*+"
_MEMBER = rf'{_S}"(option|start_time|end_time)"{_S}:{_S}("[A-Z0-9.]{{1,25}}+"|[0-9.]{{1,25}}+){_S}'
_OBJECT: Final = {
    "tvg": re.compile(rf"{_S}\{{{_MEMBER},{_MEMBER}\}}{_S}"),
    "gqa": re.compile(rf"{_S}\{{{_MEMBER},{_MEMBER},{_MEMBER}\}}{_S}"),
}
_KEYS: Final = {
    "tvg": {"start_time", "end_time"},
    "gqa": {"option", "start_time", "end_time"},
}
_SECONDS: Final = re.compile(r"(?:0|[1-9][0-9]{0,5})(?:\.[0-9]{1,18})?")


def _is_framed(before: str, after: str, thinking: bool) -> bool:
    """Whether the text around the answer is what the format allows, and nothing more."""
    if after.strip(_SPACE):
        return False
    head = before.strip(_SPACE)
    if not thinking:
        return not head
    # Both tags exist, so a head that starts with one and ends with the other holds them in order.
    return (
        head.startswith("<think>")
        and head.endswith("</think>")
        and head.count("<think>") == 1
        and head.count("</think>") == 1
    )


def _read_letter(content: str) -> int | None:
    letter = content.strip(_SPACE)
    return LETTERS.index(letter) if len(letter) == 1 and letter in LETTERS else None


def _read_text(content: str, task: str) -> str | None:
    text = content.strip(_SPACE)
    if task in NUMBER_TASKS:
        return text if NUMBER.fullmatch(text) else None
    if not 0 < len(text) <= LONGEST_TEXT or any(tag in text for tag in TAGS):
        return None
    return text


def _read_object(content: str, task: str) -> tuple[int, float, float] | None:
    match = _OBJECT[task].fullmatch(content)
    if match is None:
        return None
    groups = match.groups()
    members = dict(zip(groups[::2], groups[1::2], strict=True))
    if members.keys() != _KEYS[task]:  # a repeated key leaves one out
        return None
    choice = -1
    if task == "gqa":
        option = members["option"]  # with its quotes
        if len(option) != 3 or option[1] not in LETTERS:
            return None
        choice = LETTERS.index(option[1])
    start = _SECONDS.fullmatch(members["start_time"].strip('"'))
    end = _SECONDS.fullmatch(members["end_time"].strip('"'))
    if start is None or end is None:
        return None
    return choice, float(start.group()), float(end.group())
