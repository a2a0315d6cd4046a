"""Wrong labels, as a hurried annotator or a bad match of questions to videos leaves them.

A wrong letter is any of the others; a wrong span is as long as the true one, elsewhere in the clip.
"""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence

from data.records import LETTERS, Record, Span
from data.synthetic import STEP


def mislabelled(records: Sequence[Record], share: float) -> list[Record]:
    """The records, each with wrong labels at so large a chance; the same ones each time."""
    return [
        wrong(record) if random.Random(f"mislabel {record.id}").random() < share else record
        for record in records
    ]


def wrong(record: Record) -> Record:
    """A record whose letter and span, where it has them, are both wrong."""
    rng = random.Random(f"wrong {record.id}")
    if record.options:
        letters = LETTERS[: len(record.options)].replace(str(record.answer), "")
        record = dataclasses.replace(record, answer=rng.choice(letters))
    if record.spans:
        [span] = record.spans
        assert record.duration is not None
        record = dataclasses.replace(record, spans=(elsewhere(span, record.duration, rng),))
    return record


def elsewhere(span: Span, duration: float, rng: random.Random) -> Span:
    """A span of the same length, of those that overlap with it least; on multiples of STEP.

    (1, 4) in 8 seconds: (4, 7), (4.5, 7.5) or (5, 8)
    """
    length = span[1] - span[0]
    places = [STEP * i for i in range(round((duration - length) / STEP) + 1)]
    overlaps = [max(0.0, length - abs(start - span[0])) for start in places]
    start = rng.choice([p for p, o in zip(places, overlaps, strict=True) if o == min(overlaps)])
    return start, start + length
