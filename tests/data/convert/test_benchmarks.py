"""MVBench, Video-MME, TempCompass: multiple choice with answers as text, letter, or both."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.convert import benchmarks
from tests.data.convert.files import json_file, reasons, written

MVBENCH: dict[str, Any] = {
    "video": "166583.webm",
    "question": "What is the action?",
    "candidates": ["Not sure", "Scattering something down", "Piling something up"],
    "answer": "Piling something up",
}


def test_mvbench_answers_by_text_and_shows_the_window(tmp_path: Path) -> None:
    content = [
        MVBENCH,
        {**MVBENCH, "video": "a/ZS9XR.mp4", "start": 11.1, "end": 17.2},
        {**MVBENCH, "video": "ZS9XR.mp4", "start": 17.2, "end": 11.1},
        {**MVBENCH, "start": 3},
        {**MVBENCH, "answer": "C"},
        {**MVBENCH, "candidates": ["up", "up"], "answer": "up"},
        {**MVBENCH, "candidates": ["up", "down", "down"], "answer": "up"},
        {**MVBENCH, "video": "s03e02_seg02_clip_03"},
        {**MVBENCH, "video": "../166583.webm"},
        {**MVBENCH, "question": None},
    ]
    path = json_file(tmp_path / "action_sequence.json", content)
    done = benchmarks.mvbench([path], "star/{id}")
    plain, window = written(done, tmp_path)
    assert (plain.id, plain.video) == ("action_sequence-166583", "star/166583.webm")
    assert (plain.task, plain.answer, plain.clip) == ("mcqa", "C", None)
    assert plain.options == tuple(MVBENCH["candidates"])
    assert (window.id, window.clip) == ("action_sequence-ZS9XR", (11.1, 17.2))
    assert done.adjusted == {"start and end became the clip window": 1}
    assert reasons(done) == {
        "no clip window: expected start < end": 1,
        "field 'end': expected a number": 1,
        "field 'answer': the answer is none of the options": 1,
        "field 'answer': the answer is several of the options": 1,
        "field 'options': expected different texts": 1,
        "the video's path has no extension": 1,
        "the video's path is not one below the root": 1,
        "field 'question': expected a text": 1,
    }


def test_video_mme_answers_by_letter(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "video_id": "001",
        "duration": "short",
        "videoID": "fFjv93ACGo8",
        "question_id": "001-1",
        "task_type": "Counting Problem",
        "question": "How many red socks are above the fireplace?",
        "options": ["A. 1.", "B. 4.", "C. 2.", "D. 3."],
        "answer": "D",
    }
    without = {key: value for key, value in row.items() if key != "question_id"}
    content = [
        row,
        {**without, "duration": 61.5},
        {**row, "answer": "E"},
        {**row, "options": ["A. 1.", "B. 4.", "D. 3."]},
        {**row, "duration": "endless"},
        {**row, "videoID": ""},
        7,
    ]
    done = benchmarks.video_mme([json_file(tmp_path / "test.json", content)], "mme/{id}.mp4")
    first, second = written(done, tmp_path)
    assert (first.id, first.video, first.duration) == ("001-1", "mme/fFjv93ACGo8.mp4", None)
    assert (first.options, first.answer) == (("1.", "4.", "2.", "3."), "D")
    assert (second.id, second.duration) == ("fFjv93ACGo8", 61.5)
    assert reasons(done) == {
        "field 'answer': the answer is none of the options": 1,
        "field 'options': expected the letters A, B, C, ... in order": 1,
        "field 'duration': expected a number": 1,
        "field 'videoID': expected a text": 1,
        "not a JSON object": 1,
    }


def test_tempcompass_has_its_options_in_the_question(tmp_path: Path) -> None:
    asked = "What is happening in the video?\nA. a person drops\nB. a person catches"
    many = "\n".join(["Which?", *(f"{chr(65 + i)}. option {i}" for i in range(26)), "[. more"])
    content = {
        "1021488277": {
            "action": [
                {"question": asked, "answer": "B. a person catches"},
                {"question": f"Two\nlines?\n{asked[32:]}", "answer": "A"},
                {"question": asked, "answer": "A. a person catches"},
                {"question": "Does a person catch?", "answer": "yes"},
                {"question": "A. a person drops\nB. a person catches", "answer": "A"},
                {"question": f"{asked}\nC.", "answer": "A"},
                {"question": many, "answer": "A"},
                "What?",
            ],
            "speed": {"question": asked, "answer": "A"},
        },
        "999": [1],
    }
    done = benchmarks.tempcompass([json_file(tmp_path / "multi-choice.json", content)])
    first, second = written(done, tmp_path)
    assert (first.id, first.video, first.answer) == ("1021488277-action", "1021488277.mp4", "B")
    assert first.question == "What is happening in the video?"
    assert first.options == ("a person drops", "a person catches")
    assert (second.question, second.answer) == ("Two\nlines?", "A")
    assert reasons(done) == {
        "field 'answer': the answer is none of the options": 1,
        "field 'question': expected a question and then lines 'A. ...'": 2,
        "field 'question': expected the letters A, B, C, ... in order": 1,
        "field 'question': expected 2 to 26 options": 1,
        "not a JSON object": 2,
        "no list of questions": 1,
    }
