"""What a difference of two arrays is called."""

from __future__ import annotations

import numpy as np
import pytest

from jaxgrpo.verification.checks import OtherSideError, Status, ask, difference, verdict_on

ZEROS = np.zeros((2, 3), np.float32)


def test_no_difference_within_the_tolerance() -> None:
    assert difference("x", ZEROS, ZEROS + 0.1, 0.2) is None
    assert difference("x", ZEROS[:0], ZEROS[:0], 0) is None


def test_the_worst_place_its_values_and_how_many_differ() -> None:
    theirs = np.array([[0, 0.5, 0], [0, -0.75, 0]], np.float32)
    assert difference("x", ZEROS, theirs, 0.25) == (
        "x[1, 1]: ours 0, theirs -0.75 (2 of 6 differ, tolerance 0.25)"
    )


def test_integers_must_be_equal() -> None:
    ours = np.array([5, 6, 7], np.int32)
    assert difference("ids", ours, np.array([5, 9, 7]), 0) == (
        "ids[1]: ours 6, theirs 9 (1 of 3 differ)"
    )


def test_other_shapes_are_a_difference() -> None:
    assert difference("x", ZEROS, ZEROS[0], 9.0) == "x: ours is [2, 3], theirs [3]"


def test_what_is_not_a_number_is_a_difference() -> None:
    theirs = ZEROS.copy()
    theirs[1, 2] = np.nan
    assert str(difference("x", ZEROS, theirs, 1e9)).startswith("x[1, 2]: ours 0, theirs nan")


def test_whatever_the_other_side_raises_is_told_in_one_line() -> None:
    def fails() -> None:
        raise KeyError("a\nb")

    with pytest.raises(OtherSideError, match=r"its model: KeyError: 'a\\nb'"):
        ask("its model", fails)
    assert ask("its model", lambda: 3) == 3


def test_a_problem_makes_a_check_fail() -> None:
    assert verdict_on("x", [], "good", "bad")[1:] == (Status.PASS, "good", ())
    assert verdict_on("x", ["a", "b"], "good", "bad")[1:] == (Status.FAIL, "bad", ("a", "b"))
