"""Charades-STA: lines of text joined with the lengths of the csv files."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.convert import charades_sta
from data.convert.reading import ConvertError
from tests.data.convert.files import reasons, written

LINES = """\
AO8RW 0.0 6.9##a person is putting a book on a shelf.
AO8RW 20.6 12.0##the person closes the door.
3MSZA 24.3 40.4##person turn a light on.
3MSZA 30.9 35.0##person laughs.
3MSZA 4.0 4.0##person sits.
NOCSV 1.0 2.0##person stands.
BADLN 1.0 2.0##person walks.
AO8RW 1.0 two##person eats.
AO8RW 1.0 2.0 person drinks.
AO8RW 1.0 2.0##
"""
CSV = """\
id,subject,scene,quality,relevance,verified,script,objects,descriptions,actions,length
AO8RW,HR43,Bedroom,6,7,Yes,"A person, or two; ""so"".",book;shelf,"x, y",c1 0.0 6.9,33.67
3MSZA,HR43,Kitchen,5,7,Yes,z,,w,,30.96
BADLN,HR43,Kitchen,5,7,Yes,z,,w,,unknown
"""


@pytest.fixture
def sentences(tmp_path: Path) -> Path:
    path = tmp_path / "charades_sta_train.txt"
    path.write_text(LINES)
    return path


@pytest.fixture
def lengths(tmp_path: Path) -> Path:
    path = tmp_path / "Charades_v1_train.csv"
    path.write_text(CSV)
    return path


def test_lines_become_grounding_and_bad_ones_are_named(
    sentences: Path, lengths: Path, tmp_path: Path
) -> None:
    done = charades_sta.convert([sentences], [lengths], "Charades_v1_480/{id}.mp4")
    first, second, third, fourth = written(done, tmp_path)
    assert (first.id, first.video) == ("AO8RW", "Charades_v1_480/AO8RW.mp4")
    assert first.question == "a person is putting a book on a shelf."
    assert (first.task, first.spans, first.duration) == ("tvg", ((0.0, 6.9),), 33.67)
    assert (second.id, second.spans) == ("AO8RW-2", ((12.0, 20.6),))
    assert (third.id, third.spans) == ("3MSZA", ((24.3, 30.96),))
    assert (fourth.id, fourth.spans) == ("3MSZA-2", ((30.9, 30.96),))
    assert done.adjusted == {"start and end exchanged": 1, "end moved to the video's end": 2}
    assert done.read == 10
    assert reasons(done) == {
        "the span is empty": 1,
        "no one length in --durations": 1,
        "length in --durations: expected a number": 1,
        "end: expected a number": 1,
        "not a line 'ID START END##SENTENCE'": 1,
        "no sentence": 1,
    }
    assert done.rejected[-1].source == f"{sentences}:10"


def test_a_start_beyond_the_duration_is_dropped(lengths: Path, tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("3MSZA 31.0 35.0##late.\nAO8RW 1.0 2.0##person eats.\n")
    done = charades_sta.convert([path], [lengths])
    assert [record.video for record in written(done, tmp_path)] == ["AO8RW.mp4"]
    assert reasons(done) == {"the span starts at the end of the video, or later": 1}


def test_two_csv_files_that_disagree_give_no_length(
    sentences: Path, lengths: Path, tmp_path: Path
) -> None:
    other = tmp_path / "other.csv"
    other.write_text("id,length\nAO8RW,99\n3MSZA,30.96\n")
    done = charades_sta.convert([sentences], [lengths, other])
    assert {record.id for record in written(done, tmp_path)} == {"3MSZA", "3MSZA-2"}
    assert "found ['33.67', '99'] for AO8RW" in {row.detail for row in done.rejected}


def test_without_durations_that_is_said(sentences: Path, tmp_path: Path) -> None:
    done = charades_sta.convert([sentences], [])
    records = written(done, tmp_path)
    assert records[2].spans == ((24.3, 40.4),) and records[2].duration is None
    assert done.notes == ["without --durations the ends of the spans are not checked"]


def test_a_csv_without_lengths_is_an_error(sentences: Path, tmp_path: Path) -> None:
    path = tmp_path / "other.csv"
    path.write_text("id,script\nAO8RW,x\n")
    with pytest.raises(ConvertError, match="other.csv: .* found none named length"):
        charades_sta.convert([sentences], [path])
