"""The manifest: strict rows, every problem named."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from data.records import (
    LATEST,
    ManifestError,
    Record,
    is_span,
    merge_spans,
    read_manifest,
    write_manifest,
)

MCQA = {
    "id": "a",
    "video": "clips/a.mp4",
    "task": "mcqa",
    "question": "Which color appears first?",
    "options": ["red", "blue"],
    "answer": "B",
}
TVG = {"id": "b", "video": "b.mp4", "task": "tvg", "question": "A door opens", "spans": [[1, 2.5]]}
NUMBER = {"id": "d", "video": "b.mp4", "task": "number", "question": "How many?", "answer": "-3.50"}
REGRESSION = {**NUMBER, "id": "e", "task": "regression", "question": "How long?", "answer": "12"}
OCR = {**NUMBER, "id": "f", "task": "ocr", "question": "What is written?", "answer": "Stop  now"}
TEXT = {**NUMBER, "id": "g", "task": "text", "question": "What is opened?", "answer": "A door."}
GQA = {**MCQA, "id": "c", "task": "gqa", "spans": [[0.5, 2.0], [3.0, 4.0]], "duration": 4.0}


def write_rows(path: Path, *rows: Any) -> Path:
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows), encoding="utf-8")
    return path


def problem_of(tmp_path: Path, row: Any) -> str:
    """The message about a manifest with this one row."""
    with pytest.raises(ManifestError) as caught:
        read_manifest(write_rows(tmp_path / "m.jsonl", row), tmp_path)
    return str(caught.value)


def test_rows_of_choices_and_spans_become_records(tmp_path: Path) -> None:
    mcqa, tvg, gqa = read_manifest(write_rows(tmp_path / "m.jsonl", MCQA, TVG, GQA), tmp_path)
    assert mcqa == Record(
        id="a",
        video="clips/a.mp4",
        task="mcqa",
        question="Which color appears first?",
        options=("red", "blue"),
        answer="B",
        spans=(),
        duration=None,
        clip=None,
    )
    assert tvg.spans == ((1.0, 2.5),) and tvg.options == () and tvg.answer is None
    assert gqa.spans == ((0.5, 2.0), (3.0, 4.0)) and gqa.duration == 4.0


def test_rows_of_numbers_and_texts_become_records(tmp_path: Path) -> None:
    rows = [NUMBER, REGRESSION, OCR, TEXT]
    found = read_manifest(write_rows(tmp_path / "m.jsonl", *rows), tmp_path)
    assert [(r.task, r.answer) for r in found] == [(row["task"], row["answer"]) for row in rows]
    assert all(r.options == () and r.spans == () for r in found)


def test_blank_lines_windows_line_ends_and_a_byte_order_mark_are_harmless(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(MCQA).encode() + b"\r\n\r\n\n")
    assert len(read_manifest(path, tmp_path)) == 1


@pytest.mark.parametrize(
    ("base", "change", "expected"),
    [
        (MCQA, {"id": 7}, ["'id'", "expected a text", "found 7"]),
        (MCQA, {"question": "  "}, ["'question'", "not empty"]),
        (MCQA, {"rationale": 3}, ["'rationale'", "found 3", "leave it out"]),
        (MCQA, {"question": "\ud800"}, ["'question'", "surrogate"]),
        (MCQA, {"task": "vqa"}, ["'task'", "mcqa, tvg, gqa", "'vqa'"]),
        (MCQA, {"task": None}, ["'task'", "expected a text"]),
        (MCQA, {"answr": "B"}, ["'answr'", "mend its name"]),
        (MCQA, {"video": "../a.mp4"}, ["'video'", "inside the root", "'../a.mp4'"]),
        (MCQA, {"video": "x/../../a.mp4"}, ["'video'", "inside the root"]),
        (MCQA, {"video": "/etc/a.mp4"}, ["'video'", "inside the root"]),
        (MCQA, {"video": "."}, ["'video'", "inside the root"]),
        (MCQA, {"video": "a\0.mp4"}, ["'video'", "NUL"]),
        (MCQA, {"options": ["red"]}, ["'options'", "2 to 26"]),
        (MCQA, {"options": "red, blue"}, ["'options'", "a list"]),
        (MCQA, {"options": ["red", 3]}, ["'options', number 2", "found 3"]),
        (MCQA, {"options": ["red", "red"]}, ["'options'", "different"]),
        (MCQA, {"options": ["A. red", "B. blue"]}, ["'options'", "remove the letters"]),
        (MCQA, {"answer": "C"}, ["'answer'", "A to B", "'C'"]),
        (MCQA, {"answer": "b"}, ["'answer'", "'b'"]),
        (MCQA, {"answer": "blue"}, ["'answer'", "write 'B'"]),
        (MCQA, {"answer": None}, ["'answer'", "found nothing"]),
        (MCQA, {"answer": ["B"]}, ["'answer'"]),
        (MCQA, {"spans": [[1, 2]]}, ["'spans'", "use task 'gqa'"]),
        (MCQA, {"task": "number"}, ["'options'", "expected none for task 'number'", "'mcqa'"]),
        (NUMBER, {"answer": 3}, ["'answer'", "decimal number as a text", "found 3"]),
        (NUMBER, {"answer": "1e3"}, ["'answer'", "'1e3'", "exponent"]),
        (NUMBER, {"answer": "1,234"}, ["'answer'", "thousands separator"]),
        (NUMBER, {"answer": "9" * 16}, ["'answer'"]),
        (NUMBER, {"spans": [[1, 2]]}, ["'spans'", "task 'number'", "use task 'tvg'"]),
        (REGRESSION, {"answer": "٣"}, ["'answer'", "decimal number"]),
        (REGRESSION, {"answer": None}, ["'answer'", "found nothing"]),
        (OCR, {"answer": " "}, ["'answer'", "not empty"]),
        (OCR, {"answer": "x" * 2001}, ["'answer'", "at most 2,000 characters, found 2,001"]),
        (TEXT, {"answer": "a </answer>"}, ["'answer'", "without '</answer>'"]),
        (TEXT, {"answer": "ドア"}, ["'answer'", "ROUGE", "task 'ocr'"]),
        (TVG, {"answer": "A"}, ["'answer'", "use task 'gqa'"]),
        (TVG, {"spans": []}, ["'spans'", "[start, end]"]),
        (TVG, {"spans": [1, 2]}, ["'spans', number 1", "[start, end]"]),
        (TVG, {"spans": [[3, 1]]}, ["'spans', number 1", "start < end", "swap"]),
        (TVG, {"spans": [[3, 3]]}, ["'spans', number 1", "empty"]),
        (TVG, {"spans": [[-1, 3]]}, ["'spans', number 1"]),
        (TVG, {"spans": [[True, 3]]}, ["'spans', number 1"]),
        (TVG, {"spans": [["0", "3"]]}, ["'spans', number 1"]),
        (TVG, {"spans": [[0, 1e400]]}, ["Infinity"]),
        (TVG, {"spans": [[0, 1000001]]}, ["'spans', number 1", "0 to 1,000,000"]),
        (TVG, {"spans": [[900000, 900000.01]]}, ["'spans', number 1", "float32", "lengthen"]),
        (TVG, {"duration": 1e7}, ["'duration'", "at most 1,000,000"]),
        (TVG, {"spans": [[0, 9.5]], "duration": 8}, ["'spans', number 1", "duration of 8 s"]),
        (TVG, {"spans": [[8, 8.5]], "duration": 8}, ["'spans', number 1", "duration of 8 s"]),
        (TVG, {"duration": 0}, ["'duration'", "above 0"]),
        (TVG, {"duration": "8"}, ["'duration'", "'8'"]),
        (TVG, {"clip": [5, 4]}, ["'clip'", "swap"]),
        (TVG, {"clip": [4, 9.1], "duration": 8}, ["'clip'", "duration of 8 s"]),
        (TVG, {"clip": [4, 5], "spans": [[0, 4]]}, ["'spans', number 1", "clip's length of 1 s"]),
    ],
)
def test_a_bad_field_is_named_with_what_was_expected_and_found(
    tmp_path: Path, base: dict[str, Any], change: dict[str, Any], expected: list[str]
) -> None:
    message = problem_of(tmp_path, {**base, **change})
    assert "m.jsonl:1: " in message
    for part in expected:
        assert part in message


@pytest.mark.parametrize("name", ["id", "video", "task", "question"])
def test_a_missing_field_is_named(tmp_path: Path, name: str) -> None:
    row = {key: value for key, value in MCQA.items() if key != name}
    assert f"field {name!r}: expected a text, found no such field" in problem_of(tmp_path, row)


def test_an_end_that_only_a_rounded_duration_cuts_is_accepted(tmp_path: Path) -> None:
    row = {**TVG, "spans": [[1, 8.7]], "duration": 8}
    assert read_manifest(write_rows(tmp_path / "m.jsonl", row), tmp_path)[0].spans == ((1, 8.7),)


@pytest.mark.parametrize(
    ("line", "expected"),
    [
        (b"[1, 2]", "expected a JSON object"),
        (b'{"id": "a", "id": "b"}', "'id' twice"),
        (b'{"duration": NaN}', "NaN"),
        (b'{"id": "a"', "delimiter"),
        (b"\xff\xfe", "utf-8"),
        (b"[" * 100_000, "JSON"),
    ],
)
def test_a_line_that_is_not_one_json_object_is_named(
    tmp_path: Path, line: bytes, expected: str
) -> None:
    path = tmp_path / "m.jsonl"
    path.write_bytes(json.dumps(MCQA).encode() + b"\n" + line)
    with pytest.raises(ManifestError, match="m.jsonl:2: ") as caught:
        read_manifest(path, tmp_path)
    assert expected in str(caught.value)


def test_a_repeated_id_names_both_lines(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "m.jsonl", MCQA, TVG, {**GQA, "id": "a"})
    with pytest.raises(ManifestError, match=r"m.jsonl:3: field 'id'.*'a' of line 1 again"):
        read_manifest(path, tmp_path)


def test_all_problems_are_counted_and_the_first_twenty_listed(tmp_path: Path) -> None:
    rows = [{**MCQA, "id": str(i), "answer": "Z"} for i in range(30)]
    with pytest.raises(ManifestError) as caught:
        read_manifest(write_rows(tmp_path / "m.jsonl", *rows), tmp_path)
    lines = str(caught.value).splitlines()
    assert "30 problems" in lines[0]
    assert [line.split(": ")[0].rsplit(":", 1)[1] for line in lines[1:-1]] == [
        str(i) for i in range(1, 21)
    ]
    assert lines[-1] == "... and 10 more"


def test_a_missing_and_an_empty_manifest_are_errors(tmp_path: Path) -> None:
    with pytest.raises(ManifestError, match="expected a JSONL manifest"):
        read_manifest(tmp_path / "none.jsonl", tmp_path)
    (tmp_path / "m.jsonl").write_text("\n")
    with pytest.raises(ManifestError, match="at least one row"):
        read_manifest(tmp_path / "m.jsonl", tmp_path)


texts = st.text(min_size=1).filter(str.strip)
seconds = st.floats(0, LATEST)


@st.composite
def records(draw: st.DrawFn) -> Record:
    task = draw(st.sampled_from(["mcqa", "tvg", "gqa"]))
    options: tuple[str, ...] = ()
    if task != "tvg":
        options = tuple(f"{text}?" for text in draw(st.sets(texts, min_size=2, max_size=26)))
    ends = st.tuples(seconds, seconds).map(sorted).filter(lambda ends: is_span(*ends))
    spans = draw(st.lists(ends, min_size=1, max_size=4)) if task != "mcqa" else []
    return Record(
        id=draw(texts),
        video="clips/a b\N{SNOWMAN}.mp4",
        task=task,
        question=draw(texts),
        options=options,
        answer=draw(st.sampled_from("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(options)] or [None])),
        spans=tuple((start, end) for start, end in spans),
        duration=draw(st.none() | st.just(LATEST)),
        rationale=draw(st.none() | texts),
    )


@given(st.lists(records(), min_size=1, max_size=5, unique_by=lambda record: record.id))
def test_what_is_written_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, written: list[Record]
) -> None:
    path = tmp_path_factory.mktemp("manifest") / "m.jsonl"
    write_manifest(path, written)
    assert read_manifest(path, path.parent) == written


def test_spans_merge_where_they_overlap_or_touch() -> None:
    assert merge_spans([(5, 9), (0, 2), (1, 4), (9, 10)]) == [(0, 4), (5, 10)]
    assert merge_spans([(0, 9), (1, 2)]) == [(0, 9)]
    assert merge_spans([]) == []


def test_a_record_that_would_be_refused_is_not_written(tmp_path: Path) -> None:
    path = tmp_path / "m.jsonl"
    good = read_manifest(write_rows(path, MCQA), tmp_path)[0]
    before = path.read_bytes()
    for bad in (
        dataclasses.replace(good, answer="Z"),
        dataclasses.replace(good, duration=float("nan")),
        dataclasses.replace(good, video="../x.mp4"),
    ):
        with pytest.raises(ManifestError, match="record 'a': field"):
            write_manifest(path, [good, bad])
    with pytest.raises(ManifestError, match="twice"):
        write_manifest(path, [good, good])
    with pytest.raises(ManifestError, match="at least one record"):
        write_manifest(path, [])
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["m.jsonl"]
