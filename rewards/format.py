"""The format reward: 1 where a completion has the scored form, else 0.

Source: the format reward of DeepSeek-R1 (arXiv 2501.12948, section 2.2.2), for the formats that
`rewards.parse` describes. P prompts, G completions per prompt.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def format_reward(format_ok: ArrayLike) -> jax.Array:
    """f32[P, G] in {0, 1} from bool[P, G], as `rewards.parse` found it."""
    return jnp.asarray(format_ok).astype(jnp.float32)
