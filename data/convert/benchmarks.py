"""Multiple-choice benchmarks: MVBench, Video-MME and TempCompass.

MVBench       [{"video": "a.mp4", "question": "...", "candidates": ["red", "blue"],
                "answer": "blue", "start": 3.0, "end": 9.5}]         start, end in some
Video-MME     [{"videoID": "x", "question": "...", "options": ["A. red", "B. blue"],
                "answer": "B", "duration": "short", "task_type": "..."}]
TempCompass   {video_id: {dimension: [{"question": "...?\\nA. red\\nB. blue",
                    "answer": "B. blue"}]}}
"""

from __future__ import annotations

import posixpath
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from data.convert.choices import letter, options, without_letters
from data.convert.conversion import Conversion, Rejection
from data.convert.fields import check_pattern, length, row_of, seconds, short, text, video_path
from data.convert.reading import json_object, json_rows
from data.records import Record, Span, is_span

MVBENCH_VIDEOS: Final = "{id}"
VIDEO_MME_VIDEOS: Final = "{id}.mp4"
TEMPCOMPASS_VIDEOS: Final = "{id}.mp4"

_LENGTHS: Final = ("short", "medium", "long")  # what Video-MME calls a duration
_OPTION: Final = re.compile(r"\s*\(?[A-Z][.):]\s")


def mvbench(paths: Sequence[Path], videos: str = MVBENCH_VIDEOS) -> Conversion:
    """MVBench: a file per task. `start` and `end` become the clip window: only that is shown.

    Args:
      paths: action_sequence.json and others.
      videos: the pattern of a video's path; {id} is the field `video`.

    Raises:
      ConvertError: a file cannot be read or has another shape.
    """

    def record(source: Path, content: Any) -> Record:
        row = row_of(content)
        video = text(row, "video")
        record_id = done.name(f"{source.stem}-{posixpath.splitext(posixpath.basename(video))[0]}")
        choices = options(row, "candidates", labelled=False)
        answer = letter(row.get("answer"), choices, "answer", given="text")
        path, clip = video_path(videos, video), _window(row)
        if clip:
            done.adjust("start and end became the clip window")
        return _mcqa(record_id, path, text(row, "question"), choices, answer, clip=clip)

    check_pattern(videos)
    done = Conversion()
    for path in paths:
        for source, content in json_rows(path):
            done.row(source, content, partial(record, path))
    return done


def video_mme(paths: Sequence[Path], videos: str = VIDEO_MME_VIDEOS) -> Conversion:
    """Video-MME, as JSON. (Its parquet file: `pandas.read_parquet(...).to_json(orient="records")`.)

    Args:
      paths: the files.
      videos: the pattern of a video's path; {id} is the field `videoID`.

    Raises:
      ConvertError: a file cannot be read or has another shape.
    """

    def record(content: Any) -> Record:
        row = row_of(content)
        video = text(row, "videoID")
        question_id = row.get("question_id")
        record_id = done.name(question_id if isinstance(question_id, str) else video)
        choices = options(row, "options", labelled=True)
        answer = letter(row.get("answer"), choices, "answer", given="letter")
        path, duration = video_path(videos, video), row.get("duration")
        if duration is not None and duration not in _LENGTHS:
            duration = length(duration, "field 'duration'")
        return _mcqa(
            record_id,
            path,
            text(row, "question"),
            choices,
            answer,
            duration=duration if isinstance(duration, float) else None,
        )

    check_pattern(videos)
    done = Conversion()
    for path in paths:
        for source, content in json_rows(path):
            done.row(source, content, record)
    return done


def tempcompass(paths: Sequence[Path], videos: str = TEMPCOMPASS_VIDEOS) -> Conversion:
    """TempCompass's multiple-choice file; the options are the last lines of a question.

    Args:
      paths: multi-choice.json.
      videos: the pattern of a video's path; {id} is the key.

    Raises:
      ConvertError: a file cannot be read or has another shape.
    """

    def record(video: str, dimension: str, content: Any) -> Record:
        record_id = done.name(f"{video}-{dimension}")
        row = row_of(content)
        question, choices = _question_and_options(text(row, "question"))
        answer = letter(row.get("answer"), choices, "answer", given="letter")
        return _mcqa(record_id, video_path(videos, video), question, choices, answer)

    check_pattern(videos)
    done = Conversion()
    for path in paths:
        for video, entry in json_object(path).items():
            try:
                lists = row_of(entry)
            except Rejection as rejection:  # all of its questions, as one row
                done.reject(f"{path}: {video}", rejection.reason, rejection.detail, {video: entry})
                continue
            for dimension, rows in lists.items():
                source = f"{path}: {video}, {dimension}"
                if not isinstance(rows, list):
                    done.reject(source, "no list of questions", short(rows), {video: entry})
                    continue
                for number, content in enumerate(rows, start=1):
                    place = f"{source}, question {number}"
                    done.row(place, content, partial(record, video, dimension))
    return done


def _mcqa(
    record_id: str,
    video: str,
    question: str,
    choices: tuple[str, ...],
    answer: str,
    *,
    duration: float | None = None,
    clip: Span | None = None,
) -> Record:
    return Record(record_id, video, "mcqa", question, choices, answer, (), duration, clip)


def _window(row: Mapping[str, Any]) -> Span | None:
    """The part of the video that a row of MVBench is about; None for all of it."""
    if row.get("start") is None and row.get("end") is None:
        return None
    start, end = (seconds(row.get(key), f"field {key!r}") for key in ("start", "end"))
    if not is_span(start, end):
        raise Rejection("no clip window: expected start < end", f"found [{start:g}, {end:g}]")
    return start, end


def _question_and_options(asked: str) -> tuple[str, tuple[str, ...]]:
    """The question and its options, which are its last lines, "A. ..." first."""
    lines = [line.strip() for line in asked.split("\n") if line.strip()]
    first = next((i for i, line in enumerate(lines) if _OPTION.match(line)), len(lines))
    if first in (0, len(lines)):
        raise Rejection(
            "field 'question': expected a question and then lines 'A. ...'", f"found {short(asked)}"
        )
    choices = without_letters(lines[first:], "question", labelled=True)
    return "\n".join(lines[:first]), choices
