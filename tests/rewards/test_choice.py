"""The choice component."""

from __future__ import annotations

import jax
import numpy as np

from rewards.choice import choice_reward


def test_only_the_right_letter_earns_one() -> None:
    choice = np.array([[0, 1, 2], [2, 25, 2]], np.int32)
    for score in (choice_reward, jax.jit(choice_reward)):
        reward = score(choice, np.array([1, 2], np.int32))
        assert reward.dtype == np.float32
        np.testing.assert_array_equal(reward, [[0, 1, 0], [1, 0, 1]])


def test_no_answer_earns_nothing_even_where_there_is_no_truth() -> None:
    choice = np.array([[-1, 0], [-1, 0]], np.int32)
    np.testing.assert_array_equal(
        choice_reward(choice, np.array([0, -1], np.int32)), [[0, 1], [0, 0]]
    )
