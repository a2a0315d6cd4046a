"""The regression component."""

from __future__ import annotations

import jax
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.regression import regression_reward

NAN, INF = np.nan, np.inf


def test_regression_by_hand() -> None:
    number = np.float32([[9, 25, -10, NAN], [0, 1e-9, -0.0, 5], [-9, -11, 10, INF], [1, 0, 2, NAN]])
    truth = np.float32([10, 0, -10, NAN])
    expected = [[0.9, 0, 0, 0], [1, 0, 1, 0], [0.9, 0.9, 0, 0], [0, 0, 0, 0]]
    for score in (regression_reward, jax.jit(regression_reward)):
        found = score(number, truth)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, np.float32(expected), atol=1e-6)


@settings(max_examples=150, deadline=None)
@given(st.floats(width=32), st.floats(width=32))
def test_any_numbers_give_a_score_within_bounds(number: float, truth: float) -> None:
    assert 0 <= float(regression_reward([[number]], [truth])[0, 0]) <= 1


@settings(max_examples=150, deadline=None)
@given(
    st.floats(-1e9, 1e9, width=32),
    st.floats(-1e9, 1e9, width=32).filter(lambda truth: abs(truth) > 1e-30),
)
def test_regression_is_one_minus_the_relative_error(number: float, truth: float) -> None:
    """But for the smallest numbers of all, subnormal ones, which XLA takes for zero."""
    expected = max(0.0, 1.0 - abs(number - truth) / abs(truth))
    np.testing.assert_allclose(regression_reward([[number]], [truth])[0, 0], expected, atol=1e-5)
