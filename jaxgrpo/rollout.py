"""Rollout: encode the video once, prefill once, sample G completions from the shared cache.

Legend: P prompts, G completions per prompt, S prompt tokens, C completion tokens, D width,
        V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxgrpo.policy import NEVER, Vocabulary, policy_logits
from models.attention_backend import XLA, Backend
from models.qwen2_5_vl.model import CompletionCache, Qwen2_5_VL
from models.qwen2_5_vl.processor import Prompt


class Sampling(NamedTuple):
    """How completions are drawn. Temperature 0 is greedy decoding."""

    group: int  # G
    max_new_tokens: int  # C
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0  # 0: all


class Rollout(NamedTuple):
    """Sampled completions."""

    tokens: Array  # int32[P, G, C], padded behind the stop token
    lengths: Array  # int32[P, G], the stop token included
    sampler_logp: Array  # f32[P, G, C] under the policy's own distribution, 0 on padding
    finished: Array  # bool[P, G]: a stop token was reached; False = truncated at C


class DecodeState(NamedTuple):
    """All that changes from token to token."""

    step: Array  # int32[]: completion tokens drawn so far
    hidden: Array  # [P, G, D]: predicts token `step`
    cache: CompletionCache  # slots before `step` are filled
    tokens: Array  # int32[P, G, C]
    logp: Array  # f32[P, G, C]
    lengths: Array  # int32[P, G]
    done: Array  # bool[P, G]


def restrict(logits: Array, top_k: int, top_p: float) -> Array:
    """Keeps the `top_k` likeliest ids, then the fewest whose probabilities reach `top_p`.

    Example: probabilities [.5, .3, .2] at top_p 0.6 keep the first two (0.5 alone falls short).

    Args:
      logits: f32[..., V]. top_k: 0 keeps all. top_p: 1 keeps all.
    """
    if top_k:
        kth = jax.lax.top_k(logits, min(top_k, logits.shape[-1]))[0][..., -1:]
        logits = jnp.where(logits >= kth, logits, NEVER)
    if top_p < 1.0:
        descending = jnp.sort(logits, axis=-1, descending=True)
        probability = jax.nn.softmax(descending, axis=-1)
        before = jnp.cumsum(probability, axis=-1) - probability
        lowest_kept = jnp.where(before < top_p, descending, jnp.inf).min(axis=-1, keepdims=True)
        logits = jnp.where(logits >= lowest_kept, logits, NEVER)
    return logits


def sample(logits: Array, key: Array, sampling: Sampling) -> tuple[Array, Array]:
    """Draws one token per row.

    Args:
      logits: f32[..., V] from `policy_logits`. key: a PRNG key. sampling: see `Sampling`.

    Returns:
      tokens int32[...] and their log-probability f32[...] under `logits` as given, that is before
      top-k and top-p: the policy being trained, not the one that top-k and top-p make of it.
    """
    if sampling.temperature:
        allowed = restrict(logits, sampling.top_k, sampling.top_p)
        tokens = jax.random.categorical(key, allowed, axis=-1)
    else:
        tokens = jnp.argmax(logits, axis=-1)
    logp = jnp.take_along_axis(jax.nn.log_softmax(logits), tokens[..., None], axis=-1)
    return tokens.astype(jnp.int32), logp[..., 0]


def generate(
    model: Qwen2_5_VL,
    prompt: Prompt,
    features: Array,
    key: Array,
    sampling: Sampling,
    vocabulary: Vocabulary,
    backend: Backend = XLA,
) -> Rollout:
    """Samples G completions for each of P prompts, on the device from first to last token.

    Args:
      model: with its weights (inside jit: merged from the split state).
      prompt: P prompts, padded to a bucket.
      features: [P, U, D] from `model.encode_vision`, computed once.
      key: a PRNG key; the draws do not depend on the mesh.
      sampling, vocabulary: static.
      backend: what attends over the prompts.
    """
    p, g, c = len(prompt.tokens), sampling.group, sampling.max_new_tokens
    last, prompt_cache = model.prefill(prompt, features, backend=backend)
    stop = np.asarray(vocabulary.stop, np.int32)

    def unfinished(state: DecodeState) -> Array:
        return (state.step < c) & ~jnp.all(state.done)

    def one_token(state: DecodeState) -> DecodeState:
        logits = policy_logits(model.logits(state.hidden), vocabulary, sampling.temperature)
        token, logp = sample(logits, jax.random.fold_in(key, state.step), sampling)
        token = jnp.where(state.done, vocabulary.pad, token)
        logp = jnp.where(state.done, 0.0, logp)
        hidden, cache = model.decode(token, state.step, prompt_cache, state.cache)
        return DecodeState(
            step=state.step + 1,
            hidden=hidden,
            cache=cache,
            tokens=jax.lax.dynamic_update_index_in_dim(state.tokens, token, state.step, axis=2),
            logp=jax.lax.dynamic_update_index_in_dim(state.logp, logp, state.step, axis=2),
            lengths=state.lengths + ~state.done,
            done=state.done | jnp.isin(token, stop),
        )

    start = DecodeState(
        step=jnp.zeros((), jnp.int32),
        hidden=jnp.broadcast_to(last[:, None], (p, g, last.shape[-1])),
        cache=model.empty_cache(prompt_cache, g, c),
        tokens=jnp.full((p, g, c), vocabulary.pad, jnp.int32),
        logp=jnp.zeros((p, g, c), jnp.float32),
        lengths=jnp.zeros((p, g), jnp.int32),
        done=jnp.zeros((p, g), bool),
    )
    end = jax.lax.while_loop(unfinished, one_token, start)
    return Rollout(end.tokens, end.lengths, end.logp, end.done)
