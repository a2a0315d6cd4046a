"""Attention for the places that need it, on XLA.

Legend: P prompts, G completions per prompt, S prompt tokens, C completion tokens, T query tokens,
        N query heads, K key/value heads, R = N / K queries that share a key head, H head dimension.

Scores and softmax are float32; probabilities are cast to the values' dtype before they meet them,
as in the original; what the two parts of a group add up to is rounded once, at the end. `...`
stands for any batch axes.

Long sequences go through in blocks of queries (`chunk`), each against the keys that it may read and
no others, so that [S, S] scores never exist: a block's scores are made, used and thrown away, and
made again in the backward pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import ArrayLike

# A finite "minus infinity": a row whose keys are all masked (a padded query) yields the mean of
# the values, which nothing reads, instead of NaN, which the backward pass would spread.
_MASKED = -1e30


def _split_heads(q: Array, kv_heads: int) -> Array:
    """[..., N, H] -> [..., K, R, H]: query heads that share a key head become neighbours."""
    *batch, heads, dim = q.shape
    return q.reshape(*batch, kv_heads, heads // kv_heads, dim)


def _einsum32(subscripts: str, a: Array, b: Array) -> Array:
    """A product of two arrays, summed and left in float32 whatever their dtype."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)


def attend(q: Array, k: Array, v: Array, mask: ArrayLike) -> Array:
    """Softmax attention under a boolean mask.

    Args:
      q: [..., T, N, H] queries.
      k, v: [..., S, K, H] keys and values.
      mask: bool[..., T, S] or broadcastable; True where the query may read the key. Example: for
        prompts of lengths 2 and 3 padded to S = T = 3, `causal & valid` is
        [[1 0 0] [1 1 0] [1 1 0]] and [[1 0 0] [1 1 0] [1 1 1]].

    Returns:
      [..., T, N, H].
    """
    q = _split_heads(q, k.shape[-2])
    scores = _einsum32("...tkrh,...skh->...krts", q, k) / math.sqrt(q.shape[-1])
    scores = jnp.where(jnp.asarray(mask)[..., None, None, :, :], scores, _MASKED)
    weights = jax.nn.softmax(scores, axis=-1).astype(v.dtype)
    out = jnp.einsum("...krts,...skh->...tkrh", weights, v)
    return out.reshape(*out.shape[:-3], -1, out.shape[-1])


def attend_shared_prompt(
    q: Array,
    k: Array,
    v: Array,
    k_prompt: Array,
    v_prompt: Array,
    valid: ArrayLike,
    mask: ArrayLike,
) -> Array:
    """Completion queries over one prompt's keys, held once for the group, and their own.

    One softmax spans both parts: the scores share a maximum and a denominator, so autodiff sees
    the exact function. (Merging two finished attentions by their log-sum-exp is the same forward,
    but JAX's fused attention drops the gradient of that residual.)

    Args:
      q: [P, G, T, N, H] queries; T = C in the update, 1 in decoding.
      k, v: [P, G, C, K, H] the completions' keys and values.
      k_prompt, v_prompt: [P, S, K, H].
      valid: bool[P, S], True where the prompt has a token.
      mask: bool[T, C], True where completion query t may read completion key c. Example: causal
        for T = C = 3 is [[1 0 0] [1 1 0] [1 1 1]]; decoding token 1 of 3 is [[1 1 0]].

    Returns:
      [P, G, T, N, H].
    """
    q = _split_heads(q, k.shape[-2])
    scale = math.sqrt(q.shape[-1])
    prompt = _einsum32("pgtkrh,pskh->pkgrts", q, k_prompt) / scale
    prompt = jnp.where(jnp.asarray(valid)[:, None, None, None, None, :], prompt, _MASKED)
    own = _einsum32("pgtkrh,pgckh->pkgrtc", q, k) / scale
    own = jnp.where(mask, own, _MASKED)

    highest = jnp.maximum(prompt.max(-1, keepdims=True), own.max(-1, keepdims=True))
    highest = jax.lax.stop_gradient(highest)  # cancels between numerator and denominator
    prompt, own = jnp.exp(prompt - highest), jnp.exp(own - highest)
    total = prompt.sum(-1) + own.sum(-1)  # [P, K, G, R, T]

    out = _einsum32("pkgrts,pskh->pgtkrh", prompt.astype(v.dtype), v_prompt)
    out = out + _einsum32("pkgrtc,pgckh->pgtkrh", own.astype(v.dtype), v)
    out = (out / jnp.einsum("pkgrt->pgtkr", total)[..., None]).astype(v.dtype)
    return out.reshape(*out.shape[:3], -1, out.shape[-1])


# ---- causal attention of whole sequences ----


def _in_blocks(one_block: Callable[[slice], Array], length: int, size: int, axis: int) -> Array:
    """Joins `one_block(queries)` over blocks of `size` of `length` queries; 0: one block.

    Example: 5 queries by 2 are the blocks [0:2], [2:4] and [4:5].
    """
    if not 0 < size < length:
        return one_block(slice(0, length))
    starts = range(0, length, size)
    blocks = [jax.checkpoint(partial(one_block, slice(s, min(s + size, length)))) for s in starts]
    return jnp.concatenate([block() for block in blocks], axis=axis)


def attend_causal(q: Array, k: Array, v: Array, valid: Array, chunk: int = 0) -> Array:
    """Prompts over themselves.

    Args:
      q: [P, S, N, H] queries.
      k, v: [P, S, K, H].
      valid: bool[P, S], True where the prompt has a token.
      chunk: queries whose scores exist at once; 0: all.

    Returns:
      [P, S, N, H].
    """

    def one_block(rows: slice) -> Array:
        keys = slice(0, rows.stop)
        mask = _causal(rows) & valid[:, None, keys]
        return attend(q[:, rows], k[:, keys], v[:, keys], mask)

    return _in_blocks(one_block, q.shape[1], chunk, axis=1)


def attend_completions(
    q: Array, k: Array, v: Array, k_prompt: Array, v_prompt: Array, valid: Array, chunk: int = 0
) -> Array:
    """Whole completions over their prompt and, causally, themselves.

    Args:
      q: [P, G, C, N, H]; the others as for `attend_shared_prompt`.
      chunk: queries of one prompt whose scores exist at once, over its G completions; 0: all.

    Returns:
      [P, G, C, N, H].
    """

    def one_block(rows: slice) -> Array:
        keys = slice(0, rows.stop)
        own = q[:, :, rows], k[:, :, keys], v[:, :, keys]
        return attend_shared_prompt(*own, k_prompt, v_prompt, valid, _causal(rows))

    _, group, length = q.shape[:3]
    return _in_blocks(one_block, length, chunk and max(chunk // group, 1), axis=2)


def _causal(rows: slice) -> np.ndarray:
    """bool[T, S]: queries `rows` over keys 0 ... rows.stop; [1:3] gives [[1 1 0] [1 1 1]]."""
    return np.arange(rows.stop) <= np.arange(rows.start, rows.stop)[:, None]
