"""The format component."""

from __future__ import annotations

import jax
import numpy as np

from rewards.format import format_reward


def test_a_well_formed_completion_earns_one_and_any_other_nothing() -> None:
    format_ok = np.array([[True, False, True], [False, False, True]])
    for reward in (format_reward(format_ok), jax.jit(format_reward)(format_ok)):
        assert reward.dtype == np.float32
        np.testing.assert_array_equal(reward, [[1, 0, 1], [0, 0, 1]])
