"""How a weight is declared, once, with its shape, logical axes and initialiser; and multiplied.

The logical axes travel with the parameter as metadata; `jaxgrpo/sharding.py` turns them into mesh
axes, so no sharding is written down twice.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array


def parameter(
    rngs: nnx.Rngs,
    shape: tuple[int, ...],
    axes: tuple[str, ...],
    init: Literal["ones", "zeros"] | int,
) -> nnx.Param:
    """Declares one float32 weight.

    Args:
      rngs: the `params` stream makes random initial values.
      shape: its shape; stacked layers carry the layer axis in front.
      axes: a logical name per axis, for example ("layers", "embed", "heads", "head_dim").
      init: "ones", "zeros", or the number of inputs n that the weight sums over: normal values of
        deviation 1 / sqrt(n), which is the release's 0.02 at a width of 2,500 and lets narrow
        models learn as fast.
    """
    assert len(shape) == len(axes), f"{len(axes)} axis names {axes} for shape {shape}"
    if init == "ones":
        value = jnp.ones(shape, jnp.float32)
    elif init == "zeros":
        value = jnp.zeros(shape, jnp.float32)
    else:
        value = jax.random.normal(rngs.params(), shape, jnp.float32) / math.sqrt(init)
    return nnx.Param(value, axes=axes)


def project(x: Array, weight: nnx.Param, axes: int = 1) -> Array:
    """[..., *inputs] times a weight [*inputs, *outputs] -> [..., *outputs].

    All tokens become the rows of one plain matrix product: left as batch axes, XLA transposes them
    for the weight's gradient, which on CPUs costs as much again as the product.

    Args:
      axes: how many axes `inputs` stands for.
    """
    inputs, outputs = weight.shape[:axes], weight.shape[axes:]
    rows = x.reshape(-1, math.prod(inputs))
    product = rows @ weight[...].reshape(math.prod(inputs), math.prod(outputs))
    return product.reshape(*x.shape[: x.ndim - axes], *outputs)


def logical_axes(model: nnx.Module) -> dict[str, Any]:
    """The logical axes of every weight, in the nesting of `nnx.to_pure_dict(nnx.state(model))`."""
    state = nnx.state(model, nnx.Param)
    return nnx.to_pure_dict(
        jax.tree.map(
            lambda param: param.replace(param.get_metadata()["axes"]),
            state,
            is_leaf=lambda node: isinstance(node, nnx.Variable),
        )
    )


def parameter_count(params: Any) -> int:
    """The number of scalars in a tree of arrays or shapes."""
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
