"""Low-rank adapters (LoRA, arXiv 2106.09685) beside the stacked weights of a scan over layers.

A weight W [L, *inputs, *outputs] gets A [L, *inputs, R] and B [L, R, *outputs], laid out by W's own
logical axes. A layer computes x W + s (x A) B, so that no gradient of W's shape exists; for
sampling and export W + s A B is made once.

Legend: L layers, R rank, s = alpha / R.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array

from models.parameter import parameter


class Lora(NamedTuple):
    """Which weights have adapters, and of what rank; rank 0: none has."""

    rank: int = 0
    alpha: float = 1.0
    targets: tuple[str, ...] = ()  # "text.attention", "text.mlp", "vision.attention", "vision.mlp"

    @property
    def scale(self) -> float:
        return self.alpha / self.rank


NO_LORA = Lora()


class Adapter(nnx.Module):
    """A and B of one weight, stacked along a leading axis L; of one layer without it."""

    def __init__(self, rngs: nnx.Rngs, weight: nnx.Param, inputs: int, lora: Lora):
        shape, axes = weight.shape, weight.get_metadata()["axes"]
        end = 1 + inputs
        self.scale = lora.scale
        fan_in = math.prod(shape[1:end])
        self.a = parameter(rngs, (*shape[:end], lora.rank), (*axes[:end], "rank"), fan_in)
        b_shape, b_axes = (shape[0], lora.rank, *shape[end:]), (axes[0], "rank", *axes[end:])
        self.b = parameter(rngs, b_shape, b_axes, "zeros")  # so that training begins at W


def adapters(
    rngs: nnx.Rngs, lora: Lora, weights: Mapping[str, Mapping[str, tuple[nnx.Param, int]]]
) -> nnx.Dict:
    """The adapters of the stacked weights that are targets, by the weights' names.

    Args:
      weights: by target and name: a weight and how many of its axes, after L, are inputs.
    """
    made = {
        name: Adapter(rngs, weight, inputs, lora)
        for target, named in weights.items()
        if lora.rank and target in lora.targets
        for name, (weight, inputs) in named.items()
    }
    return nnx.Dict(made)


def add_low_rank(
    weights: Mapping[str, Any], pairs: Mapping[str, Any], scale: float, dtype: Any
) -> dict[str, Any]:
    """W + s A B of the stacked weights that have a pair, made in float32 and then cast.

    A layer at a time, so that one layer's float32 product exists at once.

    Args:
      weights: name -> [L, *inputs, *outputs].
      pairs: name -> {"a": [L, *inputs, R], "b": [L, R, *outputs]}, float32.
      dtype: of what is returned.

    Returns:
      `weights`, with those of `pairs` replaced and the others as they are.
    """

    def one_layer(layer: tuple[Array, Array, Array]) -> Array:
        weight, a, b = layer
        product = jnp.tensordot(a, b, axes=1, precision=jax.lax.Precision.HIGHEST)
        return (weight.astype(jnp.float32) + scale * product).astype(dtype)

    added = {
        name: jax.lax.map(one_layer, (weights[name], pair["a"], pair["b"]))
        for name, pair in pairs.items()
    }
    return {**weights, **added}
