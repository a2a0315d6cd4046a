"""What becomes of a file's rows: nothing is dropped in silence."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from data.convert.conversion import Conversion, Rejection, summary
from data.convert.reading import ConvertError, NotANumber, Unreadable
from data.records import Record

RECORD = Record("a", "a.mp4", "tvg", "When?", (), None, ((0.0, 1.0),), None)


def taking(done: Conversion, source: str, **changes: Any) -> None:
    done.row(source, changes, lambda content: dataclasses.replace(RECORD, **content))


def test_a_row_that_the_manifest_would_refuse_is_rejected_with_its_reason() -> None:
    done = Conversion()
    taking(done, "f:1")
    taking(done, "f:2", question=" ")
    taking(done, "f:3", spans=((2.0, 1.0),), video="../x.mp4")
    assert [record.id for record in done.records] == ["a"] and done.read == 3
    assert [row.source for row in done.rejected] == ["f:2", "f:3"]
    assert done.rejected[0].reason == "field 'question': expected a text that is not empty"
    assert "../x.mp4" in done.rejected[1].detail and "start < end" in done.rejected[1].detail


def test_a_change_counts_only_where_the_row_is_accepted() -> None:
    done = Conversion()

    def make(accepted: bool) -> Record:
        done.adjust("end moved")
        if not accepted:
            raise Rejection("bad")
        return RECORD

    done.row("f:1", False, make)
    done.row("f:2", True, make)
    assert done.adjusted == {"end moved": 1}


def test_ids_are_the_sources_own_numbered_where_they_repeat() -> None:
    done = Conversion()
    given = ["a", "b", "a", "a-3", "a", "a"]
    assert [done.name(base) for base in given] == ["a", "b", "a-2", "a-3", "a-4", "a-5"]


def test_rejected_rows_are_written_as_json_whatever_they_hold(tmp_path: Path) -> None:
    done = Conversion()
    taking(done, "f:1")
    done.reject("f:2", "no number", "found NaN", {"x": NotANumber("NaN"), "y": "\ud800"})
    rejects = done.write(tmp_path / "train.jsonl")
    assert rejects == tmp_path / "train.rejects.jsonl"
    [line] = rejects.read_text().splitlines()
    row = {"x": "NaN", "y": "\ud800"}
    expected = {"source": "f:2", "reason": "no number", "detail": "found NaN", "row": row}
    assert json.loads(line) == expected


def test_nothing_usable_is_an_error_that_says_why(tmp_path: Path) -> None:
    done = Conversion()
    taking(done, "f:7", question="")
    with pytest.raises(ConvertError, match="none of the 1 rows can be used") as caught:
        done.write(tmp_path / "out.jsonl")
    assert "field 'question'" in str(caught.value) and "f:7" in str(caught.value)
    assert [path.name for path in tmp_path.iterdir()] == ["out.rejects.jsonl"]


def test_files_without_rows_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="there are no rows in the files"):
        Conversion().write(tmp_path / "out.jsonl")


def test_the_summary_counts_each_reason_with_its_first_row() -> None:
    done = Conversion(notes=["by the way"])
    for source in ("f:1", "f:2"):
        done.reject(source, "too short", f"found {source}", None)
    done.reject("f:3", "too long", "", None)
    done.leave_out("not wanted")
    done.adjusted["moved"] += 1200
    assert summary(done).splitlines() == [
        "  rejected 2: too short; the first: f:1 (found f:1)",
        "  rejected 1: too long; the first: f:3",
        "  left out 1: not wanted",
        "  changed 1,200: moved",
        "  note: by the way",
    ]
    assert done.read == 4


def test_an_unreadable_row_is_written_as_it_stood(tmp_path: Path) -> None:
    done = Conversion()
    taking(done, "f:1")
    done.reject("f:2", "not JSON", "line 1", Unreadable("not JSON", "line 1", '{"a":'))
    assert json.loads(done.write(tmp_path / "out.jsonl").read_text())["row"] == '{"a":'
