"""Temporal-R1: spans as shares of the video, and which rows a sampling_strategy takes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from data.convert import temporal_r1
from data.convert.reading import ConvertError
from data.convert.temporal_r1 import Part, chosen
from tests.data.convert.files import json_file, reasons, written

GOOD: dict[str, Any] = {
    "dataset": "charades_train",
    "video": "AO8RW.mp4",
    "problem": "person puts a book on a shelf.",
    "solution": [0.1, 0.4],
    "video_length": 30.5,
}
BAD = [
    {**GOOD, "solution": [0.4, 0.4]},
    {**GOOD, "solution": [3.0, 12.2]},
    {**GOOD, "solution": [0.4]},
    {**GOOD, "solution": "[0.1, 0.4]"},
    {**GOOD, "solution": [0.1, float("nan")]},
    {**GOOD, "solution": [1.0, 1.2]},
    {**GOOD, "video_length": 0},
    {**GOOD, "video_length": None},
    {**GOOD, "problem": " "},
    {**GOOD, "video": "/data/AO8RW.mp4"},
    {key: value for key, value in GOOD.items() if key != "video"},
    ["AO8RW.mp4"],
]


def test_shares_become_seconds_and_bad_rows_are_named(tmp_path: Path) -> None:
    rows = [GOOD, *BAD, {**GOOD, "solution": [0.9, 0.2]}, {**GOOD, "solution": [0.5, 1.0004]}]
    path = json_file(tmp_path / "charades.json", rows)
    done = temporal_r1.convert([Part(path, "charades")])
    first, swapped, clamped = written(done, tmp_path)
    assert (first.id, first.video) == ("charades_train-AO8RW", "charades/AO8RW.mp4")
    assert (first.task, first.question) == ("tvg", GOOD["problem"])
    assert (first.spans, first.duration) == (((3.05, 12.2),), 30.5)
    assert (swapped.id, swapped.spans) == ("charades_train-AO8RW-12", ((6.1, 27.45),))
    assert clamped.spans == ((15.25, 30.5),)
    assert done.adjusted == {"start and end exchanged": 1, "end moved to the video's end": 1}
    assert reasons(done) == {
        "the span is empty": 1,
        "field 'solution': expected shares of the video's length": 1,
        "field 'solution': expected [start, end]": 2,
        "field 'solution': expected a number": 1,
        "the span starts at the end of the video, or later": 1,
        "field 'video_length': expected seconds above 0": 1,
        "field 'video_length': expected a number": 1,
        "field 'problem': expected a text": 1,
        "the video's path is not one below the root": 1,
        "field 'video': expected a text": 1,
        "not a JSON object": 1,
    }


def test_lines_of_json_are_the_same(tmp_path: Path) -> None:
    path = tmp_path / "charades.jsonl"
    path.write_text('{"video": "a.mp4", "problem": "p", "solution": [0, 1], "video_length": 9}\n{')
    done = temporal_r1.convert([Part(path)], "clips/{id}")
    [record] = written(done, tmp_path)
    assert (record.id, record.video, record.spans) == ("a", "clips/a.mp4", ((0.0, 9.0),))
    assert reasons(done) == {"not JSON": 1} and done.rejected[0].source == f"{path}:2"


@pytest.mark.parametrize(
    ("strategy", "places"),
    [
        ("all", {0, 1, 2, 3, 4}),
        ("first:2", {0, 1}),
        ("end:2", {3, 4}),
        ("first:50%", {0, 1, 2}),  # 2.5, rounded up
        ("end:0.1%", {4}),
        ("first:100%", {0, 1, 2, 3, 4}),
        ("end:99", {0, 1, 2, 3, 4}),
        ("first:0", set()),
    ],
)
def test_a_strategy_takes_rows_by_their_place(strategy: str, places: set[int]) -> None:
    assert chosen(strategy, 5, 0, 0) == places


def test_a_random_strategy_is_the_same_for_a_seed_and_differs_by_seed_and_file() -> None:
    draws = [chosen("random:40%", 50, seed, part) for seed in (0, 1) for part in (0, 1)]
    assert all(len(draw) == 20 and draw <= set(range(50)) for draw in draws)
    assert len(set(map(frozenset, draws))) == 4
    assert chosen("random:20", 50, 0, 0) == draws[0] and chosen("random:99", 50, 0, 0) == {
        *range(50)
    }


@pytest.mark.parametrize(
    "strategy", ["", "last:3", "first", "first:", "first:-1", "first:1.5", "random:101%", "all:3"]
)
def test_a_strategy_that_is_none_is_an_error(strategy: str) -> None:
    with pytest.raises(ConvertError, match="expected all, first:N, end:N or random:N"):
        chosen(strategy, 5, 0, 0)


def test_rows_that_were_not_asked_for_are_counted_and_leave_the_ids_of_others(
    tmp_path: Path,
) -> None:
    path = json_file(tmp_path / "a.json", [{**GOOD, "video": f"{i}.mp4"} for i in range(4)])
    done = temporal_r1.convert([Part(path, "a", "end:1"), Part(path, "b", "first:25%")])
    records = written(done, tmp_path)
    assert [record.video for record in records] == ["a/3.mp4", "b/0.mp4"]
    assert sum(done.left_out.values()) == 6 and done.read == 8
    assert f"not in sampling_strategy end:1 of {path}" in done.left_out


def test_a_seed_is_no_negative_number(tmp_path: Path) -> None:
    with pytest.raises(ConvertError, match="--seed is -1"):
        temporal_r1.convert([Part(json_file(tmp_path / "a.json", [GOOD]))], seed=-1)
