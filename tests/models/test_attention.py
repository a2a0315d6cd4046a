"""Attention against torch's scaled_dot_product_attention, in value and in gradient.

Legend: P prompts, G completions, S prompt tokens, T query tokens, C completion tokens, N query
        heads, K key/value heads, H head dimension.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from models.attention import attend, attend_causal, attend_completions, attend_shared_prompt


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


def sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: Any) -> torch.Tensor:
    """torch's attention on [..., T, N, H] queries and [..., S, K, H] keys; bool[..., T, S]."""
    q, k, v = (x.transpose(-3, -2) for x in (q, k, v))
    mask = torch.as_tensor(np.asarray(mask))[..., None, :, :]
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
    return out.transpose(-3, -2)


def assert_same(
    ours: Callable[..., Any], original: Callable[..., Any], arrays: list[np.ndarray]
) -> None:
    """Equal values, and equal gradients of every argument for a random cotangent."""
    out, pullback = jax.vjp(ours, *map(jnp.asarray, arrays))
    tensors = [torch.tensor(a, requires_grad=True) for a in arrays]
    expected = original(*tensors)
    np.testing.assert_allclose(out, expected.detach().numpy(), atol=2e-6)
    cotangent = normal(99, *out.shape)
    expected.backward(torch.tensor(cotangent))
    for number, (got, tensor) in enumerate(zip(pullback(cotangent), tensors, strict=True)):
        assert tensor.grad is not None
        np.testing.assert_allclose(
            got, tensor.grad.numpy(), atol=1e-5, err_msg=f"gradient of argument {number}"
        )


# ---- one sequence ----


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (6, 1)])
def test_attend_is_torchs_attention_with_grouped_heads(heads: int, kv_heads: int) -> None:
    q, k, v = normal(0, 2, 5, heads, 8), normal(1, 2, 7, kv_heads, 8), normal(2, 2, 7, kv_heads, 8)
    mask = np.random.default_rng(3).random((2, 5, 7)) < 0.6
    mask[..., 0] = True  # torch returns NaN where no key may be read
    assert_same(lambda *x: attend(*x, mask), lambda *x: sdpa(*x, mask), [q, k, v])


def test_a_causal_mask_is_shared_by_the_batch() -> None:
    arrays = [normal(i, 3, 6, 2, 4) for i in range(3)]
    mask = np.tril(np.ones((6, 6), bool))
    assert_same(lambda *x: attend(*x, mask), lambda *x: sdpa(*x, mask), arrays)


def test_there_may_be_many_batch_axes_or_none() -> None:
    arrays = [normal(i, 2, 3, 5, 2, 4) for i in range(3)]
    mask = np.random.default_rng(3).random((2, 3, 1, 5)) < 0.5
    mask[..., 2] = True
    whole = attend(*arrays, mask)
    one = attend(*(a[1, 2] for a in arrays), mask[1, 2])
    np.testing.assert_allclose(whole[1, 2], one, atol=1e-6)


def test_the_padded_prompts_of_the_docstring() -> None:
    """Lengths 2 and 3 of 3: each prompt's tokens attend as they would alone."""
    q, k, v = (normal(i, 2, 3, 2, 4) for i in range(3))
    valid = np.array([[1, 1, 0], [1, 1, 1]], bool)
    mask = np.tril(np.ones((3, 3), bool)) & valid[:, None, :]
    np.testing.assert_array_equal(mask[0], [[1, 0, 0], [1, 1, 0], [1, 1, 0]])
    np.testing.assert_array_equal(mask[1], [[1, 0, 0], [1, 1, 0], [1, 1, 1]])
    out = attend(q, k, v, mask)
    for prompt, length in enumerate([2, 3]):
        alone = attend(
            *(x[prompt, :length] for x in (q, k, v)), np.tril(np.ones((length, length), bool))
        )
        np.testing.assert_allclose(out[prompt, :length], alone, atol=1e-6)


def test_a_query_without_keys_reads_their_mean_and_spreads_no_nan() -> None:
    q, k, v = (normal(i, 4, 2, 4) for i in range(3))
    mask = np.array([[1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0], [0, 0, 0, 0]], bool)
    out, pullback = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
    np.testing.assert_allclose(out[1], v.mean(0), atol=1e-6)
    for gradient in pullback(jnp.ones_like(out)):
        assert np.isfinite(gradient).all()


def test_what_is_masked_gets_no_gradient() -> None:
    q, k, v = (normal(i, 4, 2, 4) for i in range(3))
    mask = np.array([1, 1, 0, 1], bool)[None]
    _, pullback = jax.vjp(lambda *x: attend(*x, mask), q, k, v)
    _, k_gradient, v_gradient = pullback(normal(5, 4, 2, 4))
    for gradient in (k_gradient, v_gradient):
        np.testing.assert_array_equal(gradient[2], 0.0)
        assert np.abs(gradient[np.array([0, 1, 3])]).min() > 0


def test_huge_scores_do_not_overflow() -> None:
    q, k, v = (normal(i, 4, 2, 4) for i in range(3))
    mask = np.ones((4, 4), bool)
    out, pullback = jax.vjp(lambda *x: attend(*x, mask), q * 1e4, k * 1e4, v)
    picked = (q[:, None] * k[None]).sum(-1).argmax(1)  # [T, N]: the softmax is a maximum
    np.testing.assert_allclose(out, v[picked, np.arange(2)[None]], atol=1e-6)
    assert all(np.isfinite(gradient).all() for gradient in pullback(jnp.ones_like(out)))


def test_bfloat16_keeps_its_type_and_softmaxes_in_float32() -> None:
    q, k, v = (jnp.asarray(normal(i, 64, 2, 16), jnp.bfloat16) for i in range(3))
    mask = np.ones((64, 64), bool)
    out = attend(q, k, v, mask)
    assert out.dtype == jnp.bfloat16
    exact = attend(*(x.astype(jnp.float32) for x in (q, k, v)), mask)
    np.testing.assert_allclose(out.astype(jnp.float32), exact, atol=4e-3)


# ---- a group that shares its prompt ----

P, G, S, C, N, K, H = 2, 3, 5, 4, 4, 2, 8


def group(queries: int = C) -> list[np.ndarray]:
    """q, k, v, k_prompt, v_prompt."""
    shapes = [(P, G, queries, N, H), (P, G, C, K, H), (P, G, C, K, H), (P, S, K, H), (P, S, K, H)]
    return [normal(seed, *shape) for seed, shape in enumerate(shapes)]


def repeated(valid: np.ndarray, mask: np.ndarray) -> Callable[..., torch.Tensor]:
    """The prompt's keys repeated in front of every completion's, and torch's attention."""
    both = np.concatenate(
        [
            np.broadcast_to(valid[:, None, None, :], (P, G, len(mask), S)),
            np.broadcast_to(mask, (P, G, len(mask), C)),
        ],
        axis=-1,
    )

    def attention(q: Any, k: Any, v: Any, k_prompt: Any, v_prompt: Any) -> torch.Tensor:
        k_prompt, v_prompt = (x[:, None].expand(P, G, S, K, H) for x in (k_prompt, v_prompt))
        return sdpa(q, torch.cat([k_prompt, k], 2), torch.cat([v_prompt, v], 2), both)

    return attention


@pytest.mark.parametrize(
    "mask",
    [np.tril(np.ones((C, C), bool)), np.array([[1, 1, 0, 0]], bool)],
    ids=["update", "decoding token 1"],
)
def test_a_shared_prompt_equals_a_repeated_one(mask: np.ndarray) -> None:
    valid = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    assert_same(
        lambda *x: attend_shared_prompt(*x, valid, mask),
        repeated(valid, mask),
        group(queries=len(mask)),
    )


@pytest.mark.parametrize("scale", [30.0, 1000.0])
def test_either_part_may_hold_all_the_weight(scale: float) -> None:
    """The parts share their maximum, so a part far below the other vanishes and none overflows."""
    valid, mask = np.ones((P, S), bool), np.tril(np.ones((C, C), bool))
    for part in (1, 3):  # the completions' own keys, the prompt's keys
        arrays = group()
        arrays[part] *= scale
        out, pullback = jax.vjp(lambda *x: attend_shared_prompt(*x, valid, mask), *arrays)
        expected = repeated(valid, mask)(*map(torch.tensor, arrays))
        np.testing.assert_allclose(out, expected.numpy(), atol=1e-4)
        assert all(np.isfinite(g).all() for g in pullback(jnp.ones_like(out)))


def test_without_a_prompt_only_the_completion_is_read() -> None:
    arrays = group()
    mask = np.tril(np.ones((C, C), bool))
    out = attend_shared_prompt(*arrays, np.zeros((P, S), bool), mask)
    np.testing.assert_allclose(out, attend(*arrays[:3], mask), atol=1e-6)


def test_a_row_without_any_key_is_finite_in_value_and_gradient() -> None:
    valid, mask = np.zeros((P, S), bool), np.zeros((C, C), bool)
    out, pullback = jax.vjp(lambda *x: attend_shared_prompt(*x, valid, mask), *group())
    for array in (out, *pullback(jnp.ones_like(out))):
        assert np.isfinite(array).all()


def test_the_padding_of_a_prompt_gets_no_gradient() -> None:
    valid = np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]], bool)
    mask = np.tril(np.ones((C, C), bool))
    _, pullback = jax.vjp(lambda *x: attend_shared_prompt(*x, valid, mask), *group())
    *_, k_prompt, v_prompt = pullback(normal(7, P, G, C, N, H))
    for gradient in (k_prompt, v_prompt):
        np.testing.assert_array_equal(gradient[0, 3:], 0.0)
        assert np.abs(gradient[0, :3]).min() > 0


def test_bfloat16_groups_are_as_exact_as_repeated_prompts() -> None:
    """Against float32, on long prompts: rounding twice, or before the division, would double it."""
    p, g, s, c, h = 2, 3, 160, 32, 64
    shapes = [(p, g, c, 4, h), (p, g, c, 2, h), (p, g, c, 2, h), (p, s, 2, h), (p, s, 2, h)]
    half = [jnp.asarray(normal(i, *shape), jnp.bfloat16) for i, shape in enumerate(shapes)]
    valid, mask = np.ones((p, s), bool), np.tril(np.ones((c, c), bool))

    def repeat(q: Any, k: Any, v: Any, k_prompt: Any, v_prompt: Any) -> Any:
        k_prompt, v_prompt = (
            jnp.broadcast_to(x[:, None], (p, g, *x.shape[1:])) for x in (k_prompt, v_prompt)
        )
        both = np.concatenate([np.ones((c, s), bool), mask], axis=-1)
        k, v = jnp.concatenate([k_prompt, k], 2), jnp.concatenate([v_prompt, v], 2)
        return attend(q, k, v, both)

    exact = np.asarray(repeat(*(a.astype(jnp.float32) for a in half)))

    def error(out: Any) -> float:
        return float(np.linalg.norm(np.asarray(out, np.float32) - exact) / np.linalg.norm(exact))

    out = attend_shared_prompt(*half, valid, mask)
    assert out.dtype == jnp.bfloat16
    assert error(out) < 1.2 * error(repeat(*half))


# ---- whole sequences, in blocks of queries ----

CHUNKS = [0, 1, 2, 3, 7, 100]  # 0: all at once; 2 and 3 leave a shorter last block


@pytest.mark.parametrize("chunk", CHUNKS)
def test_blocks_of_a_prompt_are_torchs_causal_attention(chunk: int) -> None:
    length = 7
    q, k, v = normal(0, 2, length, 4, 8), normal(1, 2, length, 2, 8), normal(2, 2, length, 2, 8)
    valid = np.arange(length) < np.array([[5], [length]])
    mask = np.tril(np.ones((length, length), bool)) & valid[:, None, :]
    assert_same(
        lambda *x: attend_causal(*x, jnp.asarray(valid), chunk),
        lambda *x: sdpa(*x, mask),
        [q, k, v],
    )


@pytest.mark.parametrize("chunk", CHUNKS)
def test_blocks_of_completions_equal_repeated_prompts(chunk: int) -> None:
    valid = np.arange(S) < np.array([[S - 2], [S]])
    causal = np.tril(np.ones((C, C), bool))
    assert_same(
        lambda *x: attend_completions(*x, jnp.asarray(valid), chunk),
        repeated(valid, causal),
        group(),
    )


def test_blocks_never_hold_the_whole_score_matrix() -> None:
    def program(chunk: int) -> str:
        """All arrays, with their shapes, that attention over 64 tokens and its gradient make."""

        def loss(q: Any, k: Any, v: Any) -> Any:
            return attend_causal(q, k, v, jnp.ones((1, 64), bool), chunk).sum()

        arrays = [jnp.zeros((1, 64, 2, 4)) for _ in range(3)]
        return str(jax.make_jaxpr(jax.grad(loss, argnums=(0, 1, 2)))(*arrays))

    assert "64,64]" in program(0)
    assert "64,64]" not in program(8)
