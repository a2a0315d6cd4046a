"""Charades-STA: text lines "AO8RW 0.0 6.9##a person puts a book on a shelf.", and Charades' csv.

Durations are in Charades_v1_train.csv and Charades_v1_test.csv (columns id and length), in other
files than the sentences; without them ends are not checked against the videos.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Final

from data.convert.conversion import Conversion, Rejection
from data.convert.fields import check_pattern, length, seconds, short, span, video_path
from data.convert.reading import csv_rows, text_rows
from data.records import Record

VIDEOS: Final = "{id}.mp4"

_LINE: Final = re.compile(r"(\S+)\s+(\S+)\s+(\S+?)\s*##(.*)")


def convert(paths: Sequence[Path], durations: Sequence[Path], videos: str = VIDEOS) -> Conversion:
    """Temporal grounding from the text files of Charades-STA.

    Args:
      paths: charades_sta_train.txt, charades_sta_test.txt.
      durations: Charades_v1_train.csv, Charades_v1_test.csv, or none.
      videos: the pattern of a video's path, see `fields.video_path`.

    Raises:
      ConvertError: a file cannot be read or has another shape.
    """
    check_pattern(videos)
    done = Conversion()
    lengths = _lengths(durations) if durations else None
    if lengths is None:
        done.notes.append("without --durations the ends of the spans are not checked")
    for path in paths:
        for source, line in text_rows(path):
            done.row(source, line, partial(_record, lengths, videos, done))
    return done


def _record(
    lengths: Mapping[str, set[str]] | None, videos: str, done: Conversion, line: str
) -> Record:
    match = _LINE.fullmatch(line)
    if match is None:
        raise Rejection("not a line 'ID START END##SENTENCE'", f"found {short(line)}")
    name, start, end, sentence = match.groups()
    record_id = done.name(name)
    duration = None
    if lengths is not None:
        found = lengths.get(name, set())
        if len(found) != 1:
            raise Rejection("no one length in --durations", f"found {sorted(found)} for {name}")
        duration = length(next(iter(found)), "length in --durations")
    if not sentence.strip():
        raise Rejection("no sentence", f"found {short(line)}")
    times = seconds(start, "start"), seconds(end, "end")
    return Record(
        id=record_id,
        video=video_path(videos, name),
        task="tvg",
        question=sentence.strip(),
        options=(),
        answer=None,
        spans=(span(*times, duration, done),),
        duration=duration,
    )


def _lengths(paths: Sequence[Path]) -> dict[str, set[str]]:
    """Per video the lengths that the files give, as they write them: one, if they agree."""
    found: dict[str, set[str]] = {}
    for path in paths:
        for _, row in csv_rows(path, ("id", "length")):
            if isinstance(row, dict):  # else nobody can say which video it is about
                found.setdefault(row["id"], set()).add(row["length"])
    return found
