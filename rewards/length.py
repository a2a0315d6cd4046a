"""Scores of a completion's length in tokens, the stop token included.

P prompts, G completions per prompt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

from rewards.options import LengthBand, Overlong


def length_bonus(length: ArrayLike, answer_score: ArrayLike, band: LengthBand) -> jax.Array:
    """f32[P, G] in {0, 1}: 1 where the answer is right and the length within [min, max].

    Source: Video-R1 (arXiv 2503.21776), the length-based reward. `length` i32[P, G];
    `answer_score` f32[P, G] is right from `band.right` on.
    """
    length = jnp.asarray(length)
    within = (length >= band.min) & (length <= band.max)
    return (within & (jnp.asarray(answer_score) >= band.right)).astype(jnp.float32)


def overlong_penalty(length: ArrayLike, overlong: Overlong) -> jax.Array:
    """f32[P, G] in [-1, 0] from `length` i32[P, G].

    Source: DAPO (arXiv 2503.14476), equation 13: with L_max = limit and L_cache = cache, 0 up to
    L_max - L_cache, then ((L_max - L_cache) - length) / L_cache, and -1 past L_max.

        limit 100, cache 20: lengths 80, 85, 100, 200 -> 0, -0.25, -1, -1
    """
    free = overlong.limit - overlong.cache
    return jnp.clip((free - jnp.asarray(length)) / jnp.float32(overlong.cache), -1.0, 0.0)
