"""The jitted programs of a run, compiled before the first step, and nothing else that is compiled.

Shapes are known beforehand, so every program is lowered and compiled per bucket at the start: the
run fails early where it must, no step waits for a compilation, and the number of executables is
programs x buckets. `jax.jit` is never called on shapes that were not foreseen: a compiled
executable refuses them.

What the host reads (completions, scores) leaves a program whole on every device, so that each
process has it without asking the others; the update splits it again.

Legend: P prompts, G completions per prompt, C completion tokens, M ground-truth spans, U merged
        vision units, D width.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Lowered, Wrapped

from jaxgrpo.config import Config
from jaxgrpo.grpo import group_advantages, zero_variance
from jaxgrpo.policy import Params, Policy
from jaxgrpo.rollout import Rollout, Sampling, generate
from jaxgrpo.sharding import (
    PROMPTS,
    RULES,
    SAMPLER_RULES,
    jit_on,
    param_shapes,
    param_shardings,
    say,
    shape_on,
    shardings_like,
)
from jaxgrpo.update import (
    TrainState,
    UpdateBatch,
    apply_gradients,
    grpo_gradients,
    init_state,
    make_optimizer,
    sft_gradients,
    split_frozen,
)
from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.processor import Prompt
from models.qwen2_5_vl.sizes import Size
from rewards.answers import Answers
from rewards.dual import Truth
from rewards.reward import Reward


class Scores(NamedTuple):
    """What the completions of a step earned."""

    total: Array  # f32[P, G]
    components: dict[str, Array]  # f32[P, G] each, NaN where the task has no such component
    advantages: Array  # f32[P, G]
    zero_variance: Array  # bool[P]


def cache_compilations(config: Config) -> None:
    """Keeps compiled programs where `config.compilation_cache` says, if anywhere.

    A restarted job then reads them instead of compiling again. jax names them by program, compiler
    and devices, so that one folder can serve all runs; process 0 writes.
    """
    path = config.compilation_cache.replace("{run_dir}", config.run_dir)
    if not path:
        return
    if jax.process_count() > 1 and jax.default_backend() == "cpu":
        # There process 0 alone was seen to find its programs again; the others compile for minutes.
        say("compilation_cache is not used: this is a job of several processes on CPU")
        return
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(path))
    # All of them, for a run has few; jax would leave out those that compile within a second.
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# ---- what each program computes ----


def init_program(mesh: Mesh, optimizer: optax.GradientTransformation, params: Params) -> Wrapped:
    """Trained weights, donated -> the state before the first step, which they become part of.

    Args:
      params: the weights or their shapes, with shardings.
    """

    def init(params: Params) -> TrainState:
        return init_state(params, optimizer)

    of_params = jax.tree.map(lambda x: x.sharding, params)
    shardings = shardings_like(mesh, jax.eval_shape(init, params), params, of_params)
    return jax.jit(init, donate_argnums=0, out_shardings=shardings)


def publish_program(policy: Policy, shardings: Any) -> Wrapped:
    """(trained, frozen) master weights -> a copy in the compute dtype and another layout.

    Adapters are added to the weights that they belong to.
    """

    def publish(params: Params, frozen: Params) -> Params:
        return policy.publish(params | frozen)

    return jax.jit(publish, out_shardings=shardings)


def lower_publish(
    mesh: Mesh,
    policy: Policy,
    trained: Params,
    frozen: Params,
    rules: Mapping[str, str | None] = SAMPLER_RULES,
) -> Lowered:
    """Lowers publishing the weights (arrays or shapes with shardings) to the sampler.

    With `sharding.RULES` it keeps them as a reference instead, laid out as they are.
    """
    layout = param_shardings(policy.config, mesh, rules)
    layout = {name: layout[name] for name in trained | frozen if name in layout}
    return publish_program(policy, layout).lower(trained, frozen)


def rollout_program(mesh: Mesh, policy: Policy, sampling: Sampling, keep_features: bool) -> Wrapped:
    """(sampler's weights, prompts, seed, step) -> completions, and vision features if asked for.

    The draws are a function of (seed, step, row): not of the mesh, nor of what was drawn before.
    """

    def rollout(
        params: Params, prompt: Prompt, seed: Array, step: Array
    ) -> tuple[Rollout, Array | None]:
        model = policy.merge(params)
        features = model.encode_vision(prompt, backend=policy.backend)
        key = jax.random.fold_in(jax.random.key(seed), step)
        completions = generate(
            model, prompt, features, key, sampling, policy.vocabulary, policy.backend
        )
        return completions, features if keep_features else None

    split: Any = NamedSharding(mesh, PROMPTS)
    whole: Any = NamedSharding(mesh, PartitionSpec())
    completions = Rollout(tokens=whole, lengths=whole, sampler_logp=split, finished=whole)
    return jit_on(mesh, rollout, out_shardings=(completions, split))


def score_program(mesh: Mesh, reward: Reward, divide_by_std: bool) -> Wrapped:
    """(answers, ground truth) -> rewards and advantages."""

    def score(answers: Answers, truth: Truth) -> Scores:
        total, components = reward.score(answers, truth)
        advantages = group_advantages(total, divide_by_std)
        return Scores(total, components, advantages, zero_variance(total))

    return jax.jit(score, out_shardings=NamedSharding(mesh, PartitionSpec()))


def reference_program(mesh: Mesh, policy: Policy, length: int | None = None) -> Wrapped:
    """(reference, frozen weights, prompts, features, completions) -> log-probs f32[P, G, C].

    With `length`, of the completions' first tokens only.
    """
    split = NamedSharding(mesh, PROMPTS)

    def reference(
        params: Params,
        frozen: Params,
        prompt: Prompt,
        features: Array | None,
        completions: Array,
    ) -> Array:
        completions = jax.lax.with_sharding_constraint(completions[:, :, :length], split)
        return policy.log_probs(params | frozen, prompt, features, completions)[0]

    return jit_on(mesh, reference, out_shardings=split)


def update_program(
    mesh: Mesh,
    policy: Policy,
    config: Config,
    optimizer: optax.GradientTransformation,
    state_shardings: TrainState,
    length: int | None = None,
) -> Wrapped:
    """(state, frozen weights, batch) -> the next state, scalar metrics, and log-probs or None.

    The state is donated. Log-probs f32[P, G, length] come from the first of several updates from a
    rollout, for those that follow.

    Args:
      length: no completion may have more tokens.
    """
    split = NamedSharding(mesh, PROMPTS)

    def update(
        state: TrainState, frozen: Params, batch: UpdateBatch
    ) -> tuple[TrainState, dict[str, Array], Array | None]:
        batch = jax.lax.with_sharding_constraint(batch, split)
        gradients, metrics, logp = grpo_gradients(
            policy, state.params, frozen, batch, config.grpo, config.optim.accumulate, length
        )
        first = batch.old_logp is None
        state, step_metrics = apply_gradients(
            state, gradients, metrics["loss"], optimizer, config.optim.clip_norm, first=first
        )
        others_follow = config.grpo.updates > 1 and first
        return state, metrics | step_metrics, logp if others_follow else None

    replicated = NamedSharding(mesh, PartitionSpec())
    return jit_on(
        mesh, update, donate_argnums=0, out_shardings=(state_shardings, replicated, split)
    )


def sft_program(
    mesh: Mesh,
    policy: Policy,
    config: Config,
    optimizer: optax.GradientTransformation,
    state_shardings: TrainState,
) -> Wrapped:
    """(state, frozen weights, prompts, completions [P, 1, C], lengths [P, 1]) -> state, metrics."""

    def sft(
        state: TrainState, frozen: Params, prompt: Prompt, completions: Array, lengths: Array
    ) -> tuple[TrainState, dict[str, Array]]:
        gradients, metrics = sft_gradients(
            policy, state.params, frozen, prompt, completions, lengths, config.optim.accumulate
        )
        state, step_metrics = apply_gradients(
            state, gradients, metrics["loss"], optimizer, config.optim.clip_norm
        )
        return state, metrics | step_metrics

    replicated = NamedSharding(mesh, PartitionSpec())
    return jit_on(mesh, sft, donate_argnums=0, out_shardings=(state_shardings, replicated))


# ---- the shapes they are compiled for ----


def prompt_shapes(mesh: Mesh, vision: VisionConfig, bucket: Size, prompts: int) -> Prompt:
    """The shapes of a batch of prompts in a bucket."""

    def on(dtype: Any, *shape: int) -> jax.ShapeDtypeStruct:
        return shape_on(mesh, PROMPTS, (prompts, *shape), dtype)

    return Prompt(
        tokens=on(np.int32, bucket.tokens),
        positions=on(np.int32, bucket.tokens, 3),
        vision_index=on(np.int32, bucket.tokens),
        length=on(np.int32),
        patches=on(np.uint8, bucket.patches, vision.patch_dim),
        patch_hw=on(np.int32, bucket.patches, 2),
        window_index=on(np.int32, bucket.windows, vision.window_patches),
        frame_index=on(np.int32, bucket.frames, bucket.frame_patches),
    )


def answer_shapes(mesh: Mesh, prompts: int, group: int) -> Answers:
    """The shapes of the answers of a step."""

    def on(dtype: Any, *shape: int) -> Any:
        return shape_on(mesh, PROMPTS, (prompts, group, *shape), dtype)

    return Answers(
        format_ok=on(np.bool_),
        choice=on(np.int32),
        span=on(np.float32, 2),
        number=on(np.float32),
        match=on(np.float32),
        length=on(np.int32),
        custom=on(np.float32),
    )


def truth_shapes(mesh: Mesh, prompts: int, spans: int) -> Truth:
    """The shapes of the ground truth of a step."""

    def on(dtype: Any, *shape: int) -> Any:
        return shape_on(mesh, PROMPTS, (prompts, *shape), dtype)

    return Truth(
        task=on(np.int32),
        choice=on(np.int32),
        spans=on(np.float32, spans, 2),
        number=on(np.float32),
        duration=on(np.float32),
    )


def scalar_shape(mesh: Mesh) -> Any:
    """An int32 that every device holds: a seed or a step number."""
    return shape_on(mesh, PartitionSpec(), (), np.int32)


class WeightPrograms(NamedTuple):
    """What the weights of a run go through, to be compiled, and their shapes with shardings."""

    trained: Params  # float32
    frozen: Params  # in the compute dtype
    optimizer: optax.GradientTransformation
    init: Lowered  # trained -> state
    to_sampler: Lowered  # (trained, frozen) -> the sampler's copy
    to_reference: Lowered | None  # (trained, {}) -> the reference; None: see `reference`
    reference: Params | None  # its shapes; {}: it is what is frozen; None without a KL term


def lower_weights(
    config: Config, mesh: Mesh, policy: Policy, steps: int, *, reference: bool
) -> WeightPrograms:
    """Lowers what happens to the weights before and between the steps."""
    shapes = param_shapes(policy.config, mesh, policy.lora)
    trained, frozen = split_frozen(shapes, config.model.freeze_vision)
    frozen = jax.tree.map(lambda x: x.update(dtype=policy.compute_dtype), frozen)
    to_reference = None
    if reference and not policy.lora.rank:
        to_reference = lower_publish(mesh, policy, trained, {}, RULES)
    kept = to_reference.out_info if to_reference else {}
    optimizer = make_optimizer(config.optim, steps, config.grpo.updates)
    return WeightPrograms(
        trained,
        frozen,
        optimizer,
        init=init_program(mesh, optimizer, trained).lower(trained),
        to_sampler=lower_publish(mesh, policy, trained, frozen),
        to_reference=to_reference,
        reference=kept if reference else None,
    )


class LearnPrograms(NamedTuple):
    """The executables that learn from completions of at most some length."""

    reference: Callable[..., Array] | None
    update: Callable[..., tuple[TrainState, dict[str, Array], Array | None]]
    update_again: Callable[..., tuple[TrainState, dict[str, Array], None]] | None


class TrainPrograms(NamedTuple):
    """The executables of one bucket that GRPO training calls, in the order of a step."""

    rollout: Callable[..., tuple[Rollout, Array | None]]
    learn: Mapping[int, LearnPrograms]  # by length

    def learn_from(self, lengths: np.ndarray) -> int:
        """The length of `learn` for completions of `lengths` int[P, G]: the first that is enough.

        Example: for 128, 256 and 512, completions of [3, 130] and [7, 99] tokens need 256.
        """
        longest = lengths.max()
        return min(length for length in self.learn if length >= longest)


class LoweredLearn(NamedTuple):
    """The same programs, to be compiled."""

    reference: Lowered | None
    update: Lowered
    update_again: Lowered | None  # from the same rollout; None if there is one update only

    def compile(self) -> LearnPrograms:
        reference = self.reference.compile() if self.reference else None
        again = self.update_again.compile() if self.update_again else None
        return LearnPrograms(reference, self.update.compile(), again)


class LoweredTrain(NamedTuple):
    """The same programs, to be compiled."""

    rollout: Lowered
    learn: Mapping[int, LoweredLearn]

    def compile(self) -> TrainPrograms:
        learn = {length: programs.compile() for length, programs in self.learn.items()}
        return TrainPrograms(self.rollout.compile(), learn)


def lower_train(
    config: Config,
    mesh: Mesh,
    policy: Policy,
    bucket: Size,
    weights: WeightPrograms,
    platform: str | None = None,
) -> LoweredTrain:
    """Lowers the rollout and, for each length of completions, the reference pass and the update.

    Args:
      platform: to lower for another one than the mesh's devices: "cuda" on a machine without a GPU.
    """

    def lower(program: Wrapped, *arguments: Any) -> Lowered:
        platforms = None if platform is None else (platform,)
        return program.trace(*arguments).lower(lowering_platforms=platforms)

    state, frozen = weights.init.out_info, weights.frozen
    rollout_section = config.rollout
    p, g, c = rollout_section.prompts, rollout_section.group, rollout_section.max_new_tokens
    sampling = Sampling(
        g, c, rollout_section.temperature, rollout_section.top_p, rollout_section.top_k
    )
    prompt = prompt_shapes(mesh, policy.config.vision, bucket, p)
    scalar = scalar_shape(mesh)

    program = rollout_program(mesh, policy, sampling, config.vision_frozen)
    rollout = lower(program, weights.to_sampler.out_info, prompt, scalar, scalar)
    completions, features = rollout.out_info
    shardings = jax.tree.map(lambda x: x.sharding, state)

    def lower_learn(length: int) -> LoweredLearn:
        reference = None
        if weights.reference is not None:
            kept, program = weights.reference, reference_program(mesh, policy, length)
            reference = lower(program, kept, frozen, prompt, features, completions.tokens)
        batch = UpdateBatch(
            prompt=prompt,
            features=features,
            completions=completions.tokens,
            lengths=completions.lengths,
            finished=completions.finished,
            advantages=shape_on(mesh, PartitionSpec(), (p, g), jnp.float32),
            sampler_logp=completions.sampler_logp,
            old_logp=None,
            ref_logp=reference.out_info if reference else None,
        )
        program = update_program(mesh, policy, config, weights.optimizer, shardings, length)
        update = lower(program, state, frozen, batch)
        old_logp = update.out_info[2]
        if old_logp is None:
            return LoweredLearn(reference, update, None)
        again = lower(program, state, frozen, batch._replace(old_logp=old_logp))
        return LoweredLearn(reference, update, again)

    lengths = (*rollout_section.length_buckets, c)
    return LoweredTrain(rollout, {length: lower_learn(length) for length in lengths})


def compile_sft(
    config: Config,
    mesh: Mesh,
    policy: Policy,
    bucket: Size,
    weights: WeightPrograms,
) -> Callable[..., tuple[TrainState, dict[str, Array]]]:
    """Compiles the supervised step for one bucket, with one completion per prompt."""
    state = weights.init.out_info
    prompts, length = config.sft.batch, config.rollout.max_new_tokens
    shardings = jax.tree.map(lambda x: x.sharding, state)
    return (
        sft_program(mesh, policy, config, weights.optimizer, shardings)
        .lower(
            state,
            weights.frozen,
            prompt_shapes(mesh, policy.config.vision, bucket, prompts),
            shape_on(mesh, PROMPTS, (prompts, 1, length), np.int32),
            shape_on(mesh, PROMPTS, (prompts, 1), np.int32),
        )
        .compile()
    )
