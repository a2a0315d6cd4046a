"""What the tests of converters share."""

from __future__ import annotations

import collections
import json
from pathlib import Path
from typing import Any

from data.convert.conversion import Conversion
from data.records import Record, read_manifest


def json_file(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content), encoding="utf-8")
    return path


def written(done: Conversion, folder: Path) -> list[Record]:
    """The records as the manifest gives them back; the counts must agree with the rows read."""
    assert done.read == len(done.records) + len(done.rejected) + sum(done.left_out.values())
    rejects = done.write(folder / "out.jsonl")
    rows = [json.loads(line) for line in rejects.read_text().splitlines()]
    assert [row["source"] for row in rows] == [row.source for row in done.rejected]
    records = read_manifest(folder / "out.jsonl", folder)
    assert records == done.records
    return records


def reasons(done: Conversion) -> dict[str, int]:
    """How many rows were rejected for which reason."""
    return dict(collections.Counter(row.reason for row in done.rejected))
