"""Opening published files: a bad row is that row's, a wrong file is an error with its name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from data.convert.reading import (
    ConvertError,
    NotANumber,
    Unreadable,
    csv_rows,
    json_object,
    json_rows,
    text_rows,
)


def file(tmp_path: Path, content: str | bytes) -> Path:
    path = tmp_path / "file"
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


def test_a_list_and_lines_of_json_are_the_same_rows(tmp_path: Path) -> None:
    path = file(tmp_path, ' [{"a": 1}, {"a": 2}]')
    assert [row for _, row in json_rows(path)] == [{"a": 1}, {"a": 2}]
    assert [source for source, _ in json_rows(path)] == [f"{path}: item 1", f"{path}: item 2"]
    path = file(tmp_path, '\ufeff{"a": 1}\r\n\n{"a": "\u2028"}')
    assert list(json_rows(path)) == [(f"{path}:1", {"a": 1}), (f"{path}:3", {"a": "\u2028"})]


def test_a_line_that_is_no_json_is_that_rows_fault(tmp_path: Path) -> None:
    rows = [row for _, row in json_rows(file(tmp_path, '{"a":\n{"a": 1}\n{"a": 1, "a": 2}\n'))]
    assert rows[1] == {"a": 1}
    assert isinstance(rows[0], Unreadable) and rows[0].content == '{"a":'
    assert isinstance(rows[2], Unreadable) and "'a' twice" in rows[2].detail


def test_what_is_no_number_in_json_is_not_taken_for_one(tmp_path: Path) -> None:
    [(_, row)] = json_rows(file(tmp_path, f"[[NaN, -Infinity, 1e999, {'9' * 5000}, 1e3]]"))
    assert [isinstance(x, NotANumber) for x in row] == [True, True, True, True, False]
    assert str(row[0]) == "NaN"


def test_a_key_that_stands_twice_is_never_overlooked(tmp_path: Path) -> None:
    found = json_object(file(tmp_path, '{"a": {"b": [{"c": 1, "c": 2}]}, "d": 1}'))
    assert isinstance(found["a"], Unreadable) and found["d"] == 1
    with pytest.raises(ConvertError, match="the key 'a' stands there twice"):
        json_object(file(tmp_path, '{"a": 1, "a": 2}'))


@pytest.mark.parametrize("levels", [70, 900])
def test_a_row_nested_too_deeply_is_that_rows_fault(tmp_path: Path, levels: int) -> None:
    deep = "[" * levels + "]" * levels
    for content in (f'[{{"a": {deep}}}, {{"a": [[1]]}}]', f'{{"a": {deep}}}\n{{"a": [[1]]}}'):
        bad, good = [row for _, row in json_rows(file(tmp_path, content))]
        assert isinstance(bad, Unreadable) and bad.reason == "nested too deeply"
        assert good == {"a": [[1]]}


def test_csv_cells_may_hold_commas_and_line_ends(tmp_path: Path) -> None:
    path = file(tmp_path, '\ufeffid,length,x\r\nA,"1,5","two\nlines"\r\n\r\nB,2\r\nC,3,z\r\n')
    rows = list(csv_rows(path, ("id", "length")))
    assert rows[0] == (f"{path}:3", {"id": "A", "length": "1,5", "x": "two\nlines"})
    assert isinstance(rows[1].content, Unreadable) and rows[1].source == f"{path}:5"
    assert rows[2].content["id"] == "C"


def test_lines_of_text_have_numbers(tmp_path: Path) -> None:
    path = file(tmp_path, "a\r\n\r\n b \n")
    assert list(text_rows(path)) == [(f"{path}:1", "a"), (f"{path}:3", "b")]


@pytest.mark.parametrize(
    ("read", "content", "expected"),
    [
        (json_rows, "id,question\n", "expected a JSON list .* it begins with 'id,question"),
        (json_rows, '[{"a": 1}', "file: is not JSON"),
        (json_rows, "[" * 100_000, "file: is not JSON"),
        (json_rows, '{"a": "\xe9"}'.encode("latin-1"), "file:1: expected UTF-8, found the byte 0x"),
        (json_object, "[1]", "expected a JSON object {...}, found a list"),
        (lambda path: csv_rows(path, ("id", "length")), "id,long\n", "found none named length"),
        (lambda path: csv_rows(path, ("id",)), "", "found none named id"),
        (lambda path: csv_rows(path, ("id",)), 'id\na\n"b\nc\n', "is not csv"),
        (text_rows, b"a\nb\xff\n", "file:2: expected UTF-8"),
        (text_rows, "a b".encode("utf-16"), "expected UTF-8, found the byte 0xff"),
    ],
)
def test_a_file_of_another_shape_is_an_error(
    read: Callable[[Path], Any], content: str | bytes, expected: str, tmp_path: Path
) -> None:
    with pytest.raises(ConvertError, match=expected):
        list(read(file(tmp_path, content)))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="gone.json: cannot be read: No such file"):
        json_object(tmp_path / "gone.json")
