"""Products, norms and rotations: the originals', and plain matrix products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as original

from models.layers import project, rms_norm, rotate_half


@pytest.mark.parametrize(
    ("x", "weight", "axes", "einsum"),
    [
        ((2, 3, 4), (4, 5), 1, "abi,io->abo"),
        ((4,), (4, 5), 1, "i,io->o"),
        ((2, 3, 4), (4, 5, 6), 1, "abi,iop->abop"),
        ((2, 4, 5), (4, 5, 6), 2, "aij,ijo->ao"),
        ((2, 0, 4), (4, 5), 1, "abi,io->abo"),
    ],
    ids=["matrix", "one row", "split outputs", "split inputs", "no rows"],
)
def test_project_is_the_einsum_in_value_and_gradient(
    x: tuple[int, ...], weight: tuple[int, ...], axes: int, einsum: str
) -> None:
    rng = np.random.default_rng(0)
    inputs, matrix = rng.standard_normal(x), rng.standard_normal(weight)
    cotangent = rng.standard_normal(np.einsum(einsum, inputs, matrix).shape)

    def of_project(inputs, matrix):
        return project(inputs, nnx.Param(matrix), axes)

    def of_einsum(inputs, matrix):
        return jnp.einsum(einsum, inputs, matrix)

    arrays = [jnp.asarray(a, jnp.float32) for a in (inputs, matrix)]
    ours, pullback = jax.vjp(of_project, *arrays)
    expected, expected_pullback = jax.vjp(of_einsum, *arrays)
    np.testing.assert_allclose(ours, expected, atol=1e-5)
    cotangent = jnp.asarray(cotangent, jnp.float32)
    for got, want in zip(pullback(cotangent), expected_pullback(cotangent), strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_norm_is_the_originals(dtype: str) -> None:
    """Also in bfloat16: cast down before the weight, not after."""
    rng = np.random.default_rng(0)
    x = torch.tensor(rng.standard_normal((50, 32)) * 3).to(getattr(torch, dtype))
    weight = torch.tensor(1 + rng.standard_normal(32)).to(getattr(torch, dtype))
    norm = original.Qwen2_5_VLRMSNorm(32, eps=1e-6).to(getattr(torch, dtype))
    norm.weight.data = weight
    expected = norm(x).detach().float().numpy()
    ours = rms_norm(
        jnp.asarray(x.float().numpy(), dtype), jnp.asarray(weight.float().numpy(), dtype), 1e-6
    )
    assert ours.dtype == dtype
    np.testing.assert_allclose(ours.astype(jnp.float32), expected, rtol=1e-6)


def test_rotate_half_is_the_originals() -> None:
    x = np.random.default_rng(0).standard_normal((3, 5, 8)).astype(np.float32)
    np.testing.assert_array_equal(rotate_half(x), original.rotate_half(torch.tensor(x)))
