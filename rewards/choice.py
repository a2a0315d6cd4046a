"""The choice reward: 1 where the letter of the right option was answered, else 0.

The semantic, discrete half of the dual reward. P prompts, G completions per prompt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def choice_reward(choice: ArrayLike, truth: ArrayLike) -> jax.Array:
    """f32[P, G] in {0, 1} from the answered i32[P, G] and the right i32[P] option (0 is A).

    No answer is -1, no truth is -1 as well, and the two never agree. A letter that is not among
    the options is not the right one and earns 0.

        choice [[1, 2, -1], [0, -1, -1]], truth [1, -1] -> [[1, 0, 0], [0, 0, 0]]
    """
    right = jnp.asarray(truth)[:, None]
    return ((jnp.asarray(choice) == right) & (right >= 0)).astype(jnp.float32)
