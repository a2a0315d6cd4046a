"""What becomes of the rows of a published file: records, rejected rows, and what was changed."""

from __future__ import annotations

import collections
import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from data.convert.reading import ConvertError, Unreadable
from data.records import Record, row_problems, write_atomically, write_manifest


class Rejection(Exception):
    """A row that cannot be used.

    Attributes:
      reason: what is wrong, alike for all rows with that fault, for counting.
      detail: what was expected and found in this row.
    """

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason = reason
        self.detail = detail


class Rejected(NamedTuple):
    """A rejected row: where it stands ("FILE:LINE" or "FILE: KEY"), why, and what it holds."""

    source: str
    reason: str
    detail: str
    row: Any


@dataclass
class Conversion:
    """The rows of a source so far; `read` = records + rejected + left out.

    Attributes:
      read: rows seen.
      records: what will be written.
      rejected: the rows that cannot be used.
      left_out: rows that the user did not ask for, by why.
      adjusted: changes to accepted rows, by what was changed, such as "end moved to the duration".
      notes: what else the user should know.
    """

    read: int = 0
    records: list[Record] = field(default_factory=list)
    rejected: list[Rejected] = field(default_factory=list)
    left_out: collections.Counter[str] = field(default_factory=collections.Counter)
    adjusted: collections.Counter[str] = field(default_factory=collections.Counter)
    notes: list[str] = field(default_factory=list)
    _taken: set[str] = field(default_factory=set, repr=False)
    _of_base: collections.Counter[str] = field(default_factory=collections.Counter, repr=False)
    _changes: list[str] = field(default_factory=list, repr=False)  # of the row at hand

    def row(self, source: str, content: Any, make: Callable[[Any], Record]) -> None:
        """Takes one row: `make(content)` is its record, or raises a `Rejection`."""
        self.read += 1
        self._changes.clear()
        try:
            record = make(content)
            if problems := row_problems(record):
                reason, _, _ = problems[0].partition(", found ")
                raise Rejection(reason, "; ".join(problems))
        except Rejection as rejection:
            rejected = Rejected(source, rejection.reason, rejection.detail, content)
            self.rejected.append(rejected)
            return
        self.adjusted.update(self._changes)
        self.records.append(record)

    def reject(self, source: str, reason: str, detail: str, content: Any) -> None:
        """Takes one row that cannot even be looked at."""
        self.read += 1
        self.rejected.append(Rejected(source, reason, detail, content))

    def leave_out(self, why: str) -> None:
        """Takes one row that was not asked for."""
        self.read += 1
        self.left_out[why] += 1

    def adjust(self, change: str) -> None:
        """Notes a change to the row at hand; it counts if the row is accepted."""
        self._changes.append(change)

    def name(self, base: str) -> str:
        """The id of the row at hand: the source's own, numbered from its second use on.

        It does not depend on which rows are accepted: name a row before anything can reject it.

            "AO8RW", "AO8RW-2", "AO8RW-3"
        """
        while True:
            self._of_base[base] += 1
            number = self._of_base[base]
            name = base if number == 1 else f"{base}-{number}"
            if name not in self._taken:
                self._taken.add(name)
                return name

    def write(self, out: str | os.PathLike[str]) -> Path:
        """Writes the manifest and, beside it, the rejected rows; returns the path of the latter.

        It has a line {"source", "reason", "detail", "row"} per rejected row, and none without any.

        Raises:
          ConvertError: there is no record; the manifest is not written, the rejected rows are.
        """
        rejects = Path(out).with_suffix(".rejects.jsonl")
        lines = [json.dumps(row._asdict(), default=_plain) for row in self.rejected]
        write_atomically(rejects, "".join(f"{line}\n" for line in lines))
        if not self.read:
            raise ConvertError(f"{out} not written: there are no rows in the files")
        if not self.records:
            raise ConvertError(
                f"{out} not written: none of the {self.read} rows can be used; {rejects} says why:"
                f"\n{summary(self)}"
            )
        write_manifest(out, self.records)
        return rejects


def _plain(value: object) -> Any:
    """For JSON: what is not of it."""
    return value.content if isinstance(value, Unreadable) else str(value)


def summary(done: Conversion) -> str:
    """Lines for the user: counts of what was rejected, changed and left out, with an example."""
    first: dict[str, Rejected] = {}
    for row in done.rejected:
        first.setdefault(row.reason, row)
    counts = collections.Counter(row.reason for row in done.rejected)
    lines = []
    for reason, count in counts.most_common():
        example = first[reason]
        detail = f" ({example.detail})" if example.detail not in ("", reason) else ""
        lines.append(f"  rejected {count:,}: {reason}; the first: {example.source}{detail}")
    lines += [f"  left out {count:,}: {why}" for why, count in done.left_out.most_common()]
    lines += [f"  changed {count:,}: {what}" for what, count in done.adjusted.most_common()]
    lines += [f"  note: {note}" for note in done.notes]
    return "\n".join(lines)
