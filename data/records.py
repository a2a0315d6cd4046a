"""The manifest: one question about one video per line of a JSONL file.

    {"id": "a1", "video": "clips/a.mp4", "task": "mcqa", "question": "Which color appears first?",
     "options": ["red", "blue"], "answer": "B", "duration": 12.0}
    {"id": "a2", "video": "clips/a.mp4", "task": "tvg", "question": "When does the door open?",
     "spans": [[3.5, 7.0]]}
    {"id": "a3", "video": "clips/a.mp4", "task": "gqa", "question": "What is opened, and when?",
     "options": ["door", "window"], "answer": "A", "spans": [[3.5, 7.0]], "clip": [2.0, 12.0]}
    {"id": "a4", "video": "clips/a.mp4", "task": "number", "question": "How many doors are there?",
     "answer": "3"}

(each on one line in the file). Rows are read strictly: every problem of every row is found at once
and named with its line and field, because a typo in one row of 100,000 otherwise shows only as a
slightly worse model.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from data.storage import is_url, read

Span = tuple[float, float]  # start and end, seconds

TASKS: Final = ("mcqa", "tvg", "gqa", "number", "regression", "ocr", "text")
CHOICE_TASKS: Final = ("mcqa", "gqa")  # they have options
SPAN_TASKS: Final = ("tvg", "gqa")  # they have true spans
NUMBER_TASKS: Final = ("number", "regression")
LETTERS: Final = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

# The latest time there is, in seconds: no later one can be read from a completion.
LATEST: Final = 1e6

# A number that can be an answer, and be read from a completion: ASCII digits, as in JSON, at most
# 15 of them before the point and 18 after it, and no exponent.
NUMBER: Final = re.compile(r"-?(?:0|[1-9][0-9]{0,14})(?:\.[0-9]{1,18})?")

# The longest written answer, in characters: comparing texts takes time in the square of it.
LONGEST_TEXT: Final = 2000

# The tags of the scored formats, which an answer or a thought cannot hold.
TAGS: Final = ("<think>", "</think>", "<answer>", "</answer>")

# How far, in seconds, a span or a clip may pass the annotated duration: NExT-GQA and others round
# the duration, not the spans.
ROUNDING: Final = 1.0

_PROBLEMS_SHOWN: Final = 20
_REQUIRED: Final = ("id", "video", "task", "question")
_LETTERED: Final = re.compile(r"\(?([A-Z])[.):]\s")


class ManifestError(ValueError):
    """Rows that cannot be used; the message lists the first 20 problems as file:line, field."""


@dataclass(frozen=True)
class Record:
    """One question about one video.

    Attributes:
      id: unique in its manifest.
      video: the file's path relative to the data root, with forward slashes.
      task: "mcqa" (multiple choice), "tvg" (temporal grounding), "gqa" (both), "number" (equal to
        two decimals), "regression" (the nearer the better), "ocr" (a transcript) or "text" (in the
        model's own words).
      question: without the options.
      options: of mcqa and gqa, without letters; else empty.
      answer: of mcqa and gqa the letter of the right option; of number and regression a decimal
        number in digits, "-3.50"; of ocr and text the text; None for tvg.
      spans: of tvg and gqa, true (start, end) in seconds from the start of the clip, or of the file
        where there is no clip; else empty.
      duration: the annotated length in seconds of the whole file, if known.
      clip: the (start, end) in seconds of the file that is shown; None shows all of it.
      rationale: the reasoning that supervised training teaches for the think block, if any.
    """

    id: str
    video: str
    task: str
    question: str
    options: tuple[str, ...]
    answer: str | None
    spans: tuple[Span, ...]
    duration: float | None
    clip: Span | None = None
    rationale: str | None = None


def read_manifest(path: str | os.PathLike[str], root: str | os.PathLike[str]) -> list[Record]:
    """Reads a JSONL manifest; blank lines are skipped. Videos are not opened: see `data.probe`.

    Args:
      path: the manifest, a file or the address of one in a bucket.
      root: the folder that videos are relative to. A path that leaves it ("../x.mp4", "/x.mp4") is
        a problem of its row. Links inside the root are followed: they are the user's own.

    Raises:
      ManifestError: naming the file, line, field, what was expected and found, and the mend, for
        the first 20 problems; also for a manifest that is missing or has no rows.
      StorageError: a bucket that cannot be read.
    """
    return [record for record, _ in read_rows(path, root, None)]


def read_rows(
    path: str | os.PathLike[str], root: str | os.PathLike[str], extra: str | None
) -> list[tuple[Record, Any]]:
    """As `read_manifest`, each record with what its row's field `extra` holds (None without it)."""
    try:
        content = read(os.fspath(path)) if is_url(path) else Path(path).read_bytes()
    except OSError as error:
        raise ManifestError(f"{path}: expected a JSONL manifest, found none: {error}") from error
    rows: list[tuple[Record, Any]] = []
    problems: list[str] = []
    first_line: dict[str, int] = {}
    for number, line in enumerate(content.split(b"\n"), start=1):
        if not line.strip():
            continue
        found: list[str] = []
        row = _parse(line, found)
        more = None
        if row is not None:
            more = row.pop(extra, None) if extra else None
            found += _problems(row, root)
            name = row.get("id")
            if isinstance(name, str) and first_line.setdefault(name, number) != number:
                found.append(
                    f"field 'id': expected unique ids, found {name!r} of line {first_line[name]} "
                    "again; rename one of the two"
                )
        if row is not None and not found:
            rows.append((_record(row), more))
        problems += [f"{path}:{number}: {problem}" for problem in found]
    if problems:
        raise ManifestError(_summary(f"{path}: ", problems))
    if not rows:
        raise ManifestError(f"{path}: expected at least one row, found none; write one per line")
    return rows


def row_of(record: Record) -> dict[str, Any]:
    """A record's row in a manifest; fields without a value are left out."""
    row = {k: v for k, v in dataclasses.asdict(record).items() if v is not None and v != ()}
    plain: dict[str, Any] = json.loads(json.dumps(row))  # tuples become lists
    return plain


def row_problems(record: Record) -> list[str]:
    """Why `read_manifest` would refuse a record, as "field 'x': expected ..."; [] if not."""
    return _problems(row_of(record), os.curdir)


def write_manifest(path: str | os.PathLike[str], records: Iterable[Record]) -> None:
    """Writes a manifest that `read_manifest` reads back to equal records.

    The file appears whole or not at all. Fields without a value are left out.

    Raises:
      ManifestError: a record that `read_manifest` would refuse; nothing is written.
    """
    rows: list[dict[str, Any]] = []
    problems: list[str] = []
    seen: set[str] = set()
    for record in records:
        row = row_of(record)
        found = _problems(row, os.curdir)
        if record.id in seen:
            found.append(f"field 'id': expected unique ids, found {record.id!r} twice; rename one")
        seen.add(record.id)
        problems += [f"record {record.id!r}: {problem}" for problem in found]
        rows.append(row)
    if problems:
        raise ManifestError(_summary(f"{path} not written: ", problems))
    if not rows:
        raise ManifestError(f"{path} not written: expected at least one record, found none")
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    write_atomically(path, text)


def is_span(start: float, end: float) -> bool:
    """Whether 0 <= start < end <= LATEST, also in float32, the type that spans are scored in."""
    return 0 <= start < end <= LATEST and bool(np.float32(start) < np.float32(end))


def merge_spans(spans: Iterable[Span]) -> list[Span]:
    """The union of spans, as sorted spans that neither overlap nor touch.

    [(5, 9), (0, 2), (1, 4), (9, 10)] -> [(0, 4), (5, 10)]
    """
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Writes a text file that another process sees either as it was or complete."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    scratch = target.with_name(f".{target.name}.{os.getpid()}-{secrets.token_hex(4)}")
    try:
        with open(scratch, "x", encoding="utf-8", newline="\n") as file:
            file.write(text)
        os.replace(scratch, target)
    except BaseException:
        scratch.unlink(missing_ok=True)
        raise


def _summary(start: str, problems: list[str]) -> str:
    shown = problems[:_PROBLEMS_SHOWN]
    hidden = len(problems) - len(shown)
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    tail = [f"... and {hidden} more"] if hidden else []
    return "\n".join([f"{start}{count}", *shown, *tail])


def _parse(line: bytes, found: list[str]) -> dict[str, Any] | None:
    """One JSON object, or None and the problem in `found`. NaN, Infinity and repeated keys fail."""

    def constant(name: str) -> None:
        raise ValueError(f"found {name}, which is not JSON")

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        row = dict(pairs)
        if len(row) != len(pairs):
            names = [name for name, _ in pairs]
            twice = next(name for name in names if names.count(name) > 1)
            raise ValueError(f"found the field {twice!r} twice")
        return row

    try:
        text = line.decode("utf-8-sig")
        row = json.loads(text, parse_constant=constant, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        found.append(f"expected one JSON object in UTF-8 on the line; {error}")
        return None
    if not isinstance(row, dict):
        found.append(f"expected a JSON object {{...}}, found {_short(row)}")
        return None
    return row


def _record(row: dict[str, Any]) -> Record:
    """A record from a row that has no problems."""
    clip = row.get("clip")
    duration = row.get("duration")
    return Record(
        id=row["id"],
        video=row["video"],
        task=row["task"],
        question=row["question"],
        options=tuple(row.get("options") or ()),
        answer=row.get("answer"),
        spans=tuple((float(start), float(end)) for start, end in row.get("spans") or ()),
        duration=None if duration is None else float(duration),
        clip=None if clip is None else (float(clip[0]), float(clip[1])),
        rationale=row.get("rationale"),
    )


def _problems(row: dict[str, Any], root: str | os.PathLike[str]) -> list[str]:
    """Everything wrong with one row, as "field 'x': expected ..., found ...; mend"."""
    known = [field.name for field in dataclasses.fields(Record)]
    found = [
        f"field {name!r}: expected one of {', '.join(known)}; remove it or mend its name"
        for name in row
        if name not in known
    ]
    for name in _REQUIRED:
        if name not in row:
            found.append(f"field {name!r}: expected a text, found no such field; add it")
        elif problem := _text_problem(row[name]):
            found.append(f"field {name!r}: {problem}")
        elif name == "video" and (problem := _path_problem(row["video"], root)):
            found.append(f"field 'video': {problem}")
    rationale = row.get("rationale")
    if rationale is not None and (problem := _text_problem(rationale)):
        found.append(f"field 'rationale': {problem}; leave it out if there is none")
    task = row.get("task")
    if isinstance(task, str) and task not in TASKS:
        found.append(f"field 'task': expected one of {', '.join(TASKS)}, found {_short(task)}")
        return found
    if task not in TASKS:
        return found
    found += _choice_problems(row) if task in CHOICE_TASKS else _answer_problems(row, task)
    found += _time_problems(row, task)
    return found


def _text_problem(value: object) -> str | None:
    if not isinstance(value, str) or not value.strip():
        return f"expected a text that is not empty, found {_short(value)}"
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        return f"expected valid Unicode, found half a surrogate pair in {_short(value)}"
    return None


def _path_problem(video: str, root: str | os.PathLike[str]) -> str | None:
    base = os.path.abspath(root)
    inside = os.path.normpath(os.path.join(base, video))
    if os.path.isabs(video) or os.path.commonpath([base, inside]) != base or inside == base:
        return (
            f"expected a path inside the root {os.fspath(root)!r}, found {_short(video)}; "
            "write it relative to the root"
        )
    if "\0" in video:
        return f"expected a path, found a NUL character in {_short(video)}"
    return None


def _answer_problems(row: dict[str, Any], task: str) -> list[str]:
    """Problems of `options` and `answer` where there is no choice."""
    options, answer = row.get("options"), row.get("answer")
    unwanted = [("options", options)] + ([("answer", answer)] if task == "tvg" else [])
    found = [
        f"field {name!r}: expected none for task {task!r}, found {_short(value)}; "
        f"remove it or use task {'gqa' if task == 'tvg' else 'mcqa'!r}"
        for name, value in unwanted
        if value not in (None, [])
    ]
    if task == "tvg":
        return found
    if task in NUMBER_TASKS:
        if not isinstance(answer, str) or not NUMBER.fullmatch(answer):
            found.append(
                "field 'answer': expected a decimal number as a text of digits, such as \"-3.50\", "
                f"found {_short(answer)}; write no unit, exponent or thousands separator"
            )
        return found
    if problem := _text_problem(answer) or _written_problem(str(answer), task):
        found.append(f"field 'answer': {problem}")
    return found


def _written_problem(answer: str, task: str) -> str | None:
    """Why no completion could earn the whole reward of this text, if so."""
    if len(answer) > LONGEST_TEXT:
        return f"expected at most {LONGEST_TEXT:,} characters, found {len(answer):,}; shorten it"
    for tag in TAGS:
        if tag in answer:
            return f"expected a text without {tag!r}, which would end the answer; remove the tag"
    if task == "text" and not re.search("[a-z0-9]", answer.lower()):
        return (
            f"expected a word of ASCII letters or digits, which are what ROUGE compares, found "
            f"{_short(answer)}; use task 'ocr'"
        )
    return None


def _choice_problems(row: dict[str, Any]) -> list[str]:
    """Problems of `options` and `answer` of a multiple choice."""
    options, answer, task = row.get("options"), row.get("answer"), row["task"]
    if not isinstance(options, list) or not 2 <= len(options) <= len(LETTERS):
        expected = f"a list of 2 to {len(LETTERS)} texts for task {task!r}"
        return [f"field 'options': expected {expected}, found {_short(options)}"]
    found = []
    for i, option in enumerate(options):
        if problem := _text_problem(option):
            found.append(f"field 'options', number {i + 1}: {problem}")
    if found:
        return found
    if len(set(options)) != len(options):
        found.append(f"field 'options': expected different texts, found {_short(options)}")
    lettered = [_LETTERED.match(option) for option in options]
    if all(match and match[1] == LETTERS[i] for i, match in enumerate(lettered)):
        found.append(
            f"field 'options': expected texts without letters, found {_short(options)}; "
            "remove the letters: the prompt adds them"
        )
    letters = LETTERS[: len(options)]
    if not isinstance(answer, str) or len(answer) != 1 or answer not in letters:
        mend = f"; write {LETTERS[options.index(answer)]!r}" if answer in options else ""
        found.append(
            f"field 'answer': expected a letter from A to {letters[-1]}, "
            f"found {_short(answer)}{mend}"
        )
    return found


def _time_problems(row: dict[str, Any], task: str) -> list[str]:
    """Problems of `spans`, `duration` and `clip`."""
    found = []
    duration, clip, spans = row.get("duration"), row.get("clip"), row.get("spans")
    if duration is not None and not (_is_seconds(duration) and duration > 0):
        found.append(
            f"field 'duration': expected seconds above 0, at most {LATEST:,.0f}, found "
            f"{_short(duration)}; leave it out if it is not known"
        )
        duration = None
    if clip is not None and (problem := _span_problem(clip, duration, "the duration")):
        found.append(f"field 'clip': {problem}")
        clip = None
    if task not in SPAN_TASKS:
        if spans not in (None, []):
            found.append(
                f"field 'spans': expected none for task {task!r}, found {_short(spans)}; "
                f"remove it or use task {'gqa' if task == 'mcqa' else 'tvg'!r}"
            )
        return found
    if not isinstance(spans, list) or not spans:
        found.append(
            f"field 'spans': expected a list of [start, end] in seconds for task {task!r}, "
            f"found {_short(spans)}"
        )
        return found
    limit, what = (clip[1] - clip[0], "the clip's length") if clip else (duration, "the duration")
    for i, span in enumerate(spans):
        if problem := _span_problem(span, limit, what):
            found.append(f"field 'spans', number {i + 1}: {problem}")
    return found


def _span_problem(span: object, limit: float | None, what: str) -> str | None:
    """Why `span` is not [start, end] with 0 <= start < end, start < limit, end near limit."""
    if not (isinstance(span, list) and len(span) == 2 and all(map(_is_seconds, span))):
        return f"expected [start, end] in seconds, 0 to {LATEST:,.0f}, found {_short(span)}"
    start, end = span
    if start > end:
        return f"expected start < end, found {_short(span)}; swap them"
    if start == end:
        return f"expected start < end, found the empty {_short(span)}; remove it"
    if not is_span(start, end):
        return f"expected times that differ in float32, found {_short(span)}; lengthen it"
    if limit is not None and (start >= limit or end > limit + ROUNDING):
        return f"expected an end within {what} of {limit:g} s, found {_short(span)}"
    return None


def _is_seconds(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return False
    return 0 <= value <= LATEST


def _short(value: object) -> str:
    text = "nothing" if value is None else repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
