"""The policy update: the prompt once and its G completions, loss, gradients, AdamW, in one jit.

Legend: P prompts, G completions per prompt, S prompt tokens, C completion tokens, D width,
        V vocabulary, A micro-batches that accumulate into one update.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from data.records import Record
from jaxgrpo.config import Config, GrpoSection, OptimSection
from jaxgrpo.grpo import LossInputs, completion_mask, grpo_loss, token_weights
from jaxgrpo.policy import Params, Policy
from models.qwen2_5_vl.processor import Prompt


class NonFiniteError(ValueError):
    """Too many steps in a row had a loss or a gradient that is not finite."""


class TrainState(NamedTuple):
    """What an update changes. Frozen weights are kept apart from `params`."""

    params: Params  # the trained weights, float32
    opt_state: optax.OptState
    skipped: Array  # int32[]: steps in a row with a non-finite update


class UpdateBatch(NamedTuple):
    """Everything the update reads, besides the weights."""

    prompt: Prompt  # leading axis P
    features: Array | None  # [P, U, D] of a frozen vision tower; None: encode with gradients
    completions: Array  # int32[P, G, C]
    lengths: Array  # int32[P, G]
    finished: Array  # bool[P, G]: not truncated
    advantages: Array  # f32[P, G]
    sampler_logp: Array  # f32[P, G, C]
    old_logp: Array | None  # f32[P, G, C]; None: on-policy, the current policy's own
    ref_logp: Array | None  # f32[P, G, C]; None: no KL term


def split_frozen(params: Params, freeze_vision: bool) -> tuple[Params, Params]:
    """(trained, frozen) weights; the frozen ones get no gradient and no optimiser state.

    Where there are adapters ("lora"), they alone are trained.
    """
    if "lora" in params:
        return {"lora": params["lora"]}, {k: v for k, v in params.items() if k != "lora"}
    if not freeze_vision:
        return params, {}
    return {"text": params["text"]}, {"vision": params["vision"]}


def learning_rate_schedule(config: OptimSection, steps: int) -> optax.Schedule:
    """Linear warm-up from 0 over `warmup_steps`, then constant, linear or cosine decay to 0."""
    peak, warm = config.learning_rate, config.warmup_steps
    rest = max(steps - warm, 1)
    after = {
        "constant": optax.constant_schedule(peak),
        "linear": optax.linear_schedule(peak, 0.0, rest),
        "cosine": optax.cosine_decay_schedule(peak, rest),
    }[config.decay]
    # Step 0 already moves: the first of w warm-up steps has rate peak / w.
    warmup = optax.linear_schedule(peak / max(warm, 1), peak, max(warm - 1, 1))
    return optax.join_schedules([warmup, after], [warm]) if warm else after


def make_optimizer(
    config: OptimSection, steps: int, updates: int = 1
) -> optax.GradientTransformation:
    """AdamW as torch's: decoupled weight decay, on every weight.

    Args:
      updates: in each of the steps, with one learning rate.
    """
    of_step = learning_rate_schedule(config, steps)

    def of_update(count: Array) -> Array:
        return of_step(count // updates)

    return optax.adamw(
        of_step if updates == 1 else of_update,
        b1=config.b1,
        b2=config.b2,
        eps=config.eps,
        weight_decay=config.weight_decay,
        mu_dtype=jnp.dtype(config.first_moment),
    )


def grpo_gradients(
    policy: Policy,
    params: Params,
    frozen: Params,
    batch: UpdateBatch,
    config: GrpoSection,
    accumulate: int = 1,
    length: int | None = None,
) -> tuple[Params, dict[str, Array], Array]:
    """Gradients of the GRPO loss, its metrics, and the log-probabilities that it is made of.

    With `accumulate` = A the P prompts go through in A micro-batches of P / A, one after another;
    the sums are divided by the whole batch's count once, so the result is that of one batch.

    With `length` only the completions' first so many tokens are computed with, which changes
    nothing if none has more.

    With `config.mask_truncated` what was cut off counts nowhere here (DAPO, section 3.4); it has
    had its part in the group's mean. Where nothing is left the gradients are 0.

    Returns:
      gradients (float32, in the nesting of `params`); scalars: loss, those of `grpo_loss`, and the
      sampler gap (mean |trainer - sampler| log-probability); f32[P, G, length].
    """
    mask = completion_mask(batch.lengths, batch.completions.shape[2])
    if config.mask_truncated:
        mask = mask * batch.finished[..., None]
    weights, count = token_weights(mask, config.aggregation, some=config.mask_truncated)
    tokens = jnp.maximum(mask.sum(), 1.0)
    batch, weights, mask = _first_tokens(batch, weights, mask, length)

    def loss_sum(
        params: Params, micro: tuple[UpdateBatch, Array, Array]
    ) -> tuple[Array, tuple[dict[str, Array], Array]]:
        batch, weights, mask = micro
        logp, entropy = policy.log_probs(
            params | frozen, batch.prompt, batch.features, batch.completions
        )
        sampler_logp = batch.sampler_logp if config.importance_cap else None
        inputs = LossInputs(
            batch.advantages, weights, mask, batch.old_logp, batch.ref_logp, sampler_logp
        )
        loss, sums = grpo_loss(logp, entropy, inputs, config)
        logp = jax.lax.stop_gradient(logp)
        gap = jnp.abs(logp - batch.sampler_logp)
        return loss, (sums | {"sampler_gap": jnp.sum(mask * gap)}, logp)

    value_and_grad = jax.value_and_grad(loss_sum, has_aux=True)
    (loss, sums), gradients, logp = accumulated(
        value_and_grad, params, (batch, weights, mask), accumulate
    )
    gradients = jax.tree.map(lambda g: g / count, gradients)
    return gradients, {"loss": loss / count} | {k: v / tokens for k, v in sums.items()}, logp


def _first_tokens(
    batch: UpdateBatch, weights: Array, mask: Array, length: int | None
) -> tuple[UpdateBatch, Array, Array]:
    """What there is per completion token, [P, G, C], cut after `length` tokens."""
    per_token = batch.completions, batch.sampler_logp, batch.old_logp, batch.ref_logp, weights, mask
    completions, sampler_logp, old_logp, ref_logp, weights, mask = jax.tree.map(
        lambda x: x[:, :, :length], per_token
    )
    batch = batch._replace(
        completions=completions, sampler_logp=sampler_logp, old_logp=old_logp, ref_logp=ref_logp
    )
    return batch, weights, mask


def sft_gradients(
    policy: Policy,
    params: Params,
    frozen: Params,
    prompt: Prompt,
    completions: Array,
    lengths: Array,
    accumulate: int = 1,
) -> tuple[Params, dict[str, Array]]:
    """Gradients of the mean cross-entropy per completion token, and its metrics.

    Args:
      completions: int32[P, G, C], G of them sharing each prompt.
      lengths: int32[P, G].

    Returns:
      gradients and scalars: loss (nats per token) and entropy (how sure the policy is).
    """
    mask = completion_mask(lengths, completions.shape[2])
    count = jnp.maximum(mask.sum(), 1.0)

    def loss_sum(
        params: Params, micro: tuple[Prompt, Array, Array]
    ) -> tuple[Array, tuple[dict[str, Array], None]]:
        prompt, completions, mask = micro
        logp, entropy = policy.log_probs(params | frozen, prompt, None, completions)
        return -jnp.sum(mask * logp), ({"entropy": jnp.sum(mask * entropy)}, None)

    value_and_grad = jax.value_and_grad(loss_sum, has_aux=True)
    (loss, sums), gradients, _ = accumulated(
        value_and_grad, params, (prompt, completions, mask), accumulate
    )
    gradients = jax.tree.map(lambda g: g / count, gradients)
    return gradients, {"loss": loss / count} | {k: v / count for k, v in sums.items()}


def accumulated(value_and_grad: Callable, params: Params, batch: Any, micro_batches: int) -> Any:
    """Runs `value_and_grad(params, micro_batch)` over micro-batches of the leading axis.

    Args:
      value_and_grad: gives ((loss, (sums, rows)), gradients).

    Returns:
      ((loss, sums), gradients, rows): sums over the micro-batches, but `rows` put together.
    """
    if micro_batches == 1:
        (loss, (sums, rows)), gradients = value_and_grad(params, batch)
        return (loss, sums), gradients, rows

    # Micro-batch a takes rows a, a + A, ...: each keeps its share of every device's rows.
    def split(x: Array) -> Array:
        return jnp.moveaxis(x.reshape(len(x) // micro_batches, micro_batches, *x.shape[1:]), 1, 0)

    def together(x: Array) -> Array:
        return jnp.moveaxis(x, 0, 1).reshape(-1, *x.shape[2:])

    def one(micro: Any) -> tuple[Any, Any]:
        (loss, (sums, rows)), gradients = value_and_grad(params, micro)
        return ((loss, sums), gradients), rows

    micro = jax.tree.map(split, batch)
    shapes, _ = jax.eval_shape(one, jax.tree.map(lambda x: x[0], micro))
    zeros = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

    def add(total: Any, micro: Any) -> tuple[Any, Any]:
        summed, rows = one(micro)
        return jax.tree.map(jnp.add, total, summed), rows

    (loss_and_sums, gradients), rows = jax.lax.scan(add, zeros, micro)
    return loss_and_sums, gradients, jax.tree.map(together, rows)


def apply_gradients(
    state: TrainState,
    gradients: Params,
    loss: Array,
    optimizer: optax.GradientTransformation,
    clip_norm: float,
    *,
    first: bool = True,
) -> tuple[TrainState, dict[str, Array]]:
    """Clips by the global norm and steps; a non-finite loss or gradient changes no weight.

    Args:
      first: of the updates of its step. `skipped` counts steps: three bad updates of one are one.

    Returns:
      the new state and scalars: grad_norm (before clipping), skipped_in_a_row (0 if it stepped).
    """
    norm = optax.tree.norm(gradients)
    finite = jnp.isfinite(norm) & jnp.isfinite(loss)
    scale = jnp.minimum(1.0, clip_norm / (norm + 1e-6))
    gradients = jax.tree.map(lambda g: g * scale, gradients)
    updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
    stepped = (optax.apply_updates(state.params, updates), opt_state)
    params, opt_state = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), stepped, (state.params, state.opt_state)
    )
    if first:
        skipped = jnp.where(finite, 0, state.skipped + 1)
    else:
        skipped = jnp.where(finite, state.skipped, jnp.maximum(state.skipped, 1))
    metrics = {"grad_norm": norm, "skipped_in_a_row": skipped}
    return TrainState(params, opt_state, skipped), metrics


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(params, optimizer.init(params), skipped=jnp.zeros((), jnp.int32))


def stop_if_not_finite(in_a_row: int, step: int, records: Sequence[Record], config: Config) -> None:
    """Ends the run when too many steps in a row were skipped.

    Raises:
      NonFiniteError: names the step and its items.
    """
    if in_a_row >= config.train.max_nonfinite_steps:
        names = ", ".join(record.id for record in records)
        raise NonFiniteError(
            f"{in_a_row} steps in a row had a loss or gradient that is not finite; the last was "
            f"step {step} with {names}. The weights are those before the first of them. Start "
            "another run (a new run_dir, and model.path may be this one) with a lower "
            "optim.learning_rate or with model.compute_dtype=float32"
        )
