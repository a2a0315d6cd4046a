"""`data.keep`: the part of the training items that was selected for training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data.records import Record

_SHOWN = 5  # unknown ids that a message names


class KeepError(ValueError):
    """A file of items to keep that does not fit the data."""


def kept_records(records: Sequence[Record], keep: str) -> list[Record]:
    """The records whose ids are in a JSONL file, in their own order.

    Raises:
      KeepError: it does not exist, is empty, has an id that no record has, or lines without one.
    """
    path = Path(keep)
    if not path.is_file():
        raise KeepError(f"data.keep: {keep} does not exist: expected what `jaxgrpo select` wrote")
    names = set()
    # Not splitlines(): a question may hold a character that it takes for the end of a line.
    for number, line in enumerate(path.read_bytes().split(b"\n"), start=1):
        if not line.strip():
            continue
        row = _json(line)
        if not isinstance(row, dict) or not isinstance(row.get("id"), str):
            raise KeepError(f'{keep}:{number}: expected a line like {{"id": "..."}}')
        names.add(row["id"])
    if not names:
        raise KeepError(f"data.keep: {keep} names no item: select with rules that keep some")
    unknown = sorted(names - {record.id for record in records})
    if unknown:
        shown = ", ".join(unknown[:_SHOWN])
        raise KeepError(
            f"data.keep: {len(unknown)} of the {len(names)} ids of {keep} are not in data.train "
            f"({shown}): it was selected from other data"
        )
    return [record for record in records if record.id in names]


def _json(line: bytes) -> Any:
    try:
        return json.loads(line)
    except ValueError:
        return None
