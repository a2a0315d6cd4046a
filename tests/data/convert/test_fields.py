"""Fields of published rows: paths stay below the root, spans inside the video."""

from __future__ import annotations

import pytest

from data.convert.conversion import Conversion, Rejection
from data.convert.fields import check_pattern, length, pair, seconds, span, text, video_path
from data.convert.reading import ConvertError, NotANumber
from data.records import Record

RECORD = Record("a", "a.mp4", "tvg", "When?", (), None, ((0.0, 1.0),), None)


@pytest.mark.parametrize(
    ("pattern", "name", "path"),
    [
        ("{id}.mp4", "AO8RW", "AO8RW.mp4"),
        ("charades/{id}.mp4", "AO8RW", "charades/AO8RW.mp4"),
        ("{id}", "./LLaVA/a b.mp4", "LLaVA/a b.mp4"),
        ("x/{id}", "a/../b.mp4", "x/b.mp4"),
        ("{id}.mp4", "v..1", "v..1.mp4"),
    ],
)
def test_a_path_is_written_relative_to_the_root(pattern: str, name: str, path: str) -> None:
    assert video_path(pattern, name) == path


@pytest.mark.parametrize(
    "name",
    ["../a.mp4", "a/../../b.mp4", "/a.mp4", "C:/a.mp4", "c:a.mp4", "a\\b.mp4", "..", "."]
    + ["a\0.mp4", "https://x.y/a.mp4", "gs://bucket/a.mp4"],
)
@pytest.mark.parametrize("pattern", ["{id}", "below/{id}", "{id}.mp4"])
def test_a_path_that_leaves_the_root_is_rejected(pattern: str, name: str) -> None:
    with pytest.raises(Rejection, match="not one below the root"):
        video_path(pattern, name)


def test_a_path_without_an_extension_is_no_video() -> None:
    with pytest.raises(Rejection, match="has no extension"):
        video_path("{id}", "clips/s03e02")


@pytest.mark.parametrize("pattern", ["videos", "{id}/{name}.mp4", "{0}.mp4"])
def test_a_pattern_has_the_id_and_nothing_else(pattern: str) -> None:
    with pytest.raises(ConvertError, match="--videos is"):
        check_pattern(pattern)


@pytest.mark.parametrize(
    ("start", "end", "expected", "changes"),
    [
        (1, 2.5, (1, 2.5), []),
        (2.5, 1, (1, 2.5), ["start and end exchanged"]),
        (1, 10.4, (1, 10), ["end moved to the video's end"]),
        (-1, 2, (0, 2), ["start moved to 0"]),
        (
            12,
            -1,
            (0, 10),
            ["start and end exchanged", "end moved to the video's end", "start moved to 0"],
        ),
        (1 / 3, 2 / 3, (0.333, 0.667), []),
    ],
)
def test_a_span_is_brought_inside_the_video(
    start: float, end: float, expected: tuple[float, float], changes: list[str]
) -> None:
    done = Conversion()

    def make(content: None) -> Record:
        assert span(start, end, 10.0, done) == expected
        return RECORD

    done.row("f", None, make)
    assert list(done.adjusted) == changes


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (10, 11, "starts at the end"),
        (12, 10.5, "starts at the end"),
        (3, 3, "the span is empty"),
        (3, 3.0004, "the span is empty"),
        (-3, -1, "the span is empty"),
    ],
)
def test_a_span_outside_of_the_video_is_rejected(start: float, end: float, expected: str) -> None:
    with pytest.raises(Rejection, match=expected):
        span(start, end, 10.0, Conversion())


def test_without_a_duration_an_end_is_believed() -> None:
    assert span(3, 1e5, None, Conversion()) == (3, 1e5)


def test_numbers_may_be_texts_but_nothing_else() -> None:
    assert [seconds(x, "x") for x in (3, 2.5, " 1.50 ", "1e2", "-1")] == [3, 2.5, 1.5, 100, -1]
    bad = (None, True, "", "nan", "1.2.3", "0x1", "１", NotANumber("NaN"), 1e7, [1], "1_0", ".")
    for value in bad:
        with pytest.raises(Rejection, match="x: expected a number"):
            seconds(value, "x")
    with pytest.raises(Rejection, match="expected seconds above 0"):
        length(0, "x")


def test_pairs_and_texts_are_checked() -> None:
    assert pair([3, "1.5"], "x") == (3, 1.5) and text({"a": " b\n"}, "a") == "b"
    for value in ([1], [1, 2, 3], "12", None):
        with pytest.raises(Rejection):
            pair(value, "x")
    for value in ("", " ", None, 3, ["a"]):
        with pytest.raises(Rejection, match="field 'a': expected a text"):
            text({"a": value}, "a")
