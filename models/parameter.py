"""How a weight is declared, once, with its shape, logical axes and initialiser.

The logical axes travel with the parameter as metadata; `jaxgrpo/sharding.py` turns them into mesh
axes, so no sharding is written down twice.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
from flax import nnx


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
