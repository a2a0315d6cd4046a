"""How often a loop runs, from what it compares."""

from __future__ import annotations

import pytest

from jaxgrpo.hlo_loops import Carried, Comparison, Value, trips_until

I, LIMIT = Carried(0, 0), Carried(1, 0)


def trips(left: Value, direction: str, right: Value, first: Value, step: int) -> int | None:
    """Of a loop that carries (i, 10) and adds `step` to i."""
    return trips_until(Comparison(left, direction, right), (first, 10), (Carried(0, step), LIMIT))


@pytest.mark.parametrize(
    ("left", "direction", "right", "first", "step"),
    [
        (I, "LT", 10, 0, 1),
        (I, "LT", 10, 1, 3),
        (I, "LE", 10, 1, 3),
        (I, "LE", 9, 0, 3),
        (I, "LT", LIMIT, 4, 2),
        (I, "GT", 0, 7, -2),
        (I, "GE", 0, 8, -2),
        (10, "GT", I, 0, 4),
        (Carried(0, 1), "LT", 10, 0, 1),
        (I, "LT", 3, 5, 1),
    ],
)
def test_trips_are_those_of_the_loop_in_python(
    left: Value, direction: str, right: Value, first: int, step: int
) -> None:
    compare = {
        "LT": lambda a, b: a < b,
        "LE": lambda a, b: a <= b,
        "GT": lambda a, b: a > b,
        "GE": lambda a, b: a >= b,
    }[direction]

    def now(value: Value, carried: list[int]) -> int:
        return carried[value.place] + value.plus if isinstance(value, Carried) else int(value)

    state, count = [first, 10], 0
    while compare(now(left, state), now(right, state)):
        state[0] += step
        count += 1
    assert trips(left, direction, right, first, step) == count


@pytest.mark.parametrize(
    ("left", "direction", "right", "first", "step"),
    [
        (I, "NE", 10, 0, 3),  # steps over its limit
        (I, "LT", 10, 0, -1),  # runs away from it
        (I, "LT", 10, 0, 0),
        (I, "LT", None, 0, 1),
        (None, "LT", 10, 0, 1),
        (I, "LT", 10, None, 1),
    ],
)
def test_what_cannot_be_known_is_not_guessed(
    left: Value, direction: str, right: Value, first: Value, step: int
) -> None:
    assert trips(left, direction, right, first, step) is None
