"""Which code attends over whole sequences, on one device or on a mesh.

XLA's (`attention`) runs everywhere; TPUs have a kernel (`attention_splash`) and GPUs too
(`attention_cudnn`), in which scores never leave the chip. Their three uses are here: prompts,
groups of prompt and completions, frames of the vision tower. Two stay with XLA on every device:

  - the tower's windows, of 64 patches each, whose scores are as small as their activations;
  - decoding. A step of one token reads a layer's weights and the caches once, for all completions
    of a prompt: at 3B, G = 8, S = 8,192 and C = 256 those are 154 MB and 10.5 MB, and the scores
    that a kernel would keep on the chip are 4.3 MB.

Legend: P prompts, T tokens of a sequence, N query heads, K key/value heads, H head dimension,
        S prompt tokens, G completions per prompt, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import ModuleType
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array
from jax.sharding import PartitionSpec

from models import attention_cudnn, attention_splash
from models.attention import attend, attend_causal, attend_completions
from models.layers import HEAD_AXIS, PROMPT_AXES

Kernel = Literal["xla", "splash", "cudnn"]


class Backend(NamedTuple):
    """What attends over whole sequences."""

    kernel: Kernel = "xla"
    chunk: int = 0  # of XLA: queries of a prompt whose scores exist at once; 0: all
    emulated: bool = False  # the kernels' code on devices that cannot run them, for tests


XLA = Backend()


def attend_prompts(q: Array, k: Array, v: Array, valid: Array, backend: Backend) -> Array:
    """Prompts over themselves.

    Args:
      q: [P, S, N, H] queries.
      k, v: [P, S, K, H].
      valid: bool[P, S], True where the prompt has a token: up to its length.

    Returns:
      [P, S, N, H]; padding's rows are finite and nothing more.
    """
    if backend.kernel == "xla":
        return attend_causal(q, k, v, valid, backend.chunk)
    kernel = _module(backend).attend_causal
    return _on_devices(partial(kernel, emulated=backend.emulated), q, k, v)


def attend_groups(
    q: Array, k: Array, v: Array, valid: Array, completion: int, backend: Backend
) -> Array:
    """Prompts over themselves; completions over their prompt and, causally, themselves.

    Args:
      q: [P, S + G C, N, H] queries of [prompt | completion 1 | ... | completion G].
      k, v: [P, S + G C, K, H].
      valid: as above.
      completion: C.

    Returns:
      [P, S + G C, N, H]; padding's rows are finite and nothing more.
    """
    if backend.kernel != "xla":
        kernel = partial(_module(backend).attend_packed, completion=completion)
        return _on_devices(partial(kernel, emulated=backend.emulated), q, k, v, valid)
    prompts, prompt = valid.shape
    q_own, k_own, v_own = (
        x[:, prompt:].reshape(prompts, -1, completion, *x.shape[2:]) for x in (q, k, v)
    )
    q, k, v = q[:, :prompt], k[:, :prompt], v[:, :prompt]
    of_prompt = attend_causal(q, k, v, valid, backend.chunk)
    own = attend_completions(q_own, k_own, v_own, k, v, valid, backend.chunk)
    return jnp.concatenate([of_prompt, own.reshape(prompts, -1, *own.shape[3:])], axis=1)


def frame_attention(frame: Array, backend: Backend) -> Callable[[Array, Array, Array], Array]:
    """How patches of the vision tower attend to those of their frame.

    Args:
      frame: int32[P, R, T] the number of the frame of each patch, in R rows of T patches and of
        whole frames; 0 is padding.

    Returns:
      queries, keys and values, each [P, R, T, N, H], to [P, R, T, N, H]; padding's rows are finite
      and nothing more.
    """
    if backend.kernel == "xla":  # the mask is made here, once for all blocks of the tower
        return partial(attend, mask=frame[..., :, None] == frame[..., None, :])
    kernel = partial(_module(backend).attend_segments, emulated=backend.emulated)

    def attention(q: Array, k: Array, v: Array) -> Array:
        rows = [x.reshape(-1, *x.shape[2:]) for x in (q, k, v, frame)]
        return _on_devices(kernel, *rows).reshape(q.shape)

    return attention


def _module(backend: Backend) -> ModuleType:
    return attention_splash if backend.kernel == "splash" else attention_cudnn


def _on_devices(
    kernel: Callable[..., Array], q: Array, k: Array, v: Array, *of_sequences: Array
) -> Array:
    """Runs a kernel, which XLA cannot split, on each device's sequences and heads.

    Args:
      q: [B, T, N, H]; k, v: [B, T, K, H]; B over the axes of prompts, N and K over the heads'. Key
        heads that the mesh does not divide lie whole on every device, which takes the one that its
        query heads read: K = 2 over 4 devices are heads 0, 0, 1 and 1.
      of_sequences: [B, ...].

    Returns:
      [B, T, N, H].
    """
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return kernel(q, k, v, *of_sequences)
    devices = mesh.shape[HEAD_AXIS]
    if k.shape[2] % devices:
        k, v = (jnp.repeat(x, devices // k.shape[2], axis=2) for x in (k, v))
    heads = PartitionSpec(PROMPT_AXES, None, HEAD_AXIS)
    split = jax.shard_map(
        kernel,
        in_specs=(heads, heads, heads, *(PartitionSpec(PROMPT_AXES) for _ in of_sequences)),
        out_specs=heads,
        check_vma=False,  # kernels do not say over which axes their results differ
    )
    return split(q, k, v, *of_sequences)
