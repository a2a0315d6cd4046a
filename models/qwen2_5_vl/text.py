"""Qwen2.5-VL's decoder.

Legend: T tokens of a stream, L layers, D width, N query heads, K key/value heads, H head dimension,
        F MLP width, V vocabulary; `*B` stands for batch axes (a prompt axis, or prompt and
        completion axes).

The layers are stacked and scanned, so 36 of them compile like one. What a token may read is not
decided here: the caller hands in an attention function, which is how prefill, decoding and the
packed update share one decoder.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from models.layers import (
    Remat,
    project,
    rematerialised,
    rms_norm,
    rotate_half,
    split_by_prompt,
)
from models.low_rank import NO_LORA, Lora, adapters
from models.parameter import parameter
from models.qwen2_5_vl.config import TextConfig

# (q [*B, T, N, H], k [*B, T, K, H], v, this layer's slice of `per_layer`, carry)
#   -> (attended [*B, T, N, H], carry, what to stack over the layers)
Attention = Callable[[Array, Array, Array, Any, Any], tuple[Array, Any, Any]]


class DecoderLayers(nnx.Module):
    """All decoder layers, stacked along a leading axis L; one layer without it."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs, lora: Lora = NO_LORA):
        n_layers, d, f = config.layers, config.width, config.mlp_width
        n, k, h = config.heads, config.kv_heads, config.head_dim
        w = partial(parameter, rngs)
        bias = partial(parameter, rngs, init="zeros")
        norm = partial(parameter, rngs, init="ones")
        self.norm_eps = config.norm_eps
        self.attention_norm = norm((n_layers, d), ("layers", "norm"))
        self.q = w((n_layers, d, n, h), ("layers", "embed", "heads", "head_dim"), d)
        self.q_bias = bias((n_layers, n, h), ("layers", "heads", "head_dim"))
        self.k = w((n_layers, d, k, h), ("layers", "embed", "kv_heads", "head_dim"), d)
        self.k_bias = bias((n_layers, k, h), ("layers", "kv_heads", "head_dim"))
        self.v = w((n_layers, d, k, h), ("layers", "embed", "kv_heads", "head_dim"), d)
        self.v_bias = bias((n_layers, k, h), ("layers", "kv_heads", "head_dim"))
        self.o = w((n_layers, n, h, d), ("layers", "heads", "head_dim", "embed"), n * h)
        self.mlp_norm = norm((n_layers, d), ("layers", "norm"))
        self.gate = w((n_layers, d, f), ("layers", "embed", "mlp"), d)
        self.up = w((n_layers, d, f), ("layers", "embed", "mlp"), d)
        self.down = w((n_layers, f, d), ("layers", "mlp", "embed"), f)
        self.low_rank = adapters(
            rngs,
            lora,
            {
                "text.attention": {
                    "q": (self.q, 1),
                    "k": (self.k, 1),
                    "v": (self.v, 1),
                    "o": (self.o, 2),
                },
                "text.mlp": {"gate": (self.gate, 1), "up": (self.up, 1), "down": (self.down, 1)},
            },
        )

    def query_key_value(self, x: Array, cos: Array, sin: Array) -> tuple[Array, Array, Array]:
        """[*B, T, D] -> rotated q [*B, T, N, H], rotated k and v [*B, T, K, H]."""
        y = rms_norm(x, self.attention_norm[...], self.norm_eps)
        low = self.low_rank
        q = project(y, self.q, adapter=low.get("q")) + self.q_bias[...]
        k = project(y, self.k, adapter=low.get("k")) + self.k_bias[...]
        v = project(y, self.v, adapter=low.get("v")) + self.v_bias[...]
        cos, sin = cos[..., None, :], sin[..., None, :]
        return q * cos + rotate_half(q) * sin, k * cos + rotate_half(k) * sin, v

    def finish(self, x: Array, attended: Array) -> Array:
        """Adds the projected attention [*B, T, N, H] and the SwiGLU MLP to [*B, T, D]."""
        low = self.low_rank
        x = x + project(attended, self.o, axes=2, adapter=low.get("o"))
        y = rms_norm(x, self.mlp_norm[...], self.norm_eps)
        gate = jax.nn.silu(project(y, self.gate, adapter=low.get("gate")))
        up = project(y, self.up, adapter=low.get("up"))
        return x + project(gate * up, self.down, adapter=low.get("down"))


class Decoder(nnx.Module):
    """Token embeddings, the layers, the final norm and the output head."""

    def __init__(self, config: TextConfig, rngs: nnx.Rngs, lora: Lora = NO_LORA):
        self.config = config
        self.embed = parameter(rngs, (config.vocab, config.width), ("vocab", "embed"), config.width)
        self.layers = DecoderLayers(config, rngs, lora)
        self.norm = parameter(rngs, (config.width,), ("norm",), init="ones")
        if not config.tied:
            self.head = parameter(
                rngs, (config.vocab, config.width), ("vocab", "embed"), config.width
            )

    def embed_tokens(self, tokens: Array) -> Array:
        """int32[*B, T] -> [*B, T, D]."""
        return split_by_prompt(self.embed[...][tokens])

    def __call__(
        self,
        x: Array,
        positions: Array,
        attention: Attention,
        *,
        per_layer: Any = None,
        carry: Any = None,
        remat: Remat = "none",
        keep: bool = False,
    ) -> tuple[Array, Any, Any]:
        """Runs the layers and the final norm.

        Args:
          x: [*B, T, D] embeddings.
          positions: int32[*B, T, 3] M-RoPE positions (time, row, column).
          attention: what each query reads; see `Attention`.
          per_layer: a tree with a leading layer axis, sliced for `attention` (a prompt cache).
          carry: a tree threaded through the layers (a cache that is written in place).
          remat: what of each layer is kept for the backward pass.
          keep: return what each layer gives, to look inside.

        Returns:
          hidden [*B, T, D] after the final norm, the carry, and what `attention` stacked over L;
          with `keep`, [L, *B, T, D] in the latter's place.
        """
        cos, sin = self.rotary(positions, x.dtype)
        layer_def, layer_params = nnx.split(self.layers)

        def run_layer(state: Any, scanned: Any) -> tuple[Any, Any]:
            x, carry = state
            params, extra = scanned
            layer = nnx.merge(layer_def, params)
            q, k, v = layer.query_key_value(x, cos, sin)
            attended, carry, saved = attention(q, k, v, extra, carry)
            x = split_by_prompt(layer.finish(x, attended))
            return (x, carry), x if keep else saved

        body = rematerialised(run_layer, remat)
        start = (split_by_prompt(x), carry)
        (x, carry), saved = jax.lax.scan(body, start, (layer_params, per_layer))
        return rms_norm(x, self.norm[...], self.config.norm_eps), carry, saved

    def rotary(self, positions: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
        """[*B, T, H] cosines and sines of M-RoPE; float32 inside, then cast, as the original.

        Frequencies [0, t) turn with time, [t, t + h) with the row, the rest with the column.
        """
        config = self.config
        exponent = np.arange(0, config.head_dim, 2, dtype=np.float32) / config.head_dim
        frequency = (1.0 / config.rope_theta**exponent).astype(np.float32)  # [H/2]
        axis = np.repeat(np.arange(3), config.mrope_section)  # [H/2]
        angle = positions.astype(jnp.float32)[..., axis] * frequency
        angle = jnp.concatenate([angle, angle], axis=-1)
        return jnp.cos(angle).astype(dtype), jnp.sin(angle).astype(dtype)

    def logits(self, hidden: Array) -> Array:
        """[*B, D] -> float32[*B, V]."""
        head = self.embed if self.config.tied else self.head
        return jnp.einsum("...d,vd->...v", hidden, head[...], preferred_element_type=jnp.float32)
