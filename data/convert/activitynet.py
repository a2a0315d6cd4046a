"""ActivityNet Captions: {"v_ID": {"duration": s, "timestamps": [[s, e]...], "sentences": [...]}}.

Each sentence becomes a question of temporal grounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

from data.convert.conversion import Conversion, Rejection
from data.convert.fields import check_pattern, length, pair, row_of, short, span, text, video_path
from data.convert.reading import json_object
from data.records import Record

VIDEOS: Final = "{id}.mp4"


def convert(paths: Sequence[Path], videos: str = VIDEOS) -> Conversion:
    """Temporal grounding from train.json, val_1.json, val_2.json.

    Args:
      paths: the JSON files.
      videos: the pattern of a video's path; {id} is the whole key, "v_..." .

    Raises:
      ConvertError: a file cannot be read or has another shape.
    """
    check_pattern(videos)
    done = Conversion()
    for path in paths:
        for name, entry in json_object(path).items():
            source = f"{path}: {name}"
            try:
                pairs = _pairs(entry)
            except Rejection as rejection:  # all of its sentences, as one row
                done.reject(source, rejection.reason, rejection.detail, {name: entry})
                continue
            for number, (times, sentence) in enumerate(pairs, start=1):
                row = {"duration": entry["duration"], "timestamp": times, "sentence": sentence}
                place = f"{source}, sentence {number}"
                done.row(place, {name: row}, partial(_record, videos, done))
    return done


def _pairs(entry: Any) -> list[tuple[Any, Any]]:
    """The timestamps and sentences of a video."""
    entry = row_of(entry)
    length(entry.get("duration"), "duration")
    times, sentences = entry.get("timestamps"), entry.get("sentences")
    if not isinstance(times, list) or not isinstance(sentences, list) or not times:
        raise Rejection("no lists of timestamps and sentences", f"found {short(entry)}")
    if len(times) != len(sentences):
        raise Rejection(
            "not a timestamp for each sentence",
            f"found {len(times)} timestamps and {len(sentences)} sentences",
        )
    return list(zip(times, sentences, strict=True))


def _record(videos: str, done: Conversion, content: dict[str, Any]) -> Record:
    [(name, row)] = content.items()
    record_id = done.name(name)
    duration = length(row["duration"], "duration")
    start, end = pair(row["timestamp"], "timestamp")
    return Record(
        id=record_id,
        video=video_path(videos, name),
        task="tvg",
        question=text(row, "sentence"),
        options=(),
        answer=None,
        spans=(span(start, end, duration, done),),
        duration=duration,
    )
