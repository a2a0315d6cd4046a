"""Video-R1: JSON lists (or JSONL) of five kinds of questions about videos and images.

    {"problem_id": 2, "problem": "...", "data_type": "video", "problem_type": "multiple choice",
     "options": ["A. red", "B. blue"], "solution": "<answer>B</answer>", "path": "./a/b.mp4",
     "data_source": "..."}

The cold-start file also has `process`, "<think>...</think>", which becomes the rationale. Images
are rejected: a prompt is about a video.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from data.convert.choices import letter, options
from data.convert.conversion import Conversion, Rejection
from data.convert.fields import check_pattern, row_of, short, text, video_path
from data.convert.reading import json_rows
from data.records import TAGS, Record

VIDEOS: Final = "{id}"

_TASKS: Final = {
    "multiple choice": "mcqa",
    "numerical": "number",
    "regression": "regression",
    "OCR": "ocr",
    "free-form": "text",
}
_ANSWER: Final = re.compile(r"\s*<answer>(.*?)</answer>\s*", re.DOTALL)
_THOUGHT: Final = re.compile(r"\s*<think>(.*?)</think>\s*", re.DOTALL)
_GROUPED: Final = re.compile(r"-?[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?")


def convert(paths: Sequence[Path], videos: str = VIDEOS) -> Conversion:
    """Multiple choice, numbers, OCR, free text and regression from Video-R1's files.

    Args:
      paths: Video-R1-260k.json, Video-R1-COT-165k.json.
      videos: the pattern of a video's path; {id} is the field `path`.

    Raises:
      ConvertError: a file cannot be read or has another shape.
    """
    check_pattern(videos)
    done = Conversion()
    for path in paths:
        for source, content in json_rows(path):
            done.row(source, content, partial(_record, videos, done))
    return done


def _record(videos: str, done: Conversion, content: Any) -> Record:
    row = row_of(content)
    problem_id = row.get("problem_id")
    if isinstance(problem_id, bool) or not isinstance(problem_id, int | str) or problem_id == "":
        raise Rejection("field 'problem_id': expected a number or a text", short(problem_id))
    record_id = done.name(str(problem_id))
    if row.get("data_type") == "image":
        raise Rejection("an image, not a video", short(row.get("path")))
    if row.get("data_type") != "video":
        raise Rejection("field 'data_type': expected video", f"found {short(row.get('data_type'))}")
    kind = row.get("problem_type")
    if not isinstance(kind, str) or kind not in _TASKS:
        raise Rejection(
            f"field 'problem_type': expected one of {', '.join(_TASKS)}", f"found {short(kind)}"
        )
    task = _TASKS[kind]
    answer = _answer(row)
    choices: tuple[str, ...] = ()
    if task == "mcqa":
        choices = options(row, "options", labelled=True)
        answer = letter(answer, choices, "solution", given="letter")
    elif task in ("number", "regression") and _GROUPED.fullmatch(answer):
        answer = answer.replace(",", "")
        done.adjust("commas between thousands removed from a number")
    return Record(
        id=record_id,
        video=video_path(videos, text(row, "path")),
        task=task,
        question=text(row, "problem"),
        options=choices,
        answer=answer,
        spans=(),
        duration=None,
        rationale=_rationale(row, done),
    )


def _answer(row: Mapping[str, Any]) -> str:
    """What stands in the solution's answer tags."""
    match = _ANSWER.fullmatch(text(row, "solution"))
    if match is None or not match[1].strip() or any(tag in match[1] for tag in TAGS):
        raise Rejection(
            "field 'solution': expected <answer>...</answer>", f"found {short(row['solution'])}"
        )
    return match[1].strip()


def _rationale(row: Mapping[str, Any], done: Conversion) -> str | None:
    """The thought of the cold-start file, without its tags."""
    if row.get("process") is None or row["process"] == "":
        return None
    process = text(row, "process")
    match = _THOUGHT.fullmatch(process)
    thought = match[1].strip() if match else process
    if any(tag in thought for tag in TAGS):
        done.adjust("process left out: it holds a tag in its text")
        return None
    return thought or None
