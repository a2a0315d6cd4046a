"""What the layers of the vision tower and of the decoder have in common."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jax import Array
from jax.sharding import PartitionSpec

from models.low_rank import Adapter

# What of a layer is kept for the backward pass, the rest being computed again: everything; what
# products of matrices and attention give; nothing but its input.
Remat = Literal["none", "products", "layer"]

# The name of attention's results, for `jax.checkpoint`'s policies.
ATTENTION = "attention"

P = ParamSpec("P")
R = TypeVar("R")

PROMPT_AXES = ("data", "fsdp")  # the mesh axes that every batch of prompts is split over
HEAD_AXIS = "tensor"  # the one that attention heads are split over


def split_by_prompt(x: Array) -> Array:
    """Keeps an activation [P, ...] whole but for its prompts, on the mesh that is in force.

    Weights are split over one of the same mesh axes: without this XLA may follow their layout and
    gather the activations of all prompts instead of a layer's weights. No mesh, no effect.
    """
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, PartitionSpec(PROMPT_AXES))


def rematerialised(body: Callable[P, R], remat: Remat) -> Callable[P, R]:
    """The body of a scan over layers, with what its backward pass keeps."""
    if remat == "none":
        return body
    policies = jax.checkpoint_policies
    kept = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable, policies.save_only_these_names(ATTENTION)
    )
    # A scan's body cannot be merged with that of another scan, which is what `prevent_cse` is for.
    return jax.checkpoint(body, policy=None if remat == "layer" else kept, prevent_cse=False)


def project(x: Array, weight: nnx.Param, axes: int = 1, adapter: Adapter | None = None) -> Array:
    """[..., *inputs] times a weight [*inputs, *outputs] -> [..., *outputs].

    All tokens become the rows of one plain matrix product: left as batch axes, XLA transposes them
    for the weight's gradient, which on CPUs costs as much again as the product.

    Args:
      axes: how many axes `inputs` stands for.
      adapter: A [*inputs, R] and B [R, *outputs], for x W + s (x A) B.
    """
    inputs, outputs = weight.shape[:axes], weight.shape[axes:]
    rows = x.reshape(-1, math.prod(inputs))
    product = rows @ weight[...].reshape(math.prod(inputs), math.prod(outputs))
    if adapter is not None:
        a, b = adapter.a[...], adapter.b[...]
        rank = a.shape[-1]
        narrow = rows @ a.reshape(-1, rank) * adapter.scale
        product = product + narrow @ b.reshape(rank, -1)
    return product.reshape(*x.shape[: x.ndim - axes], *outputs)


def rms_norm(x: Array, weight: Array, eps: float) -> Array:
    """Root-mean-square norm in float32, cast down before the weight, as the original does."""
    wide = x.astype(jnp.float32)
    wide = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    return weight * wide.astype(x.dtype)


def rotate_half(x: Array) -> Array:
    """(a, b) -> (-b, a) on the two halves of the last axis."""
    a, b = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([-b, a], axis=-1)
