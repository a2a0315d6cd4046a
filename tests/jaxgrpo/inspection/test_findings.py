"""What is said about a dataset, and how it is to be mended."""

from __future__ import annotations

import dataclasses

import pytest

from jaxgrpo import config
from jaxgrpo.inspection.findings import problem, warnings
from jaxgrpo.inspection.right_answers import Short
from jaxgrpo.inspection.survey import Bad, Bucket, Outside, Overflow, Steps, Survey
from tests.jaxgrpo.inspection.surveys import ANSWERS, a_survey

CONFIG = config.from_dict(
    {"run_dir": "r", "model": {"path": "m"}, "data": {"train": "t"}, "rollout": {"prompts": 4}}
)


def said(part: Survey, key: str = "data.train") -> list[str]:
    return list(warnings(key, part, CONFIG))


def test_nothing_is_said_of_good_data() -> None:
    assert said(a_survey()) == []


def test_the_first_items_are_named_and_the_others_counted() -> None:
    bad = tuple(Bad(f"q{i}", "empty" if i else "truncated", "why") for i in range(7))
    [warning] = said(a_survey(bad=bad))
    assert warning == (
        "data.train: 7 of 20 items left out, their videos cannot be used (6 empty, 1 truncated): "
        "q0 (truncated), q1 (empty), q2 (empty), q3 (empty), q4 (empty), and 2 more"
    )


def test_a_prompt_that_is_too_long_is_a_problem() -> None:
    part = a_survey(overflows=(Overflow("q", 150, 100, 22),))
    assert problem("data.eval", part, 128, "do this") == (
        "data.eval: the largest bucket, of 128 tokens, is too small for 1 prompt: q by 22 tokens "
        "(150); do this"
    )


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"short": (Short("q", 0.5, 1.0, {"iou": 0.25}),)}, "q (0.5 of 1: iou 0.25)"),
        (
            {"too_long": {"q": 70}},
            "64 tokens, so that no completion can be right: q (70)",
        ),
        ({"too_long": {"q": 70}}, "raise rollout.max_new_tokens"),
        ({"unwritten": {"q": "record 'q': why"}}, "which `jaxgrpo sft` would refuse: record 'q'"),
    ],
)
def test_a_right_answer_that_earns_less_is_named(changes: dict[str, object], expected: str) -> None:
    [warning] = said(a_survey(answers=dataclasses.replace(ANSWERS, **changes)))
    assert expected in warning


def test_the_limit_of_evaluation_has_a_key_of_its_own() -> None:
    part = a_survey(answers=dataclasses.replace(ANSWERS, too_long={"q": 70}))
    assert said(part, "data.eval")[0].endswith("raise eval.max_new_tokens")


def test_a_span_beyond_the_video_is_named() -> None:
    [warning] = said(a_survey(outside=(Outside("q", (8.0, 12.5), 9.04),)))
    assert "1 true span beyond the end of the video: q (8-12.5 s of 9.04 s)" in warning


@pytest.mark.parametrize(
    ("bucket", "expected"),
    [
        (Bucket(1024, 20, 330.0, 3.1, 1.0, 5), "add one of about 384 to data.buckets"),
        (Bucket(1024, 20, 1000.0, 1.6, 1.0, 5), "its prompts have 1000 (median)"),
        (Bucket(128, 3, 100.0, 1.2, 1.0, 1), "holds 3 items, fewer than rollout.prompts=4"),
    ],
)
def test_a_bucket_that_wastes_work_is_named(bucket: Bucket, expected: str) -> None:
    [warning] = said(a_survey(buckets=(bucket,)))
    assert expected in warning
    assert ("add one" in warning) == ("add one" in expected)


def test_an_empty_bucket_wastes_nothing() -> None:
    buckets = (*a_survey().buckets, Bucket(4096, 0, None, None, None, 0))
    assert said(a_survey(buckets=buckets)) == []


def test_items_that_the_run_never_draws_are_named() -> None:
    part = a_survey(steps=Steps(prompts=4, epoch=5, run=2, never=("a", "b")))
    [warning] = said(part)
    assert warning == (
        "data.train: 2 of 20 items are never drawn in train.steps=2 of 4 prompts (an epoch has 5): "
        "a, b"
    )
