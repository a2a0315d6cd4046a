"""Attention on GPUs: cuDNN's flash kernel, through `jax.nn.dot_product_attention`.

Legend: B sequences, T tokens of a sequence, N query heads, K key/value heads, H head dimension,
        G completions per prompt, S prompt tokens, C completion tokens.

This is what one device computes; `attention_backend` splits prompts and heads over a mesh. Only
bfloat16 and float16. Where cuDNN's own masks (causal, lengths of keys) do not say who reads whom, a
mask is made: one of [C, C + S] for all prompts, completions and heads, or one for a row of frames.
cuDNN computes its gradient too, which nobody reads.

`emulated` computes the same calls with XLA, on any device.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import Array


def attend_causal(q: Array, k: Array, v: Array, *, emulated: bool = False) -> Array:
    """Prompts over themselves; padding, on the right, is read by padding only.

    Args:
      q: [B, T, N, H] queries.
      k, v: [B, T, K, H].

    Returns:
      [B, T, N, H].
    """
    length = q.shape[1]
    q, k, v = (_even(x) for x in (q, k, v))
    return _attention(emulated)(q, k, v, is_causal=True)[:, :length]


def attend_packed(
    q: Array, k: Array, v: Array, valid: Array, *, completion: int, emulated: bool = False
) -> Array:
    """Groups: prompts over themselves, completions over their prompt and, causally, themselves.

    The keys of a completion are [own | prompt | padding]: a length ends the prompt, so that the
    mask is the same for all prompts and completions.

    Args:
      q: [B, T, N, H] with T = S + G C; k, v: [B, T, K, H].
      valid: bool[B, S], True where the prompt has a token.
      completion: C.

    Returns:
      [B, T, N, H].
    """
    prompt = valid.shape[1]
    group = (q.shape[1] - prompt) // completion
    of_prompt = attend_causal(*(x[:, :prompt] for x in (q, k, v)), emulated=emulated)
    queries = _even(_by_completion(q[:, prompt:], group))
    keys, values = (
        _even(jnp.concatenate([_even(own), _repeat(shared, group)], axis=1))
        for own, shared in ((_by_completion(x[:, prompt:], group), x[:, :prompt]) for x in (k, v))
    )
    own = completion + completion % 2
    query, key = jnp.arange(own)[:, None], jnp.arange(keys.shape[1])
    out = _attention(emulated)(
        queries,
        keys,
        values,
        mask=((key <= query) | (key >= own))[None, None],
        key_value_seq_lengths=jnp.repeat(own + valid.sum(axis=1, dtype=jnp.int32), group),
    )
    out = out[:, :completion].reshape(len(q), group * completion, *q.shape[2:])
    return jnp.concatenate([of_prompt, out], axis=1)


def attend_segments(
    q: Array, k: Array, v: Array, segment: Array, *, emulated: bool = False
) -> Array:
    """Each token over the tokens with its number.

    One sequence at a time: the gradient of a mask that differs within a batch is not supported.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H].
      segment: int32[B, T]; 0 is padding.

    Returns:
      [B, T, N, H].
    """
    length = q.shape[1]
    q, k, v, segment = (_even(x) for x in (q, k, v, segment))

    def one(sequence: tuple[Array, Array, Array, Array]) -> Array:
        q, k, v, segment = sequence
        mask = segment[None, None, :, None] == segment[None, None, None, :]
        return _attention(emulated)(q[None], k[None], v[None], mask=mask)[0]

    return jax.lax.map(one, (q, k, v, segment))[:, :length]


def _attention(emulated: bool) -> Callable[..., Array]:
    implementation = "xla" if emulated else "cudnn"
    return partial(jax.nn.dot_product_attention, implementation=implementation)


def _by_completion(x: Array, group: int) -> Array:
    """[B, G C, ...] -> [B G, C, ...]."""
    return x.reshape(x.shape[0] * group, x.shape[1] // group, *x.shape[2:])


def _repeat(x: Array, group: int) -> Array:
    """[B, S, ...] -> [B G, S, ...]; the gradients of the copies are summed in float32."""
    wide = jnp.repeat(x.astype(jnp.float32), group, axis=0)
    return wide.astype(x.dtype)


def _even(x: Array) -> Array:
    """[B, T, ...] with a zero at the end where T is odd: cuDNN has no gradient for that."""
    return jnp.pad(x, [(0, 0), (0, x.shape[1] % 2)] + [(0, 0)] * (x.ndim - 2))
