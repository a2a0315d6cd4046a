r"""Reading completions: from text to fixed-shape answers, on the host, without JAX.

The scored formats, with thinking:

    mcqa <think>...</think><answer>B</answer>
    tvg  <think>...</think><answer>{"start_time": "3.5", "end_time": "7.0"}</answer>
    gqa  <think>...</think><answer>{"option": "B", "start_time": "3.5", "end_time": "7.0"}</answer>

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
- **Whitespace** is space, tab, newline and carriage return, as in JSON.
- Format is about form alone. An empty or reversed span, a span past the end of the video and a
  letter that is not among the options are well formed; they earn nothing in their own component.

Every text has an outcome: nothing raises, and the time is linear in the text's length.

Where this differs from the scorer that the paper released (Temporal-R1, tvg only):

| completion                        | released scorer                  | here                      |
|-----------------------------------|----------------------------------|---------------------------|
| several answers                   | the first one is scored          | format 0, no answer       |
| tags repeated inside the thought  | format 1                         | format 0                  |
| times as JSON numbers             | format 0, IoU scored             | format 1, IoU scored      |
| end_time before start_time (keys) | format 0, IoU scored             | format 1, IoU scored      |
| duplicate keys                    | format 0, the last one counts    | format 0, no answer       |
| additional keys                   | format 0, IoU scored             | format 0, no answer       |
| negative start                    | format 0, IoU scored             | format 0, no answer       |
| exponents, "1_0", " 3.5 "         | format 0, IoU scored             | format 0, no answer       |
| NaN, infinity, 1e309              | format 0, IoU 0 (nan passes max) | format 0, no answer       |
| Unicode digits                    | format 1, IoU scored             | format 0, no answer       |
| "1.2.3"                           | format 1, IoU 0 (exception)      | format 0, no answer       |
| leading zeros, "5.", ".5"         | format 1, IoU scored             | format 0, no answer       |
| reversed span                     | format 1, IoU 0, by no rule      | format 1, IoU 0           |
| both spans empty                  | division by zero, caught: IoU 0  | IoU 0                     |
| `<think>` missing                 | format 0, IoU scored             | the same                  |

P prompts, G completions per prompt.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Final, NamedTuple

import numpy as np

from data.records import LETTERS, TASKS

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


_NO_ANSWER: Final = Answer(False, -1, _NAN, _NAN)


class Answers(NamedTuple):
    """What a batch of completions says."""

    format_ok: np.ndarray  # bool[P, G]
    choice: np.ndarray  # i32[P, G], -1 where there is none
    span: np.ndarray  # f32[P, G, 2], start and end in seconds, NaN where there is none


def parse(text: str, task: str, *, thinking: bool) -> Answer:
    """Reads one completion of a task ("mcqa", "tvg" or "gqa") by the rules of this module.

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
    read = _read_letter(content) if task == "mcqa" else _read_object(content, task)
    if read is None:
        return _NO_ANSWER
    return Answer(_is_framed(before, after, thinking), *read)


def parse_batch(texts: Sequence[Sequence[str]], tasks: Sequence[str], *, thinking: bool) -> Answers:
    """Reads the completions `texts[P][G]` of P prompts whose tasks are `tasks[P]`.

    Raises `RewardError` where the lengths do not agree or a task is unknown.
    """
    if len(texts) != len(tasks):
        raise RewardError(
            f"parse_batch: expected one task per prompt, found {len(tasks)} tasks for "
            f"{len(texts)} prompts."
        )
    group = len(texts[0]) if texts else 0
    for p, completions in enumerate(texts):
        if len(completions) != group:
            raise RewardError(
                f"parse_batch: expected {group} completions for every prompt, as for prompt 0, "
                f"found {len(completions)} for prompt {p}."
            )
    shape = (len(texts), group)
    answers = [
        parse(text, task, thinking=thinking)
        for completions, task in zip(texts, tasks, strict=True)
        for text in completions
    ]
    return Answers(
        np.array([a.format_ok for a in answers], bool).reshape(shape),
        np.array([a.choice for a in answers], np.int32).reshape(shape),
        np.array([(a.start, a.end) for a in answers], np.float32).reshape(*shape, 2),
    )


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


def _read_letter(content: str) -> tuple[int, float, float] | None:
    letter = content.strip(_SPACE)
    if len(letter) != 1 or letter not in LETTERS:
        return None
    return LETTERS.index(letter), _NAN, _NAN


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
