"""The regression reward: 1 minus the relative error of a number.

Source: Video-R1's reward for regression (arXiv 2503.21776). P prompts, G completions
per prompt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def regression_reward(number: ArrayLike, truth: ArrayLike) -> jax.Array:
    """f32[P, G] in [0, 1]: `1 - |number - truth| / |truth|`, at least 0.

    `number` f32[P, G] is the answer, `truth` f32[P] the right number; NaN stands for none, and
    earns 0. A truth of 0 has no relative error: there 0 earns 1 and everything else 0.

        number [[9, 25, -10, nan], [0, 1e-9, 0, 0]], truth [10, 0]
        -> [[0.9, 0, 0, 0], [1, 0, 1, 1]]
    """
    number = jnp.asarray(number, jnp.float32)
    truth = jnp.asarray(truth, jnp.float32)[:, None]
    valid = jnp.isfinite(number) & jnp.isfinite(truth)
    number, truth = jnp.where(valid, number, 0.0), jnp.where(valid, truth, 1.0)
    zero = truth == 0
    error = jnp.abs(number - truth) / jnp.abs(jnp.where(zero, 1.0, truth))
    score = jnp.where(zero, (number == 0).astype(jnp.float32), 1.0 - error)
    return jnp.where(valid, jnp.clip(score, 0.0, 1.0), 0.0)
