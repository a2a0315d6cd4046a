"""Fields that most formats have: texts, numbers, a video's path, a time span."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping
from typing import Any, Final

from data.convert.conversion import Conversion, Rejection
from data.convert.reading import ConvertError, Unreadable
from data.records import LATEST, Span

_DRIVE: Final = re.compile(r"[A-Za-z]:")
_SHOWN: Final = 120  # characters of a value in a message


def row_of(content: Any) -> Mapping[str, Any]:
    """A row that is an object.

    Raises:
      Rejection: it cannot be read, or is something else.
    """
    if isinstance(content, Unreadable):
        raise Rejection(content.reason, content.detail)
    if not isinstance(content, Mapping):
        raise Rejection("not a JSON object", f"expected {{...}}, found {short(content)}")
    return content


def text(row: Mapping[str, Any], key: str) -> str:
    """A text that is not empty, without the spaces around it."""
    value = row.get(key)
    if not isinstance(value, str) or not value.strip():
        raise Rejection(f"field {key!r}: expected a text", f"found {short(value)}")
    return value.strip()


def seconds(value: object, what: str) -> float:
    """A finite number; texts of numbers (csv) too. `what` names it in a `Rejection`."""
    number = None
    if isinstance(value, int | float) and not isinstance(value, bool):
        number = float(value)
    elif isinstance(value, str) and re.fullmatch(r"\s*[-+]?[0-9.]+(e[-+]?[0-9]+)?\s*", value):
        try:
            number = float(value)
        except ValueError:  # "1.2.3"
            number = None
    if number is None or not abs(number) <= LATEST:
        raise Rejection(f"{what}: expected a number", f"found {short(value)}")
    return number


def length(value: object, what: str) -> float:
    """As `seconds`, of something that lasts."""
    number = seconds(value, what)
    if number <= 0:
        raise Rejection(f"{what}: expected seconds above 0", f"found {short(value)}")
    return number


def check_pattern(pattern: str) -> str:
    """The pattern, or a `ConvertError`: it needs {id}, and no other braces."""
    if "{id}" not in pattern or set("{}") & set(pattern.replace("{id}", "")):
        raise ConvertError(
            f"--videos is {pattern!r}, expected a path below data.root in which {{id}} stands for "
            "the video as the file names it, for example 'charades/{id}.mp4'"
        )
    return pattern


def video_path(pattern: str, name: str) -> str:
    """The path of a video below the data root, with {id} of `pattern` replaced by its name.

    Raises:
      Rejection: the path is none, or does not stay below the root.
    """
    path = pattern.replace("{id}", name)
    if not (_stays(name) and _stays(path)):
        raise Rejection(
            "the video's path is not one below the root",
            f"expected a relative path with forward slashes, found {short(path)}",
        )
    plain = posixpath.normpath(path)
    if not posixpath.splitext(plain)[1]:
        raise Rejection(
            "the video's path has no extension",
            f"is it a folder of frames, or is --videos missing? found {short(path)}",
        )
    return plain


def _stays(path: str) -> bool:
    plain = posixpath.normpath(path)
    leaves = plain.startswith(("/", "../")) or plain in (".", "..")
    foreign = "\\" in path or "\0" in path or "://" in path or _DRIVE.match(path)
    return not (leaves or foreign)


def span(start: float, end: float, duration: float | None, done: Conversion) -> Span:
    """A true span within [0, duration] in seconds, to the millisecond.

    As the loaders of these datasets do: ends in the wrong order are exchanged, an end outside of
    the video is moved to its edge (both are counted as changes), and a span that does not overlap
    the video at all is rejected.

    Raises:
      Rejection: no span is left.
    """
    changes = []
    if start > end:
        start, end = end, start
        changes.append("start and end exchanged")
    found = f"found [{start:g}, {end:g}]" + (f" in {duration:g} s" if duration else "")
    if duration is not None and start >= duration:
        raise Rejection("the span starts at the end of the video, or later", found)
    if duration is not None and end > duration:
        end = duration
        changes.append("end moved to the video's end")
    if start < 0:
        start = 0.0
        changes.append("start moved to 0")
    start, end = round(start, 3), round(end, 3)
    if start >= end:
        raise Rejection("the span is empty", found)
    for change in changes:
        done.adjust(change)
    return start, end


def pair(value: object, what: str) -> Span:
    """Two numbers, in any order."""
    if not isinstance(value, list) or len(value) != 2:
        raise Rejection(f"{what}: expected [start, end]", f"found {short(value)}")
    return seconds(value[0], what), seconds(value[1], what)


def short(value: object) -> str:
    """A value as messages show it."""
    shown = "nothing" if value is None else repr(value)
    return shown if len(shown) <= _SHOWN else shown[: _SHOWN - 3] + "..."
