"""The scores of a completion's length."""

from __future__ import annotations

import jax
import numpy as np

from rewards.length import length_bonus, overlong_penalty
from rewards.options import LengthBand, Overlong


def test_only_a_right_answer_within_the_band_earns_the_bonus() -> None:
    band = LengthBand(0.2, min=320, max=512, right=0.5)
    length = np.int32([[319, 320, 512, 513], [400, 400, 400, 0]])
    score = np.float32([[1, 1, 1, 1], [0.5, 0.49, 0, 1]])
    expected = [[0, 1, 1, 0], [1, 0, 0, 0]]
    for bonus in (length_bonus, jax.jit(length_bonus, static_argnames="band")):
        found = bonus(length, score, band=band)
        assert found.dtype == np.float32
        np.testing.assert_array_equal(found, expected)


def test_the_overlong_penalty_is_equation_13_of_dapo() -> None:
    limit, cache = 100, 20
    length = np.arange(0, 140, dtype=np.int32)[None]
    expected = [
        0 if n <= limit - cache else -1 if n > limit else ((limit - cache) - n) / cache
        for n in range(140)
    ]
    found = overlong_penalty(length, Overlong(1.0, cache, limit))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, [expected], atol=1e-6)


def test_a_cache_longer_than_the_limit_penalises_from_the_first_token_on() -> None:
    found = np.asarray(overlong_penalty(np.int32([[0, 5, 10]]), Overlong(1.0, 20, 10)))
    np.testing.assert_allclose(found, [[-0.5, -0.75, -1]])
