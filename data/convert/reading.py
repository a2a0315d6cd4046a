"""Opening published files: JSON, JSONL, csv and text lines, in UTF-8 with or without its mark.

A file that is not of its kind at all is a `ConvertError`. What concerns one row alone comes back as
an `Unreadable` in the row's place, to be rejected with its line: a line that is no JSON, a key that
stands twice in an object. NaN, Infinity and numbers beyond float64 become `NotANumber`s, which no
field accepts, so that they reject only the rows in which somebody looks at them.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

_LARGEST_CELL: Final = 1 << 24  # bytes of a csv field
_DEEPEST: Final = 64  # levels of JSON in a row; no format has more than 6


class ConvertError(ValueError):
    """A file that has another shape than its format, or of which nothing can be used."""


@dataclass(frozen=True)
class NotANumber:
    """What stood in a JSON file where a number should be: NaN, Infinity, 1e999."""

    text: str

    def __repr__(self) -> str:
        return self.text

    __str__ = __repr__


@dataclass(frozen=True)
class Unreadable:
    """A row that cannot be read: why, and the text or the object as far as it is known."""

    reason: str
    detail: str
    content: Any


class Row(NamedTuple):
    """A row and where it stands, as "FILE:LINE" or "FILE: item N"."""

    source: str
    content: Any


class _Twice(dict[str, Any]):
    """An object of which one key stands twice."""

    def __init__(self, pairs: list[tuple[str, Any]], key: str) -> None:
        super().__init__(pairs)
        self.key = key


def json_rows(path: Path) -> Iterator[Row]:
    """The objects of a JSON list, or of JSONL (an object per line; blank lines are skipped).

    Raises:
      ConvertError: it is neither.
    """
    text = _text(path)
    if text.strip() and text.lstrip()[0] not in "[{":
        raise ConvertError(
            f"{path}: expected a JSON list [...], or JSONL with an object {{...}} on each line; it "
            f"begins with {text.lstrip()[:40]!r}"
        )
    if text.lstrip().startswith("["):
        items = _parse(text, path)
        for number, item in enumerate(items, start=1):
            yield Row(f"{path}: item {number}", _checked(item))
        return
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            item = _checked(_load(line))
        except (ValueError, RecursionError) as error:
            item = Unreadable("not JSON", str(error), line)
        yield Row(f"{path}:{number}", item)


def json_object(path: Path) -> dict[str, Any]:
    """The one object that a file is; its values may be `Unreadable`.

    Raises:
      ConvertError: it is something else, or one of its own keys stands twice.
    """
    found = _parse(_text(path), path)
    if not isinstance(found, dict):
        raise ConvertError(
            f"{path}: expected a JSON object {{...}}, found a {type(found).__name__}: is it "
            "another file of the dataset?"
        )
    if isinstance(found, _Twice):
        raise ConvertError(f"{path}: the key {found.key!r} stands there twice: remove one of them")
    return {key: _checked(value) for key, value in found.items()}


def csv_rows(path: Path, columns: tuple[str, ...]) -> Iterator[Row]:
    """The rows of a csv file with a header, each as a dict of texts.

    Raises:
      ConvertError: it is not csv, or lacks one of `columns`.
    """
    limit = csv.field_size_limit(_LARGEST_CELL)
    reader = csv.reader(io.StringIO(_text(path), newline=""), strict=True)
    try:
        header = next(reader, [])
        if missing := [name for name in columns if name not in header]:
            raise ConvertError(
                f"{path}: expected a csv file with the columns {', '.join(columns)}; found none "
                f"named {', '.join(missing)} in the first line {','.join(header)[:200]!r}"
            )
        for cells in reader:
            if not cells:  # a blank line
                continue
            row: Any = dict(zip(header, cells, strict=False))
            if len(cells) != len(header):
                detail = f"expected {len(header)} cells, found {len(cells)}"
                row = Unreadable("wrong number of csv cells", detail, cells)
            yield Row(f"{path}:{reader.line_num}", row)
    except csv.Error as error:
        raise ConvertError(f"{path}:{reader.line_num}: is not csv: {error}") from error
    finally:
        csv.field_size_limit(limit)


def text_rows(path: Path) -> Iterator[Row]:
    """The lines of a text file that are not blank.

    Raises:
      ConvertError: it is not UTF-8.
    """
    for number, line in enumerate(_text(path).split("\n"), start=1):
        if line.strip():
            yield Row(f"{path}:{number}", line.strip())


def _text(path: Path) -> str:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise ConvertError(f"{path}: cannot be read: {error.strerror}") from error
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise ConvertError(
            f"{path}:{line}: expected UTF-8, found the byte 0x{content[error.start]:02x} "
            f"({error.reason}): convert the file, for example with iconv"
        ) from error


def _parse(text: str, path: Path) -> Any:
    try:
        return _load(text)
    except (ValueError, RecursionError) as error:
        raise ConvertError(f"{path}: is not JSON: {error}") from error


def _load(text: str) -> Any:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) == len(pairs):
            return row
        names = [name for name, _ in pairs]
        return _Twice(pairs, next(name for name in names if names.count(name) > 1))

    return json.loads(
        text,
        parse_constant=NotANumber,
        parse_float=_float,
        parse_int=_int,
        object_pairs_hook=once,
    )


def _float(text: str) -> float | NotANumber:
    number = float(text)
    return number if math.isfinite(number) else NotANumber(text)


def _int(text: str) -> int | NotANumber:
    # No time, length or index has 19 digits, and Python refuses to read thousands of them.
    return int(text) if len(text) < 19 else NotANumber(text[:40])


def _checked(value: Any) -> Any:
    """`value`, or an `Unreadable`: an object in it has a key twice, or it is nested too deeply."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        for item in level:
            if isinstance(item, _Twice):
                detail = f"found {item.key!r} twice in one object"
                return Unreadable("a key stands twice", detail, value)
        inside = [item.values() if isinstance(item, dict) else item for item in level]
        level = [x for part in inside for x in part if isinstance(x, dict | list)]
        if not level:
            return value
    # Without its content, which could be neither shown nor written again.
    return Unreadable("nested too deeply", f"found more than {_DEEPEST} levels", None)
