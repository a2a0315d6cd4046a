"""The temporal reward: intersection over union of a predicted span and the true ones.

The temporal, continuous half of the dual reward. Spans are [start, end] in seconds; several true
spans count as their union, however they overlap. Predictions are not clipped to the video: what
lies outside the true spans, inside the video or not, widens the union.

P prompts, G completions per prompt, M ground-truth spans.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def temporal_iou(span: ArrayLike, truth: ArrayLike) -> jax.Array:
    """f32[P, G] in [0, 1]: length of the intersection over length of the union.

    `span` f32[P, G, 2] is the prediction, `truth` f32[P, M, 2] the true spans, padded with NaN.
    A prediction that is missing (NaN), infinite, reversed or empty earns 0; so does every
    prediction where there is no true span longer than nothing. Never NaN, no division by zero.

        span  [[[2, 6], [6, 2], [nan, nan]]]      truth [[[0, 4], [3, 5], [nan, nan]]]
        -> [[3 / 6, 0, 0]]                        (the union of the true spans is [0, 5])
    """
    span = jnp.asarray(span, jnp.float32)
    truth = jnp.asarray(truth, jnp.float32)
    length = span[..., 1] - span[..., 0]
    valid = jnp.isfinite(span).all(-1) & jnp.isfinite(length) & (length > 0)  # bool[P, G]
    span = jnp.where(valid[..., None], span, 0.0)

    # Padding becomes a span from inf to -inf: it sorts last and covers nothing.
    real = jnp.isfinite(truth).all(-1)  # bool[P, M]
    true_start = jnp.where(real, truth[..., 0], jnp.inf)
    true_end = jnp.where(real, truth[..., 1], -jnp.inf)
    order = jnp.argsort(true_start, axis=-1)
    true_start = jnp.take_along_axis(true_start, order, -1)
    true_end = jnp.take_along_axis(true_end, order, -1)

    # Clipping keeps the order, so the intersection is the cover of the clipped spans.
    start, end = span[..., 0], span[..., 1]  # f32[P, G]
    clipped_start = jnp.clip(true_start[:, None], start[..., None], end[..., None])  # f32[P, G, M]
    clipped_end = jnp.clip(true_end[:, None], start[..., None], end[..., None])
    intersection = _cover(clipped_start, clipped_end)  # f32[P, G]
    union = (end - start) + _cover(true_start, true_end)[:, None] - intersection
    iou = jnp.where(valid, intersection / jnp.where(valid, union, 1.0), 0.0)
    return jnp.clip(iou, 0.0, 1.0)  # rounding may pass 1 by an ulp


def _cover(start: jax.Array, end: jax.Array) -> jax.Array:
    """f32[...]: the length that spans f32[..., M], sorted by their start, cover together.

    Each adds what lies past everything that ended before: [0, 4], [1, 2], [3, 5] -> 4 + 0 + 1.
    """
    reached = jax.lax.cummax(end, axis=end.ndim - 1)
    before = jnp.concatenate([jnp.full_like(end[..., :1], -jnp.inf), reached[..., :-1]], -1)
    return jnp.maximum(end - jnp.maximum(start, before), 0.0).sum(-1)
