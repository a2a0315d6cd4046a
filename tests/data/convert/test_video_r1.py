"""Video-R1: five kinds of questions; images are rejected."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from data.convert import video_r1
from tests.data.convert.files import json_file, reasons, written

CHOICE: dict[str, Any] = {
    "problem_id": 2,
    "problem": "What appears on the screen?",
    "data_type": "video",
    "problem_type": "multiple choice",
    "options": ["A. A cat.", "B. A dog.", "C. A bird."],
    "solution": "<answer>B</answer>",
    "path": "./LLaVA-Video-178K/academic_source/NextQA/0001/4164158586.mp4",
    "data_source": "LLaVA-Video-178K",
}
WRITTEN = [
    {"problem_type": "numerical", "solution": "<answer>3</answer>"},
    {"problem_type": "regression", "solution": "<answer> -12,345.5 </answer>"},
    {"problem_type": "OCR", "solution": "<answer>STOP here</answer>"},
    {"problem_type": "free-form", "solution": "<answer>He opens\nthe door.</answer>"},
]


def rows(*changes: dict[str, Any]) -> list[dict[str, Any]]:
    return [{**CHOICE, "problem_id": 10 + i, **change} for i, change in enumerate(changes)]


def test_a_choice_loses_its_letters_and_its_tags(tmp_path: Path) -> None:
    done = video_r1.convert([json_file(tmp_path / "v.json", [CHOICE])], "r1/{id}")
    [record] = written(done, tmp_path)
    assert (record.id, record.task, record.answer) == ("2", "mcqa", "B")
    assert record.options == ("A cat.", "A dog.", "A bird.")
    assert record.video == "r1/LLaVA-Video-178K/academic_source/NextQA/0001/4164158586.mp4"
    assert record.rationale is None and record.question == CHOICE["problem"]


def test_what_is_written_is_the_answer(tmp_path: Path) -> None:
    content = rows(*({"options": [], **change} for change in WRITTEN))
    done = video_r1.convert([json_file(tmp_path / "v.json", content)])
    found = [(record.task, record.answer) for record in written(done, tmp_path)]
    assert found == [
        ("number", "3"),
        ("regression", "-12345.5"),
        ("ocr", "STOP here"),
        ("text", "He opens\nthe door."),
    ]
    assert done.adjusted == {"commas between thousands removed from a number": 1}


def test_bad_rows_are_named(tmp_path: Path) -> None:
    content = rows(
        {"data_type": "image", "path": "./a.jpg"},
        {"data_type": "image", "problem_type": "OCR", "path": "./b.jpg"},
        {"data_type": "audio"},
        {"problem_type": "essay"},
        {"solution": "B"},
        {"solution": "<answer></answer>"},
        {"solution": "<answer>A</answer><answer>B</answer>"},
        {"solution": "<answer>D</answer>"},
        {"solution": "<answer>A, B</answer>"},
        {"options": ["A. x", "C. y"]},
        {"options": None},
        {"path": "./../secret.mp4"},
        {"path": "D:\\video\\a.mp4"},
        {"problem": ""},
        {"problem_id": None},
        {"problem_type": "numerical", "options": [], "solution": "<answer>three</answer>"},
    )
    done = video_r1.convert([json_file(tmp_path / "v.json", [CHOICE, *content])])
    assert len(written(done, tmp_path)) == 1
    numbers = [row.reason for row in done.rejected if "'three'" in row.detail]
    assert len(numbers) == 1 and numbers[0].startswith("field 'answer': expected")
    assert {k: v for k, v in reasons(done).items() if k not in numbers} == {
        "an image, not a video": 2,
        "field 'data_type': expected video": 1,
        "field 'problem_type': expected one of multiple choice, numerical, regression, OCR, "
        "free-form": 1,
        "field 'solution': expected <answer>...</answer>": 3,
        "field 'solution': the answer is none of the options": 2,
        "field 'options': expected the letters A, B, C, ... in order": 1,
        "field 'options': expected a list of texts": 1,
        "the video's path is not one below the root": 2,
        "field 'problem': expected a text": 1,
        "field 'problem_id': expected a number or a text": 1,
    }


def test_the_thought_of_the_cold_start_file_becomes_the_rationale(tmp_path: Path) -> None:
    content = rows(
        {"process": "<think>First the dog,\nthen the cat.</think>"},
        {"process": "No tags here."},
        {"process": ""},
        {"process": "<think>One.</think> And <think>two.</think>"},
    )
    done = video_r1.convert([json_file(tmp_path / "v.json", content)])
    thoughts = [record.rationale for record in written(done, tmp_path)]
    assert thoughts == ["First the dog,\nthen the cat.", "No tags here.", None, None]
    assert done.adjusted == {"process left out: it holds a tag in its text": 1}


def test_two_files_that_number_from_the_same_id_keep_all_rows(tmp_path: Path) -> None:
    paths = [json_file(tmp_path / name, [CHOICE]) for name in ("a.json", "b.json")]
    assert [record.id for record in video_r1.convert(paths).records] == ["2", "2-2"]
