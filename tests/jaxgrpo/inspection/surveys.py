"""A survey to change parts of, for tests of what is said about one."""

from __future__ import annotations

import dataclasses
from typing import Any

from jaxgrpo.inspection.right_answers import RightAnswers
from jaxgrpo.inspection.survey import Bucket, Column, Part, Steps, Survey

ANSWERS = RightAnswers(reward=1.0, empty=0.0, short=(), too_long={}, limit=64, unwritten={})
COLUMN = Column(least=2, median=3.0, p95=5.0, most=5, edges=(1.5, 3.5, 5.5), counts=(12, 8))


def a_survey(**changes: Any) -> Survey:
    """Twenty good items in one bucket, with these fields replaced."""
    good = Survey(
        questions=20,
        items=20,
        parts=(Part("train.jsonl", "tvg", 20, 1.0, 1.0),),
        bad=(),
        overflows=(),
        outside=(),
        columns={"prompt (tokens)": COLUMN},
        resolutions={"640 x 480": 20},
        buckets=(Bucket(128, 20, 100.0, 1.28, 1.1, 5),),
        steps=Steps(prompts=4, epoch=5, run=10, never=()),
        answers=ANSWERS,
    )
    return dataclasses.replace(good, **changes)
