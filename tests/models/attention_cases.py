"""Sequences that the tests of the attention back ends share, and what "equal" means for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from models.attention_backend import XLA, Backend, attend_groups, attend_prompts, frame_attention

TOLERANCE = 1e-5  # of values and gradients of order 1, in float32


class Heads(NamedTuple):
    """Query heads, key/value heads and their dimension."""

    queries: int
    keys: int
    dim: int


class Case(NamedTuple):
    """Inputs of one of the three uses."""

    attend: Callable[..., Array]  # (q, k, v, backend)
    arrays: tuple[Any, Any, Any]  # q, k, v
    real: np.ndarray  # what is read of the result: not padding's rows

    def run(self, backend: Backend) -> tuple[Array, Array, tuple[Array, ...]]:
        """The result, what is read of it, and the gradients of q, k and v for fixed cotangents."""
        cotangent = _normal(9, *self.arrays[0].shape)

        def loss(q: Array, k: Array, v: Array) -> tuple[Array, tuple[Array, Array]]:
            out = self.attend(q, k, v, backend)
            read = jnp.where(self.real[..., None, None], out, 0)
            return jnp.sum(read * cotangent), (out, read)

        gradients, (out, read) = jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True))(*self.arrays)
        return out, read, gradients


def prompts(heads: Heads, lengths: tuple[int, ...], tokens: int) -> Case:
    """Prompts of some lengths, padded to `tokens`."""
    valid = np.arange(tokens) < np.array(lengths)[:, None]

    def attend(q: Array, k: Array, v: Array, backend: Backend) -> Array:
        return attend_prompts(q, k, v, jnp.asarray(valid), backend)

    return Case(attend, _queries_keys_values(heads, len(lengths), tokens), valid)


def groups(
    heads: Heads, lengths: tuple[int, ...], tokens: int, group: int, completion: int
) -> Case:
    """The same with `group` completions of `completion` tokens each."""
    valid = np.arange(tokens) < np.array(lengths)[:, None]
    packed = tokens + group * completion

    def attend(q: Array, k: Array, v: Array, backend: Backend) -> Array:
        return attend_groups(q, k, v, jnp.asarray(valid), completion, backend)

    real = np.pad(valid, ((0, 0), (0, packed - tokens)), constant_values=True)
    return Case(attend, _queries_keys_values(heads, len(lengths), packed), real)


def frames(heads: Heads, rows: tuple[tuple[tuple[int, ...], ...], ...], slots: int) -> Case:
    """Prompts with rows of `slots` patches, each holding frames of some sizes, one behind another.

    Example: ((2, 1), (3,)) for 4 slots are two rows, numbered [1 1 2 0] and [3 3 3 0].
    """
    number = np.zeros((len(rows), len(rows[0]), slots), np.int32)
    for p, of_prompt in enumerate(rows):
        count = 0
        for r, sizes in enumerate(of_prompt):
            ends = np.cumsum(sizes)
            for start, end in zip([0, *ends], ends, strict=False):
                number[p, r, start:end] = count = count + 1

    def attend(q: Array, k: Array, v: Array, backend: Backend) -> Array:
        return frame_attention(jnp.asarray(number), backend)(q, k, v)

    return Case(attend, _queries_keys_values(heads, *number.shape), number > 0)


def assert_as_xla(case: Case, backend: Backend) -> None:
    """Equal where it is read, equal gradients, and finite where nothing is read."""
    _, expected, expected_gradients = case.run(XLA)
    out, read, gradients = case.run(backend)
    assert out.dtype == expected.dtype and bool(jnp.isfinite(out).all())
    np.testing.assert_allclose(read, expected, rtol=0, atol=TOLERANCE)
    for name, ours, theirs in zip("qkv", gradients, expected_gradients, strict=True):
        assert float(jnp.abs(theirs).max()) > 0.1
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=TOLERANCE, err_msg=f"of {name}")


def _queries_keys_values(heads: Heads, *batch: int) -> tuple[Any, Any, Any]:
    return (
        _normal(0, *batch, heads.queries, heads.dim),
        _normal(1, *batch, heads.keys, heads.dim),
        _normal(2, *batch, heads.keys, heads.dim),
    )


def _normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)
