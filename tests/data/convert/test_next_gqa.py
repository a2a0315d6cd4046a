"""NExT-GQA: questions of the csv joined with spans and paths of two JSON files."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.convert import next_gqa
from data.convert.reading import ConvertError
from tests.data.convert.files import json_file, reasons, written

HEADER = "video_id,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4"
ROWS = """\
4010069381,369,640,480,"how do men, play",tap their feet,6,CH,roll,tap their feet,strum,hit,pat
4010069381,369,640,480,why was it loud,many,7,CW,few,many,Many,some,none
4010069381,369,640,480,why no answer,flute,8,CW,few,many,one,some,none
4010069381,369,640,480,why no spans,few,9,CW,few,many,one,some,none
4010069381,369,640,480,twice the same,few,10,CW,few,few,one,some,none
2435100235,369,640,480,where is it,Few.,0,CW,few,many,one,some,none
2435100235,369,640,480,spans elsewhere,few,1,CW,few,many,one,some,none
2435100235,369,640,480,spans without end,few,2,CW,few,many,one,some,none
1111111111,369,640,480,not in the map,few,0,CW,few,many,one,some,none
2222222222,369,640,480,not in gsub,few,0,CW,few,many,one,some,none
2222222222,369,640,480,too few cells,few
"""
GSUB = {
    "4010069381": {
        "duration": 37,
        "location": {"6": [[0.6, 2.5], [30.2, 37.9]], "7": [[1, 2]], "8": [[1, 2]], "10": [[1, 2]]},
        "fps": 10.0,
    },
    "2435100235": {
        "duration": 20,
        "location": {"0": [[5, 3], [20.0, 20.4]], "1": [[21, 25]], "2": [[1]], "77": [[1, 2]]},
        "fps": 10.0,
    },
    "1111111111": {"duration": 9, "location": {"0": [[1, 2]]}, "fps": 10.0},
}
MAP = {"4010069381": "1164/4010069381", "2435100235": "0/2435100235", "2222222222": "0/2222222222"}


@pytest.fixture
def files(tmp_path: Path) -> tuple[Path, Path, Path]:
    questions = tmp_path / "val.csv"
    questions.write_text(f"{HEADER}\n{ROWS}")
    spans = json_file(tmp_path / "gsub_val.json", GSUB)
    return questions, spans, json_file(tmp_path / "map_vid_vidorID.json", MAP)


def test_questions_become_grounded_choices_and_bad_ones_are_named(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    questions, spans, names = files
    done = next_gqa.convert([questions], [spans], [names], "nextqa/{id}.mp4")
    first, second, third = written(done, tmp_path)
    assert (first.id, first.video) == ("4010069381-6", "nextqa/1164/4010069381.mp4")
    assert (first.task, first.question) == ("gqa", "how do men, play")
    assert first.options[1] == "tap their feet" and first.answer == "B"
    assert first.spans == ((0.6, 2.5), (30.2, 37.0)) and first.duration == 37
    assert (second.id, second.answer) == ("4010069381-7", "B")  # equal before alike
    assert (third.id, third.answer) == ("2435100235-0", "A")  # alike but for case and full stop
    assert third.spans == ((3.0, 5.0),)
    assert done.adjusted == {
        "end moved to the video's end": 1,
        "start and end exchanged": 1,
        "one span of several left out: the span starts at the end of the video, or later": 1,
    }
    assert reasons(done) == {
        "field 'answer': the answer is none of the options": 1,
        "the question has no spans in --spans": 1,
        "field 'answer': the answer is several of the options": 1,
        "the span starts at the end of the video, or later": 1,
        "location in --spans: expected [start, end]": 1,
        "the video is not in --paths": 1,
        "the video is not in --spans": 1,
        "wrong number of csv cells": 1,
    }
    assert done.notes == ["1 questions of --spans are in none of the csv files"]


def test_without_spans_the_questions_are_plain_multiple_choice(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    done = next_gqa.convert([files[0]], [], [])
    record = written(done, tmp_path)[0]
    assert (record.task, record.spans, record.video) == ("mcqa", (), "4010069381.mp4")
    assert done.notes == ["without --spans the questions are multiple choice only (mcqa)"]


def test_files_that_contradict_each_other_are_an_error(
    files: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    other = json_file(tmp_path / "gsub_test.json", {"4010069381": {"duration": 1}})
    with pytest.raises(ConvertError, match="gsub_test.json: '4010069381' is in another"):
        next_gqa.convert([files[0]], [files[1], other], [])
    assert next_gqa.convert([files[0]], [files[1], files[1]], [files[2]]).records


def test_files_given_for_another_option_are_named_by_one_reason(
    files: tuple[Path, Path, Path],
) -> None:
    questions, spans, names = files
    swapped = reasons(next_gqa.convert([questions], [names], []))
    assert swapped["--spans gives no object for the video"] == 9
    swapped = reasons(next_gqa.convert([questions], [], [spans]))
    assert swapped["--paths gives no text for the video"] == 9


def test_a_csv_of_another_dataset_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("video,question\n1,why\n")
    with pytest.raises(ConvertError, match="found none named video_id, answer, qid, a0"):
        next_gqa.convert([tmp_path / "a.csv"], [], [])
