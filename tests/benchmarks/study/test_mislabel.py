"""Wrong labels are wrong, possible, and the same each time."""

from __future__ import annotations

import random

import pytest

from benchmarks.study.mislabel import elsewhere, mislabelled, wrong
from data.records import Record

RECORDS = [
    Record(f"{i}-{task}", "a.mp4", task, "?", options, answer, spans, 8.0)
    for i in range(200)
    for task, options, answer, spans in (
        ("mcqa", ("red", "green", "blue"), "B", ()),
        ("tvg", (), None, ((1.0, 4.0),)),
        ("gqa", ("red", "green", "blue"), "A", ((1.0, 4.0),)),
    )
]


def test_every_wrong_answer_is_given_and_the_right_one_never_is() -> None:
    changed = [wrong(record) for record in RECORDS]
    assert {r.answer for r in changed if r.task == "mcqa"} == {"A", "C"}
    assert {r.answer for r in changed if r.task == "gqa"} == {"B", "C"}
    assert {r.spans for r in changed if r.task == "tvg"} == {
        *(((4.0, 7.0),), ((4.5, 7.5),), ((5.0, 8.0),))
    }


@pytest.mark.parametrize(
    ("span", "duration", "places"),
    [
        ((2.0, 5.0), 8.0, {(5.0, 8.0)}),
        ((1.5, 5.5), 8.0, {(4.0, 8.0)}),  # it fits beside it nowhere: the least overlap
        ((2.0, 6.0), 8.0, {(0.0, 4.0), (4.0, 8.0)}),
    ],
)
def test_a_wrong_span_is_as_long_and_as_far_away_as_can_be(
    span: tuple[float, float], duration: float, places: set[tuple[float, float]]
) -> None:
    rng = random.Random(0)
    assert {elsewhere(span, duration, rng) for _ in range(50)} == places


def test_so_many_are_wrong_and_the_same_ones_each_time() -> None:
    """300 of 600 expected, with a standard deviation of 12."""
    found = mislabelled(RECORDS, 0.5)
    assert sum(a != b for a, b in zip(RECORDS, found, strict=True)) == pytest.approx(300, abs=50)
    assert found == mislabelled(RECORDS, 0.5)
    assert mislabelled(RECORDS, 0.0) == RECORDS
