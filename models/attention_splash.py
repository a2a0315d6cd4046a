"""Attention on TPUs: jax's splash attention, a flash kernel that skips blocks which nobody reads.

Legend: B sequences, T tokens of a sequence (queries and keys alike), N query heads, K key/value
        heads, H head dimension, G completions per prompt, S prompt tokens, C completion tokens.

This is what one device computes; `attention_backend` splits prompts and heads over a mesh. Scores
are float32 and exist a block at a time; groups of query heads share a key head inside the kernel.
The scale goes into the queries, which rounds them once more than XLA's path does.

A group is one sequence, [prompt | completion 1 | ... | completion G], and blocks of other
completions are skipped. G sequences with a copy of the prompt's keys and values each would hold
G (S + C) rows of them per layer instead of S + G C (3B, G = 8, S = 4,096, C = 512: 38 MB a prompt
instead of 8, and as much again for their gradients), round each gradient before the group's are
summed, and pad every completion to whole blocks. Here the sum stays in the kernel, in float32.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental.pallas.ops.tpu import splash_attention as splash

from models.layers import ATTENTION

_LANES = 128  # blocks and head dimensions are whole vectors of a TPU
_BLOCK = 512  # queries and keys of a block, at most: 1 MiB of scores on the chip

# The mask of a sequence of so many tokens, padding included.
MakeMask = Callable[[int], splash.Mask]


def attend_causal(q: Array, k: Array, v: Array, *, emulated: bool = False) -> Array:
    """Prompts over themselves; padding, on the right, is read by padding only.

    Args:
      q: [B, T, N, H] queries.
      k, v: [B, T, K, H].
      emulated: run the kernel's code without a TPU.

    Returns:
      [B, T, N, H].
    """
    return _attend(q, k, v, causal, None, emulated)


def attend_packed(
    q: Array, k: Array, v: Array, valid: Array, *, completion: int, emulated: bool = False
) -> Array:
    """Groups: prompts over themselves, completions over their prompt and, causally, themselves.

    Args:
      q: [B, T, N, H] with T = S + G C; k, v: [B, T, K, H].
      valid: bool[B, S], True where the prompt has a token.
      completion: C.
      emulated: as above.

    Returns:
      [B, T, N, H].
    """
    prompt = valid.shape[1]
    segment = jnp.pad(valid, ((0, 0), (0, q.shape[1] - prompt)), constant_values=True)
    return _attend(q, k, v, packed(prompt, completion), segment, emulated)


def attend_segments(
    q: Array, k: Array, v: Array, segment: Array, *, emulated: bool = False
) -> Array:
    """Each token over the tokens with its number.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H].
      segment: int32[B, T]; 0 is padding.
      emulated: as above.

    Returns:
      [B, T, N, H].
    """
    return _attend(q, k, v, full, segment, emulated)


# ---- masks ----


def causal(length: int) -> splash.Mask:
    """Tokens over themselves and those before."""
    return splash.CausalMask((length, length))


def full(length: int) -> splash.Mask:
    """All over all."""
    return splash.FullMask((length, length))


def packed(prompt: int, completion: int) -> MakeMask:
    """A group's: of `prompt` tokens and completions of `completion` tokens each."""
    return partial(_PackedMask, prompt, completion)


@dataclasses.dataclass(frozen=True)
class _PackedMask(splash.Mask):
    """Made a block at a time; what is behind the last completion counts as another one.

    Example: a prompt of 2 and completions of 1 are [[1 0 0 0] [1 1 0 0] [1 1 1 0] [1 1 0 1]].
    """

    prompt: int
    completion: int
    length: int

    @property
    def shape(self) -> tuple[int, int]:
        return self.length, self.length

    def __getitem__(self, block: tuple[slice, slice]) -> np.ndarray:
        rows, columns = (np.arange(*part.indices(self.length)) for part in block)
        query, key = rows[:, None], columns[None]
        query_owner, key_owner = ((x - self.prompt) // self.completion for x in (query, key))
        return (query >= key) & ((key < self.prompt) | (query_owner == key_owner))


def executed_pairs(make_mask: MakeMask, length: int) -> int:
    """Pairs of queries and keys in the blocks that the kernel does not skip."""
    block, padded = _blocks(length)
    mask = splash.MultiHeadMask([make_mask(padded)])
    info, _ = splash.splash_attention_mask_info.process_mask(mask, (block, block))
    return int(np.count_nonzero(np.asarray(info.block_mask))) * block**2


# ---- the kernel ----


def padded_dim(dim: int) -> int:
    """A head dimension as the kernel computes it: 80 -> 128."""
    return -(-dim // _LANES) * _LANES


def _blocks(length: int) -> tuple[int, int]:
    """(tokens of a block, tokens of a sequence padded to whole blocks); 720 -> (384, 768)."""
    count = -(-length // _BLOCK)
    block = -(-length // (count * _LANES)) * _LANES
    return block, count * block


def _attend(
    q: Array, k: Array, v: Array, make_mask: MakeMask, segment: Array | None, emulated: bool
) -> Array:
    """The kernel on sequences of any length and heads of any dimension.

    Args:
      segment: bool or int32[B, T], tokens read those that are equal; padding added here is 0.
    """
    length, heads, dim = q.shape[1:]
    block, padded = _blocks(length)
    padding = padded - length

    def arrange(x: Array) -> Array:  # [B, T, N, H] -> [B, N, T, H]
        x = jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, padded_dim(dim) - dim)))
        return jnp.swapaxes(x, 1, 2)

    ids = None
    if segment is not None:
        segment = jnp.pad(segment.astype(jnp.int32), ((0, 0), (0, padding)))
        ids = splash.SegmentIds(segment, segment)
    kernel = splash.make_splash_mha_single_device(
        splash.MultiHeadMask([make_mask(padded)] * heads),
        block_sizes=splash.BlockSizes(block, block, block, block, block, block, block, block),
        residual_checkpoint_name=ATTENTION,
        interpret=emulated,
    )
    q = (q.astype(jnp.float32) / math.sqrt(dim)).astype(q.dtype)
    out = jax.vmap(kernel)(arrange(q), arrange(k), arrange(v), ids)
    return jnp.swapaxes(out, 1, 2)[:, :length, :, :dim]
