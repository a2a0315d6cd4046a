"""The items that `data.keep` names."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.records import Record
from jaxgrpo.keep import KeepError, kept_records

RECORDS = [Record(name, "a.mp4", "mcqa", "Which?", ("red", "blue"), "B", (), 9.0) for name in "abc"]


def test_named_items_are_kept_in_the_order_of_the_data(tmp_path: Path) -> None:
    keep = tmp_path / "keep.jsonl"
    rows = [{"id": "c", "question": "Next line:\u2028 or \x85?"}, {"id": "a"}]
    keep.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")
    assert kept_records(RECORDS, str(keep)) == [RECORDS[0], RECORDS[2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"id": "nobody"}\n', "1 of the 1 ids of .* are not in data.train .nobody.: it was"),
        ('{"id": "a"}\n{"ID": "a"}\n', 'keep.jsonl:2: expected a line like {"id": "..."}'),
        ("{", "keep.jsonl:1: expected a line"),
        ("", "keep.jsonl names no item: select with rules that keep some"),
    ],
)
def test_a_file_that_does_not_fit_is_refused(tmp_path: Path, text: str, message: str) -> None:
    keep = tmp_path / "keep.jsonl"
    keep.write_text(text)
    with pytest.raises(KeepError, match=message):
        kept_records(RECORDS, str(keep))


def test_a_file_that_is_not_there_is_refused() -> None:
    with pytest.raises(KeepError, match="nowhere does not exist: expected what `jaxgrpo select`"):
        kept_records(RECORDS, "nowhere")
