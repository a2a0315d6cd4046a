"""NExT-GQA: a csv of questions, a JSON file of the spans that show the answers, a map of paths.

    val.csv                 video_id,frame_count,width,height,question,answer,qid,type,a0,...,a4
    gsub_val.json           {video_id: {"duration": s, "location": {qid: [[s, e]...]}, "fps": f}}
    map_vid_vidorID.json    {video_id: "1164/3238737531"}

The answer is the text of one of a0 to a4. Train questions have no spans: without gsub files all
questions become plain multiple choice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from data.convert.choices import letter, options
from data.convert.conversion import Conversion, Rejection
from data.convert.fields import check_pattern, length, pair, row_of, short, span, text, video_path
from data.convert.reading import ConvertError, csv_rows, json_object
from data.records import Record, Span

VIDEOS: Final = "{id}.mp4"

_OPTIONS: Final = ("a0", "a1", "a2", "a3", "a4")
_COLUMNS: Final = ("video_id", "question", "answer", "qid", *_OPTIONS)


def convert(
    paths: Sequence[Path], spans: Sequence[Path], names: Sequence[Path], videos: str = VIDEOS
) -> Conversion:
    """Grounded multiple choice (gqa), or multiple choice (mcqa) without files of spans.

    Args:
      paths: the csv files.
      spans: gsub_val.json, gsub_test.json, or none.
      names: map_vid_vidorID.json, or none: {id} of `videos` is then the video_id itself.
      videos: the pattern of a video's path.

    Raises:
      ConvertError: a file cannot be read, has another shape, or contradicts another one.
    """
    check_pattern(videos)
    done = Conversion()
    located = _joined(spans) if spans else None
    mapped = _joined(names) if names else None
    if located is None:
        done.notes.append("without --spans the questions are multiple choice only (mcqa)")
    asked: set[tuple[str, str]] = set()

    def make(content: Any) -> Record:
        row = row_of(content)
        asked.add((row["video_id"], row["qid"]))
        return _record(row, located, mapped, videos, done)

    for path in paths:
        for source, content in csv_rows(path, _COLUMNS):
            done.row(source, content, make)
    if unasked := _unasked(located or {}, asked):
        done.notes.append(f"{unasked:,} questions of --spans are in none of the csv files")
    return done


def _record(
    row: Mapping[str, Any],
    located: Mapping[str, Any] | None,
    mapped: Mapping[str, Any] | None,
    videos: str,
    done: Conversion,
) -> Record:
    video, qid = text(row, "video_id"), text(row, "qid")
    record_id = done.name(f"{video}-{qid}")
    path = video
    if mapped is not None:
        if video not in mapped:
            raise Rejection("the video is not in --paths", f"found {short(video)}")
        if not isinstance(mapped[video], str):
            raise Rejection("--paths gives no text for the video", f"found {short(mapped[video])}")
        path = text(mapped, video)
    choices = options({"a0 to a4": [row[name] for name in _OPTIONS]}, "a0 to a4", labelled=False)
    duration: float | None = None
    spans: tuple[Span, ...] = ()
    if located is not None:
        duration, spans = _spans(located, video, qid, done)
    return Record(
        id=record_id,
        video=video_path(videos, path),
        task="mcqa" if located is None else "gqa",
        question=text(row, "question"),
        options=choices,
        answer=letter(row["answer"], choices, "answer", given="text"),
        spans=spans,
        duration=duration,
    )


def _spans(
    located: Mapping[str, Any], video: str, qid: str, done: Conversion
) -> tuple[float, tuple[Span, ...]]:
    """The duration of a video and the spans of one of its questions."""
    if video not in located:
        raise Rejection("the video is not in --spans", f"found {short(video)}")
    entry = located[video]
    if not isinstance(entry, dict):
        raise Rejection("--spans gives no object for the video", f"found {short(entry)}")
    duration = length(entry.get("duration"), "duration in --spans")
    found = row_of(entry.get("location")).get(qid)
    if not isinstance(found, list) or not found:
        raise Rejection("the question has no spans in --spans", f"found {short(found)}")
    kept: list[Span] = []
    lost: list[Rejection] = []
    for part in found:
        try:
            kept.append(span(*pair(part, "location in --spans"), duration, done))
        except Rejection as rejection:
            lost.append(rejection)
    if not kept:
        raise lost[0]
    for each in lost:
        done.adjust(f"one span of several left out: {each.reason}")
    return duration, tuple(kept)


def _joined(paths: Sequence[Path]) -> dict[str, Any]:
    """The entries of several files, by video."""
    joined: dict[str, Any] = {}
    for path in paths:
        for key, value in json_object(path).items():
            if joined.setdefault(key, value) != value:
                raise ConvertError(f"{path}: {key!r} is in another of the files, with other values")
    return joined


def _unasked(located: Mapping[str, Any], asked: set[tuple[str, str]]) -> int:
    return sum(
        (video, qid) not in asked
        for video, entry in located.items()
        if isinstance(entry, dict) and isinstance(entry.get("location"), dict)
        for qid in entry["location"]
    )
