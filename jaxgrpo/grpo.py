"""GRPO as pure functions: group advantages and the clipped loss.

Legend: P prompts, G completions per prompt, C completion tokens (padded).

Sources: GRPO, DeepSeekMath (arXiv 2402.03300); DAPO (arXiv 2503.14476); Dr.GRPO (arXiv 2503.20783);
dual clip, Ye et al. (arXiv 1912.09729); truncated importance sampling, Yao et al., "Your Efficient
RL Framework Secretly Brings You Off-Policy RL Training" (2025); the k3 estimator, J. Schulman,
"Approximating KL Divergence" (2020).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxgrpo.config import GrpoSection

_STD_EPS = 1e-6


def group_advantages(rewards: Array, divide_by_std: bool = True) -> Array:
    """Advantages relative to the group (GRPO, section 4.1.2).

    Args:
      rewards: f32[P, G].
      divide_by_std: divide by the group's sample standard deviation; without it, Dr.GRPO.

    Returns:
      f32[P, G]. A group whose rewards are all equal gets exact zeros: it teaches nothing. Example:
      rewards [[1, 0, 0, 1], [2, 2, 2, 2]] give [[.87, -.87, -.87, .87], [0, 0, 0, 0]].
    """
    centred = rewards - rewards.mean(axis=-1, keepdims=True)
    centred = jnp.where(zero_variance(rewards)[:, None], 0.0, centred)
    if not divide_by_std:
        return centred
    std = jnp.sqrt(jnp.sum(jnp.square(centred), axis=-1, keepdims=True) / (rewards.shape[-1] - 1))
    return centred / (std + _STD_EPS)


def zero_variance(rewards: Array) -> Array:
    """bool[P]: groups whose rewards are all equal."""
    return jnp.max(rewards, axis=-1) == jnp.min(rewards, axis=-1)


def completion_mask(lengths: Array, width: int) -> Array:
    """f32[P, G, C]: 1 on a completion's tokens, its stop token included.

    Example: lengths [[2, 0]] at width 3 -> [[[1, 1, 0], [0, 0, 0]]].
    """
    return (jnp.arange(width) < lengths[..., None]).astype(jnp.float32)


def token_weights(mask: Array, aggregation: str, some: bool = False) -> tuple[Array, Array]:
    """How much each token counts: a loss is `sum(weights * loss) / count`.

    Args:
      mask: f32[P, G, C].
      some: whether completions may be masked as a whole; "sequence" does not count those.
      aggregation: "sequence" (GRPO): the mean over completions of the mean over their tokens;
        "token" (DAPO, eq. 8): the mean over all tokens; "constant" (Dr.GRPO): the sum over tokens
        divided by P * G * C, so that a token weighs the same in short and long completions.

    Returns:
      weights f32[P, G, C] and count f32[], at least 1. Example: mask [[[1, 1, 0], [1, 0, 0]]] gives
      "sequence" [[[.5, .5, 0], [1, 0, 0]]] and 2, "token" the mask and 3, "constant" the mask and
      6; with [[[1, 1, 0], [0, 0, 0]]] and `some` the counts are 1, 2 and 6.
    """
    if aggregation == "sequence":
        length = mask.sum(axis=-1, keepdims=True)
        completions = jnp.asarray(mask.shape[0] * mask.shape[1], jnp.float32)
        if some:
            completions = jnp.maximum(jnp.sum(length > 0, dtype=jnp.float32), 1.0)
        return mask / jnp.maximum(length, 1.0), completions
    if aggregation == "token":
        return mask, jnp.maximum(mask.sum(), 1.0)
    return mask, jnp.asarray(mask.size, jnp.float32)


class LossInputs(NamedTuple):
    """What the loss needs to know of the sampled completions, besides the current policy."""

    advantages: Array  # f32[P, G]
    weights: Array  # f32[P, G, C], from `token_weights`
    mask: Array  # f32[P, G, C]
    old_logp: Array | None  # f32[P, G, C]; None: the current policy's own, with no gradient
    ref_logp: Array | None  # f32[P, G, C]; None: no KL term
    sampler_logp: Array | None = None  # f32[P, G, C]; None: no importance sampling


def grpo_loss(
    logp: Array, entropy: Array, inputs: LossInputs, config: GrpoSection
) -> tuple[Array, dict[str, Array]]:
    """The clipped surrogate, the KL to the reference and the entropy bonus, as a weighted sum.

    Per token, with ratio r = exp(logp - old_logp) and advantage A (GRPO, eq. 3):
    `-min(r A, clip(r, 1 - clip_low, 1 + clip_high) A) + kl * k3 - entropy_weight * H`. DAPO's
    clip-higher is `clip_high > clip_low`. With dual_clip c the minimum is at least c A where A < 0
    (Ye et al., eq. 5): a ratio counts at most c times against a completion. With importance_cap
    the minimum is multiplied by `min(exp(old_logp - sampler_logp), cap)` (Yao et al.): sampler and
    trainer compute with other roundings, and a token that the sampler made too likely counts less.

    Args:
      logp: f32[P, G, C] log-probability of each completion token under the current policy.
      entropy: f32[P, G, C] of the distribution that each token was drawn from.
      inputs: see `LossInputs`.
      config: clip_low, clip_high, dual_clip, importance_cap, kl, entropy.

    Returns:
      The weighted sum f32[], to be divided by the count of `token_weights` once, and sums over the
      tokens (to be divided by their number): "entropy"; with ref_logp "kl"; with old_logp
      "clip_low", "clip_high", "ratio" and "dual_clip", which without it are 0, 0, 1 and 0; with
      sampler_logp "importance" and "importance_capped". Example of the dual clip: A = -1, c = 3 and
      ratios [0.5, 2, 5] give losses [0.8, 2, 3].
    """
    weights, mask = inputs.weights, inputs.mask
    old_logp = jax.lax.stop_gradient(logp) if inputs.old_logp is None else inputs.old_logp
    # Padding holds no log-probability worth the name: keep exp() of it out of the backward pass.
    ratio = jnp.exp(jnp.where(mask > 0, logp - old_logp, 0.0))
    advantage = inputs.advantages[..., None]
    clipped = jnp.clip(ratio, 1.0 - config.clip_low, 1.0 + config.clip_high)
    gain = jnp.minimum(ratio * advantage, clipped * advantage)
    if config.dual_clip:
        gain = jnp.where(advantage < 0, jnp.maximum(gain, config.dual_clip * advantage), gain)
    sums = {"entropy": jnp.sum(mask * entropy)}
    if inputs.sampler_logp is not None:
        likelier = jnp.exp(jnp.where(mask > 0, old_logp - inputs.sampler_logp, 0.0))
        importance = jnp.minimum(likelier, config.importance_cap)
        gain = gain * importance
        sums["importance"] = jnp.sum(mask * importance)
        sums["importance_capped"] = jnp.sum(mask * (likelier > config.importance_cap))
    loss = -gain
    if inputs.old_logp is not None:
        sums |= {
            "ratio": jnp.sum(mask * ratio),
            "clip_low": jnp.sum(mask * ((ratio < 1.0 - config.clip_low) & (advantage < 0))),
            "clip_high": jnp.sum(mask * ((ratio > 1.0 + config.clip_high) & (advantage > 0))),
        }
        if config.dual_clip:
            sums["dual_clip"] = jnp.sum(mask * ((ratio > config.dual_clip) & (advantage < 0)))
    if inputs.ref_logp is not None:
        log_ratio = jnp.where(mask > 0, inputs.ref_logp - logp, 0.0)
        k3 = jnp.exp(log_ratio) - log_ratio - 1.0
        loss = loss + config.kl * k3
        sums["kl"] = jnp.sum(mask * k3)
    if config.entropy:
        loss = loss - config.entropy * entropy
    return jnp.sum(weights * loss), sums
