"""The paper's own data (Temporal-R1): JSON lists or JSONL, and a YAML file that joins several.

    {"dataset": "charades_train", "video": "AO8RW.mp4", "problem": "...", "solution": [0.1, 0.4],
     "video_length": 30.5}

A solution is a span as shares of the video's length and becomes seconds by `video_length`, to the
millisecond. (For charades_train the released code takes the length from the frames that it sampled;
it differs by less than the distance of two frames.)
"""

from __future__ import annotations

import math
import posixpath
import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

from data.convert.conversion import Conversion, Rejection
from data.convert.fields import check_pattern, length, pair, row_of, short, span, text, video_path
from data.convert.reading import ConvertError, json_rows
from data.records import Record
from data.sampling import permutation

VIDEOS: Final = "{id}"

_STRATEGY: Final = re.compile(r"(first|end|random):(?:([0-9]+)|([0-9]+(?:\.[0-9]+)?)%)")


class Part(NamedTuple):
    """A file, the folder of its videos below the data root, and which of its rows are wanted."""

    path: Path
    folder: str = ""
    strategy: str = "all"


def convert(parts: Sequence[Part], videos: str = VIDEOS, seed: int = 0) -> Conversion:
    """Temporal grounding from the paper's released files.

    Args:
      parts: the files.
      videos: the pattern of a video's path below its part's folder; {id} is the field `video`.
      seed: of the strategy random.

    Raises:
      ConvertError: a file cannot be read or has another shape, or a strategy is none.
    """
    check_pattern(videos)
    if seed < 0:
        raise ConvertError(f"--seed is {seed}, expected 0 or more")
    done = Conversion()
    for number, part in enumerate(parts):
        rows = list(json_rows(part.path))
        wanted = chosen(part.strategy, len(rows), seed, number)
        make = partial(_record, posixpath.join(part.folder, videos), done)
        for place, (source, content) in enumerate(rows):
            if place in wanted:
                done.row(source, content, make)
            else:
                done.leave_out(f"not in sampling_strategy {part.strategy} of {part.path}")
    return done


def chosen(strategy: str, count: int, seed: int, number: int) -> set[int]:
    """The places, of 0 to count - 1, that a sampling_strategy takes.

    "all", "first:N", "end:N" (the last) or "random:N", with N a number of rows or a percentage,
    which is rounded up; with fewer rows it takes all of them.

    Args:
      number: of the part, so that parts of one seed draw differently.

    Raises:
      ConvertError: it is none of those.
    """
    if strategy == "all":
        return set(range(count))
    match = _STRATEGY.fullmatch(strategy)
    if match is None or (match[3] and float(match[3]) > 100):
        raise ConvertError(
            f"sampling_strategy is {strategy!r}, expected all, first:N, end:N or random:N, where N "
            "is a number of rows, or at most 100 with a % sign"
        )
    wanted = int(match[2]) if match[2] else math.ceil(float(match[3]) * count / 100)
    wanted = min(wanted, count)
    if match[1] == "first":
        return set(range(wanted))
    if match[1] == "end":
        return set(range(count - wanted, count))
    return set(permutation(count, seed, number)[:wanted].tolist())


def _record(pattern: str, done: Conversion, content: Any) -> Record:
    row = row_of(content)
    video = text(row, "video")
    stem = posixpath.splitext(posixpath.basename(video))[0]
    dataset = row.get("dataset")
    record_id = done.name(f"{dataset}-{stem}" if isinstance(dataset, str) and dataset else stem)
    duration = length(row.get("video_length"), "field 'video_length'")
    start, end = pair(row.get("solution"), "field 'solution'")
    if max(abs(start), abs(end)) > 2:
        raise Rejection(
            "field 'solution': expected shares of the video's length",
            f"found {short(row.get('solution'))}: are these seconds?",
        )
    return Record(
        id=record_id,
        video=video_path(pattern, video),
        task="tvg",
        question=text(row, "problem"),
        options=(),
        answer=None,
        spans=(span(start * duration, end * duration, duration, done),),
        duration=duration,
    )
