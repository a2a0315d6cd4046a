"""The policy: a model, the ids it may emit and a temperature, as log-probabilities.

Sampler and trainer both go through `policy_logits`, so they speak of the same distribution.

Legend: P prompts, G completions per prompt, C completion tokens, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array

from models.attention_backend import Backend
from models.layers import Remat
from models.low_rank import NO_LORA, Lora
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import Qwen2_5_VL, abstract_model, merge_adapters, with_adapters
from models.qwen2_5_vl.processor import Prompt

Params = dict[str, Any]
NEVER = -1e30  # the logit of an id that is never sampled


class Vocabulary(NamedTuple):
    """Which ids a policy may emit; the same in the sampler and in the trainer."""

    usable: np.ndarray  # bool[V]: not vision, padding or beyond the tokenizer
    stop: tuple[int, ...]  # ids that end a completion (and belong to it)
    pad: int  # fills what is behind a completion's end


def policy_logits(logits: Array, vocabulary: Vocabulary, temperature: float) -> Array:
    """The logits of the distribution that the policy is: temperature applied, unusable ids out.

    Both the sampler and the trainer go through here, so their log-probabilities agree.

    Args:
      logits: f32[..., V].
      vocabulary: what may be emitted.
      temperature: 0 stands for greedy decoding and leaves the logits as they are.

    Returns:
      f32[..., V].
    """
    scaled = logits / temperature if temperature else logits
    return jnp.where(vocabulary.usable, scaled, NEVER)


def cast(params: Params, dtype: Any) -> Params:
    """The weights in the compute dtype; gradients flow back in the master's."""
    return jax.tree.map(lambda x: x.astype(dtype), params)


def token_log_probs(
    model: Qwen2_5_VL,
    hidden: Array,
    tokens: Array,
    vocabulary: Vocabulary,
    temperature: float,
    chunk: int,
) -> tuple[Array, Array]:
    """Log-probability of each token and entropy of its distribution, a chunk of C at a time.

    The logits of a chunk are made, used and thrown away, and made again in the backward pass, so
    that [P, G, C, V] never exists.

    Args:
      model: with the output head.
      hidden: [P, G, C, D]; entry c predicts token c.
      tokens: int32[P, G, C].
      vocabulary, temperature: see `policy_logits`.
      chunk: completion positions per chunk; 0 or more than C: all at once.

    Returns:
      f32[P, G, C] and f32[P, G, C].
    """

    @jax.checkpoint
    def one_chunk(hidden: Array, tokens: Array) -> tuple[Array, Array]:
        log_p = jax.nn.log_softmax(policy_logits(model.logits(hidden), vocabulary, temperature))
        logp = jnp.take_along_axis(log_p, tokens[..., None], axis=-1)[..., 0]
        p = jnp.exp(log_p)
        return logp, -jnp.sum(jnp.where(p > 0, p * log_p, 0.0), axis=-1)

    p, g, c = tokens.shape
    if not 0 < chunk < c:
        return one_chunk(hidden, tokens)
    count = -(-c // chunk)
    pad = count * chunk - c

    def to_chunks(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, 0), (0, pad)] + [(0, 0)] * (x.ndim - 3))
        return jnp.moveaxis(x.reshape(p, g, count, chunk, *x.shape[3:]), 2, 0)

    _, out = jax.lax.scan(
        lambda carry, x: (carry, one_chunk(*x)), None, (to_chunks(hidden), to_chunks(tokens))
    )
    logp, entropy = (jnp.moveaxis(x, 0, 2).reshape(p, g, -1)[:, :, :c] for x in out)
    return logp, entropy


class Policy(NamedTuple):
    """The static half of a policy: how its weights become log-probabilities."""

    config: ModelConfig
    graphdef: Any  # nnx graph definition of the model
    vocabulary: Vocabulary
    temperature: float
    compute_dtype: Any
    remat: Remat
    logit_chunk: int
    backend: Backend
    lora: Lora = NO_LORA

    def merge(self, params: Params) -> Qwen2_5_VL:
        """The model with these weights in the compute dtype; with adapters if they have any."""
        params = cast(params, self.compute_dtype)
        if "lora" not in params:
            return nnx.merge(self.graphdef, params)
        graphdef, _ = abstract_model(self.config, self.lora)
        return nnx.merge(graphdef, with_adapters(params))

    def publish(self, params: Params) -> Params:
        """The weights in the compute dtype, with what adapters there are added to them."""
        if "lora" in params:
            params = merge_adapters(params, self.lora.scale, self.compute_dtype)
        return cast(params, self.compute_dtype)

    def log_probs(
        self, params: Params, prompt: Prompt, features: Array | None, completions: Array
    ) -> tuple[Array, Array]:
        """(log-probability, entropy), each f32[P, G, C], with the prompt computed once.

        `features` None encodes the video with these weights; a frozen tower's are handed in.
        """
        model = self.merge(params)
        if features is None:
            features = model.encode_vision(prompt, remat=self.remat, backend=self.backend)
        hidden = model.completion_hidden(
            prompt, features, completions, remat=self.remat, backend=self.backend
        )
        return token_log_probs(
            model, hidden, completions, self.vocabulary, self.temperature, self.logit_chunk
        )
