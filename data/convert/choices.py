"""Options and the letter of the right one, as published multiple-choice files write them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, Literal

from data.convert.conversion import Rejection
from data.convert.fields import short
from data.records import LETTERS

_LABEL: Final = re.compile(r"\s*\(?([A-Z])[.):]\s*(?=\S)")
_SPACED: Final = re.compile(r"\s*\(?[A-Z][.):]\s")  # "U.S." has no letter
_LETTER: Final = re.compile(r"\(?([A-Za-z])\)?[.):]?")


def options(row: Mapping[str, Any], key: str, *, labelled: bool) -> tuple[str, ...]:
    """The options of a row, without their letters.

    "A. red", "(B) blue", "C) green" and "D: grey" have letters, if all of them do and in order.

    Args:
      labelled: whether the format's options have letters; then an answer's letter means those, so
        letters in another order, or of some options only, are a fault. Else they are text.

    Raises:
      Rejection: no list of 2 to 26 texts, or letters that are not A, B, C, ...
    """
    found = row.get(key)
    if not isinstance(found, list) or not all(isinstance(x, str) and x.strip() for x in found):
        raise Rejection(f"field {key!r}: expected a list of texts", f"found {short(found)}")
    return without_letters(found, key, labelled=labelled)


def without_letters(found: Sequence[str], key: str, *, labelled: bool) -> tuple[str, ...]:
    """See `options`."""
    if not 2 <= len(found) <= len(LETTERS):
        raise Rejection(
            f"field {key!r}: expected 2 to {len(LETTERS)} options", f"found {len(found)}"
        )
    labels = [_LABEL.match(option) for option in found]
    if all(label and label[1] == LETTERS[i] for i, label in enumerate(labels)):
        return tuple(
            option[label.end() :].strip()
            for option, label in zip(found, labels, strict=True)
            if label
        )
    if labelled and any(map(_SPACED.match, found)):
        raise Rejection(
            f"field {key!r}: expected the letters A, B, C, ... in order", f"found {short(found)}"
        )
    return tuple(option.strip() for option in found)


def letter(
    answer: object, choices: Sequence[str], key: str, *, given: Literal["letter", "text"]
) -> str:
    """The letter of the option that an answer names.

    By letter it is "B", "(B)", "b." or a letter with its option's text ("B. blue"), else a text. A
    text means an option if they are equal, or else if they are once case, a final full stop and the
    number of spaces are ignored; exactly one option may be meant.

    Args:
      answer: what the file says.
      choices: the options, without letters.
      key: the field, for the `Rejection`.
      given: how the format gives answers; by letter, a text counts where no letter is found.

    Raises:
      Rejection: the answer names no option, or several.
    """
    if not isinstance(answer, str) or not answer.strip():
        raise Rejection(f"field {key!r}: expected a text", f"found {short(answer)}")
    readings = [_by_letter, _by_text] if given == "letter" else [_by_text]
    for reading in readings:
        meant = reading(answer.strip(), choices)
        if len(meant) == 1:
            return LETTERS[meant[0]]
        if meant:
            raise Rejection(
                f"field {key!r}: the answer is several of the options",
                f"found {short(answer)} for {short(list(choices))}",
            )
    raise Rejection(
        f"field {key!r}: the answer is none of the options",
        f"found {short(answer)} for {short(list(choices))}",
    )


def _by_letter(answer: str, choices: Sequence[str]) -> list[int]:
    """The options that a letter, with or without its option's text, means."""
    rest = ""
    match = _LETTER.fullmatch(answer)
    if match is None and (match := _LABEL.match(answer)):
        rest = answer[match.end() :]
    if match is None:
        return []
    number = LETTERS.find(match[1].upper())
    meant = number < len(choices) and (not rest or _plain(rest) == _plain(choices[number]))
    return [number] if meant else []


def _by_text(answer: str, choices: Sequence[str]) -> list[int]:
    equal = [i for i, option in enumerate(choices) if option == answer]
    return equal or [i for i, option in enumerate(choices) if _plain(option) == _plain(answer)]


def _plain(option: str) -> str:
    return " ".join(option.casefold().split()).removesuffix(".").rstrip()
