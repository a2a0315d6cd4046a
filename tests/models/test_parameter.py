"""Weights are declared once and multiplied as plain matrix products."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.parameter import logical_axes, parameter, parameter_count, project


class Layer(nnx.Module):
    def __init__(self, rngs: nnx.Rngs):
        self.weight = parameter(rngs, (3, 4, 5), ("layers", "embed", "mlp"), 4)
        self.bias = parameter(rngs, (5,), ("mlp",), init="zeros")


def test_initial_values_keep_the_scale_of_what_they_multiply() -> None:
    """Deviation 1 / sqrt(inputs): a product with 400 inputs of deviation 1 has deviation 1."""
    rngs = nnx.Rngs(0)
    weight = parameter(rngs, (400, 300), ("embed", "mlp"), 400)
    assert weight[...].dtype == jnp.float32
    assert float(weight[...].std()) == pytest.approx(0.05, rel=0.02)
    inputs = np.random.default_rng(0).standard_normal((50, 400))
    assert float(project(jnp.asarray(inputs), weight).std()) == pytest.approx(1.0, rel=0.05)


def test_norms_begin_as_one_and_biases_as_zero() -> None:
    rngs = nnx.Rngs(0)
    np.testing.assert_array_equal(parameter(rngs, (4,), ("norm",), init="ones")[...], np.ones(4))
    np.testing.assert_array_equal(parameter(rngs, (4,), ("mlp",), init="zeros")[...], np.zeros(4))


def test_every_axis_has_a_name() -> None:
    with pytest.raises(AssertionError, match=r"1 axis names \('embed',\) for shape \(2, 3\)"):
        parameter(nnx.Rngs(0), (2, 3), ("embed",), 2)


def test_the_axes_have_the_nesting_of_the_weights() -> None:
    layer = Layer(nnx.Rngs(0))
    assert logical_axes(layer) == {"weight": ("layers", "embed", "mlp"), "bias": ("mlp",)}
    assert nnx.to_pure_dict(nnx.state(layer)).keys() == logical_axes(layer).keys()


def test_axes_are_known_without_allocating() -> None:
    abstract = nnx.eval_shape(lambda: Layer(nnx.Rngs(0)))
    assert logical_axes(abstract)["weight"] == ("layers", "embed", "mlp")


def test_scalars_are_counted_in_arrays_and_in_shapes() -> None:
    layer = Layer(nnx.Rngs(0))
    abstract = nnx.eval_shape(lambda: Layer(nnx.Rngs(0)))
    assert parameter_count(nnx.to_pure_dict(nnx.state(layer))) == 3 * 4 * 5 + 5
    assert parameter_count(nnx.to_pure_dict(nnx.state(abstract))) == 3 * 4 * 5 + 5


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
