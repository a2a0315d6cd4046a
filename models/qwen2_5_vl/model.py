"""Qwen2.5-VL: the vision tower and the decoder, put together for GRPO.

Legend: P prompts, G completions per prompt, S prompt tokens (padded on the right), C completion
        tokens, N patches, U = N / 4 merged units, L layers, D width, K key/value heads, H head
        dimension, V vocabulary.

A group is one prompt and G completions. Everything about the prompt is computed once: `prefill`
returns one cache for the group, `decode` lets G completions read it, and `completion_hidden` runs
the packed sequence [prompt | completion 1 | ... | completion G] for the update.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from models.attention import attend_shared_prompt
from models.attention_backend import XLA, Backend, attend_groups, attend_prompts
from models.layers import Remat
from models.low_rank import NO_LORA, Lora, add_low_rank
from models.parameter import logical_axes
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.processor import Prompt
from models.qwen2_5_vl.text import Decoder
from models.qwen2_5_vl.vision import VisionTower


class PromptCache(NamedTuple):
    """What decoding needs to know of P prompts; read by all G completions, never written."""

    k: Array  # [L, P, S, K, H]
    v: Array  # [L, P, S, K, H]
    valid: Array  # bool[P, S]
    next_position: Array  # int32[P]: M-RoPE position of the first completion token, all 3 axes


class CompletionCache(NamedTuple):
    """Keys and values of the completions, written in place one token at a time."""

    k: Array  # [L, P, G, C, K, H]
    v: Array  # [L, P, G, C, K, H]


class Qwen2_5_VL(nnx.Module):
    """The model. Build it under `nnx.eval_shape` and load weights; see `weights.py`."""

    def __init__(self, config: ModelConfig, rngs: nnx.Rngs, lora: Lora = NO_LORA):
        self.config = config
        self.vision = VisionTower(config.vision, rngs, lora)
        self.text = Decoder(config.text, rngs, lora)

    def encode_vision(
        self, prompt: Prompt, *, remat: Remat = "none", backend: Backend = XLA
    ) -> Array:
        """Vision features [P, U, D] of a batch of prompts; U may be 0 (text only)."""
        if prompt.patches.shape[1] == 0:
            dtype = self.text.embed[...].dtype
            return jnp.zeros((len(prompt.patches), 0, self.config.text.width), dtype)
        features, _ = self.vision(
            prompt.patches,
            prompt.patch_hw,
            prompt.window_index,
            prompt.frame_index,
            remat=remat,
            backend=backend,
        )
        return features

    def embed_prompt(self, prompt: Prompt, features: Array) -> Array:
        """Token embeddings [P, S, D], with vision features put in by position, not by id."""
        x = self.text.embed_tokens(prompt.tokens)
        if features.shape[1] == 0:
            return x
        rows = jnp.maximum(prompt.vision_index, 0)[..., None]
        placed = jnp.take_along_axis(features.astype(x.dtype), rows, axis=1)
        return jnp.where((prompt.vision_index >= 0)[..., None], placed, x)

    def prefill(
        self, prompt: Prompt, features: Array, *, backend: Backend = XLA
    ) -> tuple[Array, PromptCache]:
        """Runs the prompts once.

        Args:
          prompt: a batch of P prompts.
          features: [P, U, D] from `encode_vision`.
          backend: what attends over the prompts.

        Returns:
          hidden [P, D] of each prompt's last token, which predicts every completion's first token,
          and the prompts' cache.
        """
        valid = prompt_valid(prompt)

        def attention(q: Array, k: Array, v: Array, extra: Any, carry: Any) -> Any:
            return attend_prompts(q, k, v, valid, backend), carry, (k, v)

        x = self.embed_prompt(prompt, features)
        hidden, _, (k, v) = self.text(x, prompt.positions, attention)
        return _last(hidden, prompt.length), PromptCache(k, v, valid, next_position(prompt))

    def decode(
        self, tokens: Array, step: Array, prompt: PromptCache, cache: CompletionCache
    ) -> tuple[Array, CompletionCache]:
        """Runs completion token `step` of every completion.

        Args:
          tokens: int32[P, G], the tokens at index `step` of the completions.
          step: int32[], from 0.
          prompt: the prompts' cache.
          cache: the completions' cache; slots before `step` are filled.

        Returns:
          hidden [P, G, D], which predicts the next tokens, and the cache with slot `step` filled.
        """
        x = self.text.embed_tokens(tokens)[:, :, None]  # [P, G, T=1, D]
        position = jnp.broadcast_to((prompt.next_position + step)[:, None], tokens.shape)
        positions = jnp.broadcast_to(position[:, :, None, None], (*tokens.shape, 1, 3))
        mask = jnp.arange(cache.k.shape[3])[None] <= step  # bool[T=1, C]

        def attention(q: Array, k: Array, v: Array, layer_prompt: Any, carry: Any) -> Any:
            layer, cache = carry
            start = (layer, 0, 0, step, 0, 0)
            cache = CompletionCache(
                k=jax.lax.dynamic_update_slice(cache.k, k[None].astype(cache.k.dtype), start),
                v=jax.lax.dynamic_update_slice(cache.v, v[None].astype(cache.v.dtype), start),
            )
            k, v = (jax.lax.dynamic_index_in_dim(x, layer, keepdims=False) for x in cache)
            k_prompt, v_prompt = layer_prompt
            out = attend_shared_prompt(q, k, v, k_prompt, v_prompt, prompt.valid, mask)
            return out, (layer + 1, cache), None

        hidden, (_, cache), _ = self.text(
            x,
            positions,
            attention,
            per_layer=(prompt.k, prompt.v),
            carry=(jnp.zeros((), jnp.int32), cache),
        )
        return hidden[:, :, 0], cache

    def empty_cache(self, prompt: PromptCache, group: int, length: int) -> CompletionCache:
        """A completion cache for `group` completions of at most `length` tokens per prompt."""
        layers, prompts, _, heads, dim = prompt.k.shape
        zeros = jnp.zeros((layers, prompts, group, length, heads, dim), prompt.k.dtype)
        return CompletionCache(zeros, zeros)

    def completion_hidden(
        self,
        prompt: Prompt,
        features: Array,
        completions: Array,
        *,
        remat: Remat = "none",
        backend: Backend = XLA,
    ) -> Array:
        """The hidden states that predict every completion token, each prompt computed once.

        One pass over S + G * C tokens: prompt tokens read the prompt causally, completion tokens
        read the whole prompt and their own completion causally. It equals G passes over
        [prompt, completion], gradients included.

        Args:
          prompt: a batch of P prompts.
          features: [P, U, D] from `encode_vision`.
          completions: int32[P, G, C]; what is behind a completion's end is never read by it.
          remat: what of each layer is kept for the backward pass.
          backend: what attends over the packed sequences.

        Returns:
          [P, G, C, D]; entry c predicts token c. Entry 0 is the prompt's last token, for all G.
        """
        p, g, c = completions.shape
        s = prompt.tokens.shape[1]
        valid = prompt_valid(prompt)
        packed = jnp.concatenate(
            [
                self.embed_prompt(prompt, features),
                self.text.embed_tokens(completions.reshape(p, g * c)),
            ],
            axis=1,
        )
        steps = next_position(prompt)[:, None, None] + jnp.arange(c, dtype=jnp.int32)
        steps = jnp.broadcast_to(steps, (p, g, c)).reshape(p, g * c)
        steps = jnp.broadcast_to(steps[..., None], (p, g * c, 3))
        positions = jnp.concatenate([prompt.positions, steps], axis=1)

        def attention(q: Array, k: Array, v: Array, extra: Any, carry: Any) -> Any:
            return attend_groups(q, k, v, valid, c, backend), carry, None

        hidden, _, _ = self.text(packed, positions, attention, remat=remat)
        first = _last(hidden[:, :s], prompt.length)[:, None, None]  # [P, 1, 1, D]
        first = jnp.broadcast_to(first, (p, g, 1, first.shape[-1]))
        return jnp.concatenate([first, hidden[:, s:].reshape(p, g, c, -1)[:, :, :-1]], axis=2)

    def logits(self, hidden: Array) -> Array:
        """[..., D] -> float32[..., V]."""
        return self.text.logits(hidden)


def prompt_valid(prompt: Prompt) -> Array:
    """bool[P, S]: True where a prompt has a token; lengths [2, 3] of 3 -> [[1 1 0] [1 1 1]]."""
    return jnp.arange(prompt.tokens.shape[1]) < prompt.length[:, None]


def next_position(prompt: Prompt) -> Array:
    """int32[P]: the position after each prompt, one past the maximum of its M-RoPE positions."""
    positions = jnp.where(prompt_valid(prompt)[..., None], prompt.positions, -1)
    return positions.max(axis=(1, 2)) + 1


def _last(hidden: Array, length: Array) -> Array:
    """[P, S, D] -> [P, D]: the hidden state of each prompt's last token."""
    return jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]


def abstract_model(config: ModelConfig, lora: Lora = NO_LORA) -> tuple[Any, dict[str, Any]]:
    """(graphdef, shapes of the weights) without allocating anything; any real size in seconds.

    With `lora` the shapes have a third part, "lora", and `with_adapters` gives what the graphdef
    takes.
    """
    model = nnx.eval_shape(lambda: Qwen2_5_VL(config, nnx.Rngs(0), lora))
    graphdef, state = nnx.split(model)
    return graphdef, _adapters_apart(nnx.to_pure_dict(state))


def weight_axes(config: ModelConfig, lora: Lora = NO_LORA) -> dict[str, Any]:
    """The logical axes of every weight, in the nesting of the parameters."""
    model = nnx.eval_shape(lambda: Qwen2_5_VL(config, nnx.Rngs(0), lora))
    return _adapters_apart(logical_axes(model))


def random_params(config: ModelConfig, seed: int, shardings: Any = None) -> dict[str, Any]:
    """Initial weights, float32, as nested dicts of arrays; the same on every mesh."""

    def init(seed: Array) -> dict[str, Any]:
        rngs = nnx.Rngs(params=jax.random.key(seed))
        return nnx.to_pure_dict(nnx.state(Qwen2_5_VL(config, rngs)))

    return jax.jit(init, out_shardings=shardings)(np.int32(seed))


def random_adapters(
    config: ModelConfig, lora: Lora, seed: int, shardings: Any = None
) -> dict[str, Any]:
    """Initial adapters, float32: {"text": {name: {"a", "b"}}, "vision": ...}, what has any."""

    def init(seed: Array) -> dict[str, Any]:
        rngs = nnx.Rngs(params=jax.random.key(seed))
        whole = nnx.to_pure_dict(nnx.state(Qwen2_5_VL(config, rngs, lora)))
        adapters: dict[str, Any] = _adapters_apart(whole)["lora"]
        return adapters

    return jax.jit(init, out_shardings=shardings)(np.int32(seed))


# ---- adapters: apart in the parameters (they alone are trained), inside in the model ----

_STACKS = {"text": "layers", "vision": "blocks"}  # part -> its module of stacked layers


def with_adapters(params: dict[str, Any]) -> dict[str, Any]:
    """{"text", "vision", "lora"} -> the nesting of a model that was built with adapters."""
    whole = {part: params[part] for part in params if part != "lora"}
    for part, pairs in params["lora"].items():
        stack = _STACKS[part]
        whole[part] = whole[part] | {stack: whole[part][stack] | {"low_rank": pairs}}
    return whole


def _adapters_apart(whole: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `with_adapters`; a tree without adapters is returned as it is."""
    params, lora = dict(whole), {}
    for part, stack in _STACKS.items():
        layers = dict(whole[part][stack])
        if pairs := layers.pop("low_rank", None):
            lora[part] = pairs
        params[part] = whole[part] | {stack: layers}
    return params | {"lora": lora} if lora else params


def merge_adapters(params: dict[str, Any], scale: float, dtype: Any) -> dict[str, Any]:
    """{"text", "vision", "lora"} -> {"text", "vision"}, with W + s A B where there is a pair.

    The sums are made in float32; all that has a pair comes back in `dtype`, the rest as it is.
    """
    merged = {part: params[part] for part in params if part != "lora"}
    for part, pairs in params["lora"].items():
        if part in merged:
            stack = _STACKS[part]
            layers = add_low_rank(merged[part][stack], pairs, scale, dtype)
            merged[part] = merged[part] | {stack: layers}
    return merged
