"""Attention for the places that need it, on XLA.

Legend: P prompts, G completions per prompt, S prompt tokens, C completion tokens, T query tokens,
        N query heads, K key/value heads, R = N / K queries that share a key head, H head dimension.

Scores and softmax are float32; probabilities are cast to the values' dtype before they meet them,
as in the original; what the parts of a group add up to is divided and rounded once, at the end.
`...` stands for any batch axes.

Long sequences go through in blocks of queries (`chunk`), each against the keys that it may read and
no others, so that [S, S] scores never exist. The backward pass keeps the outputs and of each query
its softmax's maximum and sum, and makes a block's probabilities again from those (FlashAttention,
arXiv 2205.14135): autodiff would keep or rebuild every intermediate value of the softmax, which
took several times as long on a CPU.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial, reduce
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.ad_checkpoint import checkpoint_name
from jax.typing import ArrayLike

from models.layers import ATTENTION

# A finite "minus infinity": a row whose keys are all masked (a padded query) yields the mean of
# the values, which nothing reads, instead of NaN, which the backward pass would spread.
_MASKED = -1e30


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
    keys = _Keys(_heads_first(k), _heads_first(v), _for_heads(mask))
    out = _attend(_query_heads(q[..., None, :, :, :], k.shape[-2]), (keys,), (False,), 0)
    return _token_heads(out)[..., 0, :, :, :]


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

    One softmax spans both parts. (Merging two finished attentions by their log-sum-exp is the same
    forward, but JAX's fused attention drops the gradient of that residual.)

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
    own = _Keys(_group_heads_first(k), _group_heads_first(v), jnp.asarray(mask))
    return _attend_group(q, (_prompt_keys(k_prompt, v_prompt, valid), own), (False, False), 0)


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
    return _attend_group(q[:, None], (_prompt_keys(k, v, valid),), (True,), chunk)[:, 0]


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
    own = _Keys(_group_heads_first(k), _group_heads_first(v), jnp.ones((1, 1), bool))
    keys = _prompt_keys(k_prompt, v_prompt, valid), own
    return _attend_group(q, keys, (False, True), chunk and max(chunk // q.shape[1], 1))


# ---- heads before tokens: what products of matrices want ----


def _query_heads(q: Array, kv_heads: int) -> Array:
    """[..., G, T, N, H] -> [..., K, G, R, T, H]: query heads that share a key head together."""
    *batch, g, t, n, h = q.shape
    split = q.reshape(*batch, g, t, kv_heads, n // kv_heads, h)
    return jnp.einsum("...gtkrh->...kgrth", split)


def _token_heads(out: Array) -> Array:
    """[..., K, G, R, T, H] -> [..., G, T, N, H]."""
    *batch, k, g, r, t, h = out.shape
    return jnp.einsum("...kgrth->...gtkrh", out).reshape(*batch, g, t, k * r, h)


def _heads_first(k: Array) -> Array:
    """[..., S, K, H] -> [..., K, S, H]."""
    return jnp.einsum("...skh->...ksh", k)


def _group_heads_first(k: Array) -> Array:
    """[P, G, C, K, H] -> [P, K, G, C, H]."""
    return jnp.einsum("...gskh->...kgsh", k)


def _for_heads(mask: ArrayLike) -> Array:
    """bool[..., T, S] -> bool[..., 1, 1, 1, T, S]."""
    return jnp.asarray(mask)[..., None, None, None, :, :]


def _prompt_keys(k: Array, v: Array, valid: ArrayLike) -> _Keys:
    """Of a prompt's [P, S, K, H] under bool[P, S]."""
    mask = _for_heads(jnp.asarray(valid)[:, None, :])
    return _Keys(_heads_first(k), _heads_first(v), mask)


def _attend_group(q: Array, keys: tuple[_Keys, ...], causal: tuple[bool, ...], chunk: int) -> Array:
    """`_attend` for queries [P, G, T, N, H]."""
    return _token_heads(_attend(_query_heads(q, keys[0].k.shape[1]), keys, causal, chunk))


# ---- one softmax over one or more sets of keys, in blocks of queries ----


class _Keys(NamedTuple):
    """Keys and values, of a whole group [..., K, S, H] or of each completion [..., K, G, S, H]."""

    k: Array
    v: Array
    mask: Array  # bool, broadcastable to [..., K, G, R, T, S]; None in gradients


# Queries, keys, outputs, and each query's highest score and sum of exponentials [..., K, G, R, T].
_Residual = tuple[Array, tuple[_Keys, ...], Array, Array, Array]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _attend(q: Array, keys: tuple[_Keys, ...], causal: tuple[bool, ...], chunk: int) -> Array:
    """Attention of every query over all sets of keys, in one softmax.

    Args:
      q: [..., K, G, R, T, H].
      keys: the sets.
      causal: of each set, whether query t reads no key behind its own, t, whatever the mask says.
      chunk: queries t in a block; 0: all.

    Returns:
      [..., K, G, R, T, H].
    """
    return _forward(q, keys, causal, chunk)[0]


def _forward(
    q: Array, keys: tuple[_Keys, ...], causal: tuple[bool, ...], chunk: int
) -> tuple[Array, _Residual]:
    outs, highests, totals = [], [], []
    for rows in _blocks(q.shape[-2], chunk):
        block = [_read_by(rows, *each) for each in zip(keys, causal, strict=True)]
        scores = [jnp.where(part.mask, _scores(q[..., rows, :], part), _MASKED) for part in block]
        highest = reduce(jnp.maximum, [score.max(-1) for score in scores])
        parts = [jnp.exp(score - highest[..., None]) for score in scores]
        total = reduce(jnp.add, [part.sum(-1) for part in parts])
        out = reduce(jnp.add, [_values(p, x.v) for p, x in zip(parts, block, strict=True)])
        outs.append((out / total[..., None]).astype(q.dtype))
        highests.append(highest)
        totals.append(total)
    results = jnp.concatenate(outs, -2), jnp.concatenate(highests, -1), jnp.concatenate(totals, -1)
    out, highest, total = checkpoint_name(results, ATTENTION)
    return out, (q, keys, out, highest, total)


def _backward(
    causal: tuple[bool, ...],
    chunk: int,
    residual: _Residual,
    gradient: Array,
) -> tuple[Array, tuple[_Keys, ...]]:
    """Gradients of q and of every set's k and v, summed over the queries in float32."""
    # The barrier keeps XLA from finding the forward's scores in the same program and holding all.
    q, keys, out, highest, total = jax.lax.optimization_barrier(residual)
    scale = 1 / math.sqrt(q.shape[-1])
    common = jnp.sum(out.astype(jnp.float32) * gradient, -1)  # what the softmax's sum takes back
    q_gradients = []
    # With tokens last, or the scores would be transposed for the products.
    k_gradients = [jnp.zeros(part.k.mT.shape, jnp.float32) for part in keys]
    v_gradients = [jnp.zeros(part.v.mT.shape, jnp.float32) for part in keys]
    for rows in _blocks(q.shape[-2], chunk):
        q_block, g_block = q[..., rows, :], gradient[..., rows, :]
        of_q = []
        for i, part in enumerate(keys):
            read = _read_by(rows, part, causal[i])
            p = jnp.exp(_scores(q_block, read) - highest[..., rows, None])
            p = jnp.where(read.mask, p / total[..., rows, None], 0)
            axes = _axes(q, read.k)
            of_p = _einsum32(f"...kgrth,{axes}->...kgrts", g_block, read.v)
            of_score = (p * (of_p - common[..., rows, None]) * scale).astype(q.dtype)
            of_q.append(_einsum32(f"...kgrts,{axes}->...kgrth", of_score, read.k))
            turned = axes.replace("sh", "hs")
            of_k = _einsum32(f"...kgrth,...kgrts->{turned}", q_block, of_score)
            of_v = _einsum32(f"...kgrth,...kgrts->{turned}", g_block, p.astype(q.dtype))
            seen = (..., slice(0, of_k.shape[-1]))
            k_gradients[i] = k_gradients[i].at[seen].add(of_k)
            v_gradients[i] = v_gradients[i].at[seen].add(of_v)
        q_gradients.append(reduce(jnp.add, of_q).astype(q.dtype))
    of_keys = [
        _Keys(of_k.mT.astype(part.k.dtype), of_v.mT.astype(part.v.dtype), None)  # type: ignore[arg-type]
        for part, of_k, of_v in zip(keys, k_gradients, v_gradients, strict=True)
    ]
    return jnp.concatenate(q_gradients, -2), tuple(of_keys)


_attend.defvjp(_forward, _backward)


def _blocks(length: int, size: int) -> Iterator[slice]:
    """Example: 5 queries by 2 are [0:2], [2:4] and [4:5]; by 0 they are [0:5]."""
    size = size or length
    for start in range(0, length, size):
        yield slice(start, min(start + size, length))


def _read_by(rows: slice, keys: _Keys, causal: bool) -> _Keys:
    """What queries `rows` may read: causally, rows [1:3] the keys [0:3] as [[1 1 0] [1 1 1]]."""
    mask = keys.mask if keys.mask.shape[-2] == 1 else keys.mask[..., rows, :]
    if not causal:
        return keys._replace(mask=mask)
    seen = slice(0, rows.stop)
    triangle = np.arange(rows.stop) <= np.arange(rows.start, rows.stop)[:, None]
    mask = (mask if mask.shape[-1] == 1 else mask[..., seen]) & triangle
    return _Keys(keys.k[..., seen, :], keys.v[..., seen, :], mask)


def _axes(q: Array, k: Array) -> str:
    """The letters of a set's keys, next to those of queries or scores [..., K, G, R, T, _]."""
    return "...kgsh" if k.ndim == q.ndim - 1 else "...ksh"


def _scores(q: Array, keys: _Keys) -> Array:
    """float32[..., K, G, R, T, S]."""
    products = _einsum32(f"...kgrth,{_axes(q, keys.k)}->...kgrts", q, keys.k)
    return products / math.sqrt(q.shape[-1])


def _values(p: Array, v: Array) -> Array:
    """float32[..., K, G, R, T, H], what probabilities [..., K, G, R, T, S] make of values."""
    return _einsum32(f"...kgrts,{_axes(p, v)}->...kgrth", p.astype(v.dtype), v)


def _einsum32(subscripts: str, a: Array, b: Array) -> Array:
    """A product of two arrays, summed and left in float32 whatever their dtype."""
    return jnp.einsum(subscripts, a, b, preferred_element_type=jnp.float32)
