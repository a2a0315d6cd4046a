"""Qwen2.5-VL's vision tower, in window order.

Legend: P prompts, N patches (padded), R segments and Q patches per segment (windows or frames),
        U = N / 4 merged units, B blocks, D width, A heads, H head dimension, F MLP width,
        E = 4 * D merged width, O output width (the text model's).

The processor lays the patches of a prompt tightly in window order and says which patches form each
window (`window_index`) and each frame (`frame_index`). Linear layers run on the tight layout, so
ragged windows cost nothing there; only attention gathers patches into padded segments. Small frames
share a segment, in which each patch attends to its own frame.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from models.attention import attend
from models.attention_backend import XLA, Backend, frame_attention
from models.layers import (
    Remat,
    project,
    rematerialised,
    rms_norm,
    rotate_half,
    split_by_prompt,
)
from models.low_rank import NO_LORA, Lora, adapters
from models.parameter import parameter
from models.qwen2_5_vl.config import VisionConfig

_NORM_EPS = 1e-6  # hard-coded in the original
_ROPE_THETA = 10_000.0
# CLIP's pixel statistics, per RGB channel, on the 0..255 scale.
PIXEL_MEAN = 255 * np.array([0.48145466, 0.4578275, 0.40821073], np.float32)
PIXEL_STD = 255 * np.array([0.26862954, 0.26130258, 0.27577711], np.float32)


@jax.custom_vjp
def permute(x: Array, index: Array, inverse: Array) -> Array:
    """Moves rows: `out[p, i] = x[p, index[p, i]]`, zero where the index is -1.

    A gather whose index holds each row at most once, so its backward pass is a gather by the
    inverse too and no scatter is needed. Example: for four rows, index [2 0 -1] takes rows 2 and 0
    and pads; its inverse is [1 -1 0 -1].

    Args:
      x: [P, I, ...] rows.
      index: int32[P, J] rows to take.
      inverse: int32[P, I] where each row went.
    """
    flat = x.reshape(*x.shape[:2], -1)  # a row is one axis: libtpu fails on gathers of more
    taken = jnp.take_along_axis(flat, jnp.maximum(index, 0)[..., None], axis=1)
    taken = jnp.where((index >= 0)[..., None], taken, 0)
    return taken.reshape(*index.shape, *x.shape[2:])


def _permute_forward(x: Array, index: Array, inverse: Array) -> tuple[Array, tuple[Array, Array]]:
    return permute(x, index, inverse), (index, inverse)


def _permute_backward(residual: tuple[Array, Array], gradient: Array) -> tuple[Array, None, None]:
    index, inverse = residual
    return permute(gradient, inverse, index), None, None


permute.defvjp(_permute_forward, _permute_backward)


def invert(index: Array, rows: int) -> Array:
    """The inverse of a partial permutation: int32[P, J] with -1 for padding -> int32[P, rows]."""
    slots = jnp.broadcast_to(jnp.arange(index.shape[1], dtype=index.dtype), index.shape)
    target = jnp.where(index >= 0, index, rows)
    empty = jnp.full((index.shape[0], rows), -1, index.dtype)
    return jax.vmap(lambda e, t, s: e.at[t].set(s, mode="drop"))(empty, target, slots)


class VisionBlocks(nnx.Module):
    """All transformer blocks, stacked along a leading block axis B; one block without it."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, lora: Lora = NO_LORA):
        b, d, a, h, f = (
            config.depth,
            config.width,
            config.heads,
            config.head_dim,
            config.mlp_width,
        )
        w = partial(parameter, rngs)
        bias = partial(parameter, rngs, init="zeros")
        norm = partial(parameter, rngs, init="ones")
        embed, heads, mlp = "vision_embed", "vision_heads", "vision_mlp"
        self.norm1 = norm((b, d), ("layers", "norm"))
        # Heads outside: `project` joins these axes, and devices must keep whole heads in it.
        self.qkv = w((b, d, a, 3, h), ("layers", embed, heads, "qkv", "head_dim"), d)
        self.qkv_bias = bias((b, a, 3, h), ("layers", heads, "qkv", "head_dim"))
        self.proj = w((b, a, h, d), ("layers", heads, "head_dim", embed), a * h)
        self.proj_bias = bias((b, d), ("layers", "norm"))
        self.norm2 = norm((b, d), ("layers", "norm"))
        self.gate = w((b, d, f), ("layers", embed, mlp), d)
        self.gate_bias = bias((b, f), ("layers", mlp))
        self.up = w((b, d, f), ("layers", embed, mlp), d)
        self.up_bias = bias((b, f), ("layers", mlp))
        self.down = w((b, f, d), ("layers", mlp, embed), f)
        self.down_bias = bias((b, d), ("layers", "norm"))
        self.low_rank = adapters(
            rngs,
            lora,
            {
                "vision.attention": {"qkv": (self.qkv, 1), "proj": (self.proj, 2)},
                "vision.mlp": {"gate": (self.gate, 1), "up": (self.up, 1), "down": (self.down, 1)},
            },
        )

    def query_key_value(self, x: Array, cos: Array, sin: Array) -> Array:
        """[P, N, D] -> rotated [P, N, A, 3, H]; the rotation runs in float32, then casts back."""
        y = rms_norm(x, self.norm1[...], _NORM_EPS)
        qkv = project(y, self.qkv, adapter=self.low_rank.get("qkv")) + self.qkv_bias[...]
        qk, v = qkv[..., :2, :].astype(jnp.float32), qkv[..., 2:, :]
        qk = qk * cos[:, :, None, None] + rotate_half(qk) * sin[:, :, None, None]
        return jnp.concatenate([qk.astype(v.dtype), v], axis=-2)

    def finish(self, x: Array, attended: Array) -> Array:
        """Adds the projected attention [P, N, A, H] and the SwiGLU MLP to the stream [P, N, D]."""
        low = self.low_rank
        x = x + project(attended, self.proj, axes=2, adapter=low.get("proj")) + self.proj_bias[...]
        y = rms_norm(x, self.norm2[...], _NORM_EPS)
        gate = jax.nn.silu(project(y, self.gate, adapter=low.get("gate")) + self.gate_bias[...])
        up = project(y, self.up, adapter=low.get("up")) + self.up_bias[...]
        return x + project(gate * up, self.down, adapter=low.get("down")) + self.down_bias[...]


class VisionMerger(nnx.Module):
    """Joins the four patches of a merged unit into one vector of the text model's width."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs):
        d, o = config.width, config.out_width
        e = d * config.merge_area
        w = partial(parameter, rngs)
        bias = partial(parameter, rngs, init="zeros")
        self.norm = parameter(rngs, (d,), ("norm",), init="ones")
        self.hidden = w((e, e), ("vision_embed", "vision_mlp"), e)
        self.hidden_bias = bias((e,), ("vision_mlp",))
        self.out = w((e, o), ("vision_mlp", "embed"), e)
        self.out_bias = bias((o,), ("norm",))

    def __call__(self, x: Array, merge_area: int) -> Array:
        """[P, N, D] -> [P, U, O]."""
        p, n, d = x.shape
        y = rms_norm(x, self.norm[...], _NORM_EPS).reshape(p, n // merge_area, merge_area * d)
        y = jax.nn.gelu(project(y, self.hidden) + self.hidden_bias[...], approximate=False)
        return project(y, self.out) + self.out_bias[...]


class VisionTower(nnx.Module):
    """uint8 patches -> features that stand in for the prompt's image and video tokens."""

    def __init__(self, config: VisionConfig, rngs: nnx.Rngs, lora: Lora = NO_LORA):
        self.config = config
        self.patch_embed = parameter(
            rngs, (config.patch_dim, config.width), ("patch", "vision_embed"), config.patch_dim
        )
        self.blocks = VisionBlocks(config, rngs, lora)
        self.merger = VisionMerger(config, rngs)

    def __call__(
        self,
        patches: Array,
        patch_hw: Array,
        window_index: Array,
        frame_index: Array,
        *,
        remat: Remat = "none",
        backend: Backend = XLA,
        keep: bool = False,
    ) -> tuple[Array, Array | None]:
        """Encodes the patches of P prompts.

        Args:
          patches: uint8[P, N, 1176] raw pixels, rows in (channel, frame, row, column) order, in
            window order; the four patches of a merged unit side by side.
          patch_hw: int32[P, N, 2] row and column of each patch in its frame.
          window_index: int32[P, W, Q] the patches of each window, -1 for padding.
          frame_index: int32[P, R', Q'] rows of whole frames, one or several each, -1 for padding.
          remat: what of each block is kept for the backward pass.
          backend: what attends within frames; within windows it is always XLA.
          keep: whether to return what each block gives, to look inside.

        Returns:
          [P, U, O] features in window order, in the weights' dtype; with `keep`, [B, P, N, D] of
          the blocks.
        """
        config = self.config
        x = project(self.normalise(patches).astype(self.patch_embed[...].dtype), self.patch_embed)
        cos, sin = self.rotary(patch_hw)
        window_inverse = invert(_flat(window_index), patches.shape[1])
        in_windows = partial(attend, mask=(window_index >= 0)[:, :, None, :])
        frame_inverse, frame = _frame_numbers(frame_index, patch_hw)
        in_frames = frame_attention(frame, backend)
        block_def, block_params = nnx.split(self.blocks)
        is_full = np.isin(np.arange(config.depth), config.full_attention_blocks)

        def run_block(x: Array, scanned: Any) -> tuple[Array, Array | None]:
            params, full = scanned
            block = nnx.merge(block_def, params)
            qkv = block.query_key_value(x, cos, sin)
            attended = jax.lax.cond(
                full,
                lambda y: _attend_segments(y, frame_index, frame_inverse, in_frames),
                lambda y: _attend_segments(y, window_index, window_inverse, in_windows),
                qkv,
            )
            x = split_by_prompt(block.finish(x, attended))
            return x, x if keep else None

        body = rematerialised(run_block, remat)
        x, kept = jax.lax.scan(body, split_by_prompt(x), (block_params, jnp.asarray(is_full)))
        return split_by_prompt(self.merger(x, config.merge_area)), kept

    def normalise(self, patches: Array) -> Array:
        """uint8[P, N, 1176] -> float32, by CLIP's mean and deviation of each channel."""
        per_channel = self.config.patch_dim // 3
        mean, std = (jnp.repeat(jnp.asarray(s), per_channel) for s in (PIXEL_MEAN, PIXEL_STD))
        return (patches.astype(jnp.float32) - mean) / std

    def rotary(self, patch_hw: Array) -> tuple[Array, Array]:
        """float32[P, N, H] cosines and sines of the 2-D rotary embedding (no temporal part)."""
        half = self.config.head_dim // 2
        frequency = _ROPE_THETA ** -(np.arange(0, half, 2, dtype=np.float32) / half)  # [H/4]
        angle = patch_hw.astype(jnp.float32)[..., None] * frequency  # [P, N, 2, H/4]
        angle = angle.reshape(*patch_hw.shape[:-1], half)
        angle = jnp.concatenate([angle, angle], axis=-1)
        return jnp.cos(angle), jnp.sin(angle)


def _frame_numbers(index: Array, patch_hw: Array) -> tuple[Array, Array]:
    """The inverse of a table of rows of frames, and the number of each slot's frame.

    A frame's first patch is at (0, 0) and no other is, so that counting those numbers the frames.
    One worked example: frames of 2 and 1 patches in a row of 4 slots, [0 1 2 -1], are numbered
    [1 1 2 0].

    Args:
      index: int32[P, R, Q], -1 for padding.
      patch_hw: int32[P, N, 2].

    Returns:
      int32[P, N], int32[P, R, Q].
    """
    frame = jnp.cumsum(jnp.all(patch_hw == 0, axis=-1), axis=1, dtype=index.dtype)[..., None]
    flat = _flat(index)
    inverse = invert(flat, patch_hw.shape[1])
    return inverse, permute(frame, flat, inverse).reshape(index.shape)


def _attend_segments(
    qkv: Array, index: Array, inverse: Array, attention: Callable[[Array, Array, Array], Array]
) -> Array:
    """Attention inside each segment: [P, N, A, 3, H] -> [P, N, A, H].

    Args:
      index: int32[P, R, Q] the patches of each segment, -1 for padding.
      inverse: int32[P, N] where each patch went.
      attention: queries, keys and values of segments, each [P, R, Q, A, H], to [P, R, Q, A, H].
    """
    flat = _flat(index)
    gathered = permute(qkv, flat, inverse).reshape(*index.shape, *qkv.shape[2:])
    out = attention(*(gathered[..., part, :] for part in range(3)))
    return permute(out.reshape(*flat.shape, *out.shape[3:]), inverse, flat)


def _flat(index: Array) -> Array:
    """[P, R, Q] -> [P, R Q]."""
    return index.reshape(index.shape[0], -1)
