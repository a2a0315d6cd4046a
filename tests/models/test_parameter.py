"""Weights are declared once."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from models.layers import project
from models.parameter import logical_axes, parameter


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
