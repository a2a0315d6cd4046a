"""The temporal reward: how well a predicted span fits the true ones.

The temporal, continuous half of the dual reward. Spans are [start, end] in seconds; several true
spans count as their union, however they overlap. Predictions are not clipped to the video: what
lies outside the true spans, inside the video or not, widens the union.

Every kind is in [0, 1], and 0 where a prediction is missing (NaN), infinite, reversed or empty or
where there is no true span longer than nothing. Never NaN, no division by zero.

P prompts, G completions per prompt, M ground-truth spans.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def temporal_iou(span: ArrayLike, truth: ArrayLike) -> jax.Array:
    """f32[P, G] in [0, 1]: length of the intersection over length of the union.

    `span` f32[P, G, 2] is the prediction, `truth` f32[P, M, 2] the true spans, padded with NaN.

        span  [[[2, 6], [6, 2], [nan, nan]]]      truth [[[0, 4], [3, 5], [nan, nan]]]
        -> [[3 / 6, 0, 0]]                        (the union of the true spans is [0, 5])
    """
    overlap = _overlap(span, truth)
    iou = overlap.intersection / overlap.union
    return jnp.clip(jnp.where(overlap.valid, iou, 0.0), 0.0, 1.0)  # rounding may pass 1 by an ulp


def generalised_iou(span: ArrayLike, truth: ArrayLike) -> jax.Array:
    """f32[P, G] in [0, 1]: (1 + GIoU) / 2, which tells near misses from far ones.

    GIoU = IoU - (hull - union) / hull, in (-1, 1], where the hull is the shortest span around the
    prediction and all true spans (Rezatofighi et al., arXiv 1902.09630, algorithm 1, in one
    dimension). Of several true spans the gaps between them count as hull, not as union.
    Arguments as of `temporal_iou`.

        span [[[2, 6], [5, 6], [9, 10]]], truth [[[0, 4]]]: GIoU 2/6, -1/6, -5/10
        -> [[0.667, 0.417, 0.25]]
    """
    overlap = _overlap(span, truth)
    hull = jnp.maximum(overlap.end, overlap.true_end) - jnp.minimum(
        overlap.start, overlap.true_start
    )
    hull = jnp.where(overlap.real, hull, 1.0)
    giou = overlap.intersection / overlap.union - (hull - overlap.union) / hull
    return jnp.clip(jnp.where(overlap.real, (1.0 + giou) / 2.0, 0.0), 0.0, 1.0)


def timestamp_iou(span: ArrayLike, truth: ArrayLike, duration: ArrayLike) -> jax.Array:
    """f32[P, G] in [0, 1]: Time-R1's timestamp-aware IoU, weighed by how far the ends are off.

    tIoU = IoU (1 - |start - start'| / t) (1 - |end - end'| / t), with the true start' and end' and
    the length t of the video (Time-R1, arXiv 2503.13377, the tIoU reward, and its released code);
    a factor below 0 is 0. Of several true spans, start' is the nearest true start and end' the
    nearest true end, so that the stretch with the best IoU keeps its factors of 1.

    `duration` f32[P], seconds above 0; the other arguments as of `temporal_iou`.

        span [[[2, 6]]], truth [[[0, 4]]], duration [10] -> 1/3 * 0.8 * 0.8
    """
    overlap = _overlap(span, truth)
    iou = overlap.intersection / overlap.union
    truth = jnp.asarray(truth, jnp.float32)[:, None]  # f32[P, 1, M, 2]
    starts = jnp.where(jnp.isfinite(truth).all(-1), truth[..., 0], jnp.inf)
    ends = jnp.where(jnp.isfinite(truth).all(-1), truth[..., 1], jnp.inf)
    off = jnp.abs(starts - overlap.start[..., None]).min(-1)
    off_end = jnp.abs(ends - overlap.end[..., None]).min(-1)
    length = jnp.asarray(duration, jnp.float32)[:, None]
    length = jnp.where(length > 0, length, 1.0)  # NaN too
    near = jnp.clip(1.0 - off / length, 0.0, 1.0) * jnp.clip(1.0 - off_end / length, 0.0, 1.0)
    return jnp.clip(jnp.where(overlap.real, iou * near, 0.0), 0.0, 1.0)


class _Overlap(NamedTuple):
    """A prediction beside the union of the true spans; f32[P, G], or as stated."""

    valid: jax.Array  # bool[P, G], whether the prediction is a span
    real: jax.Array  # bool[P, G], and there is a true one as well
    start: jax.Array  # 0 where it is not
    end: jax.Array
    true_start: jax.Array  # f32[P, 1], of the first true span
    true_end: jax.Array  # f32[P, 1], of the last
    intersection: jax.Array
    union: jax.Array  # above 0


def _overlap(span: ArrayLike, truth: ArrayLike) -> _Overlap:
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
    true_length = _cover(true_start, true_end)[:, None]
    union = (end - start) + true_length - intersection
    return _Overlap(
        valid,
        valid & (true_length > 0),
        start,
        end,
        true_start[:, :1],
        true_end.max(-1, keepdims=True),
        intersection,
        jnp.where(valid, union, 1.0),
    )


def _cover(start: jax.Array, end: jax.Array) -> jax.Array:
    """f32[...]: the length that spans f32[..., M], sorted by their start, cover together.

    Each adds what lies past everything that ended before: [0, 4], [1, 2], [3, 5] -> 4 + 0 + 1.
    """
    reached = jax.lax.cummax(end, axis=end.ndim - 1)
    before = jnp.concatenate([jnp.full_like(end[..., :1], -jnp.inf), reached[..., :-1]], -1)
    return jnp.maximum(end - jnp.maximum(start, before), 0.0).sum(-1)
