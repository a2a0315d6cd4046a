"""Our side: the programs that `jaxgrpo train` calls, in its order."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.grpo.measure import Stopwatch, peak_rss_gib
from benchmarks.grpo.workload import PAD, Workload
from data.records import Record
from jaxgrpo.config import Config, DataSection, GrpoSection, ModelSection, RolloutSection
from jaxgrpo.flops import Step, rollout_flops, update_flops
from jaxgrpo.load import choose_backend, load_params, make_policy
from jaxgrpo.policy import Policy, Vocabulary
from jaxgrpo.programs import (
    answer_shapes,
    lower_train,
    lower_weights,
    score_program,
    truth_shapes,
)
from jaxgrpo.scoring import open_reward
from jaxgrpo.sharding import make_mesh, param_shardings, put_prompts, put_scalar
from jaxgrpo.update import UpdateBatch, split_frozen
from models.layers import Remat
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.processor import collate

# Rewards are of written answers: the tokens of a random model say nothing.
THOUGHT = "the red square enters from the left and stays until the blue one comes " * 4
RECORD = Record("q", "v.mp4", "gqa", "?", ("a", "b"), "B", ((2.0, 6.0),), 32.0)


def written(group: int) -> list[str]:
    """G completions of about 60 words."""
    answer = '{{"option": "{}", "start_time": "{}", "end_time": "{}"}}'
    return [
        f"<think>{THOUGHT}</think><answer>{answer.format('AB'[g % 2], g, g + 4)}</answer>"
        for g in range(group)
    ]


def settings(workload: Workload, directory: Path) -> Config:
    remat: Remat = "layer" if workload.remat else "products"
    dtype: Any = workload.dtype
    # Other libraries' model of text has no vision tower: ours has one that is neither used nor kept
    # in the optimiser.
    model = ModelSection(
        str(directory), compute_dtype=dtype, remat=remat, freeze_vision=workload.video is None
    )
    rollout = RolloutSection(prompts=1, group=workload.group, max_new_tokens=workload.length)
    data = DataSection(train="-", eval="-")
    return Config("-", model, data, rollout=rollout, grpo=GrpoSection(kl=0.0, entropy=0.0))


def vocabulary(workload: Workload) -> Vocabulary:
    """All ids but the first ones, none of which ends a completion."""
    return Vocabulary(np.arange(workload.vocab) >= workload.unusable, (), PAD)


def run(workload: Workload, directory: Path, steps: int) -> Iterator[dict[str, Any]]:
    """First what is needed to judge the times, then one dict per step."""
    config = settings(workload, directory)
    model_config = ModelConfig.load(directory)
    mesh = make_mesh(config.mesh, jax.devices()[:1])
    backend = choose_backend(config.model, jax.devices()[0].platform)
    ids = vocabulary(workload)
    policy = make_policy(config.model, model_config, ids, backend, temperature=1.0)
    prompts = [
        put_prompts(mesh, collate([prompt], prompt.size, PAD))
        for prompt in (workload.prompt(seed) for seed in range(steps + 1))
    ]

    # ---- programs ----
    begun = time.perf_counter()
    weights = lower_weights(config, mesh, policy, steps + 1, reference=False)
    size = workload.prompt(0).size
    programs = lower_train(config, mesh, policy, size, weights).compile()
    first_token = _rollout_of(1, config, mesh, policy, size, weights)
    to_sampler = weights.to_sampler.compile()
    shapes = answer_shapes(mesh, 1, workload.group), truth_shapes(mesh, 1, 1)
    reward = open_reward(config)
    score = score_program(mesh, reward, divide_by_std=True).lower(*shapes).compile()
    compiled = time.perf_counter() - begun

    params = load_params(directory, model_config, param_shardings(model_config, mesh))
    trained, frozen = split_frozen(params, config.model.freeze_vision)
    state = weights.init.compile()(trained)
    del params, trained
    sampler = to_sampler(state.params, frozen)
    seed = put_scalar(mesh, 0)
    texts = [written(workload.group)]

    def update(
        completions: Any, logp: Any, advantages: Any, prompt: Any, features: Any
    ) -> dict[str, float]:
        nonlocal state, sampler
        batch = UpdateBatch(
            prompt=prompt,
            features=features,
            completions=completions,
            lengths=jnp.full((1, workload.group), workload.length, jnp.int32),
            finished=jnp.zeros((1, workload.group), bool),
            advantages=advantages,
            sampler_logp=logp,
            old_logp=None,
            ref_logp=None,
        )
        del sampler
        state, metrics, _ = programs.learn[workload.length].update(state, frozen, batch)
        sampler = to_sampler(state.params, frozen)
        found = jax.device_get(metrics)
        jax.block_until_ready(sampler)
        return {name: float(value) for name, value in found.items()}

    # ---- one step on given completions: every side must find the same gradient ----
    rollout, features = programs.rollout(sampler, prompts[0], seed, put_scalar(mesh, 0))
    given = jax.device_put(workload.completions(0)[None], rollout.tokens.sharding)
    advantages = jax.device_put(workload.advantages()[None], jax.tree.leaves(rollout)[0].sharding)
    known = update(given, rollout.sampler_logp, advantages, prompts[0], features)
    step = Step(
        size, 1, workload.group, workload.length, config.model.logit_chunk, backend,
        config.model.remat,
    )  # fmt: skip
    yield {
        "grad_norm": known["grad_norm"],
        "compile_seconds": compiled,
        "device": jax.devices()[0].device_kind,
        "decode_bytes": decode_bytes(workload, model_config),
        "first_token_seconds": [_time_of(first_token, sampler, prompts[0], seed) for _ in range(3)],
        "flops": {
            "rollout": rollout_flops(model_config, step).total,
            "update": update_flops(model_config, step).total,
        },
        "machine": machine(workload.dtype),
    }

    # ---- the steps ----
    for number in range(1, steps + 1):
        watch = Stopwatch()
        rollout, features = programs.rollout(
            sampler, prompts[number], seed, put_scalar(mesh, number)
        )
        lengths = jax.device_get((rollout.tokens, rollout.lengths))[1]
        watch.phase("rollout")
        answers = reward.read(texts, [RECORD], lengths)
        scores = score(*put_prompts(mesh, (answers, reward.truth([RECORD], 1))))
        watch.phase("rewards")
        update(rollout.tokens, rollout.sampler_logp, scores.advantages, prompts[number], features)
        watch.phase("update")
        assert int(np.min(lengths)) == workload.length
        yield watch.result() | {"gib": peak_gib()}


def _rollout_of(tokens: int, config: Config, mesh: Any, policy: Policy, size: Any, weights: Any):  # type: ignore[no-untyped-def]
    """The rollout of fewer tokens, to tell decoding from what comes before it."""
    import dataclasses

    short = dataclasses.replace(config.rollout, max_new_tokens=tokens)
    config = dataclasses.replace(config, rollout=short)
    return lower_train(config, mesh, policy, size, weights).rollout.compile()


def _time_of(program: Any, *arguments: Any) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(program(*arguments, arguments[-1]))
    return time.perf_counter() - begun


def decode_bytes(workload: Workload, config: ModelConfig) -> int:
    """Bytes that one token of G completions must read: text weights, prompt and own caches."""
    size = np.dtype(jnp.dtype(workload.dtype)).itemsize
    text = config.text
    heads = 2 * text.heads + 2 * text.kv_heads
    layer = text.width * (heads * text.head_dim + 3 * text.mlp_width)
    weights = text.layers * layer + text.vocab * text.width
    tokens = workload.prompt(0).size.tokens + workload.group * workload.length // 2
    return size * (weights + 2 * text.layers * tokens * text.kv_heads * text.head_dim)


def machine(dtype: str) -> dict[str, float]:
    """What this device does at best: FLOP/s of a product and bytes/s of a copy, measured."""
    on_cpu = jax.default_backend() == "cpu"
    side, length = (2048, 2**26) if on_cpu else (8192, 2**28)
    a = jnp.ones((side, side), dtype)
    x = jnp.ones(length, jnp.float32)
    product = jax.jit(lambda a: a @ a)
    copy = jax.jit(lambda x: x + 1)
    for function, argument in ((product, a), (copy, x)):
        jax.block_until_ready(function(argument))
    seconds = [min(_once(f, y) for _ in range(5)) for f, y in ((product, a), (copy, x))]
    return {"flops": 2 * side**3 / seconds[0], "bytes": 2 * 4 * length / seconds[1]}


def _once(function: Any, argument: Any) -> float:
    begun = time.perf_counter()
    jax.block_until_ready(function(argument))
    return time.perf_counter() - begun


def peak_gib() -> float:
    """The most memory in use so far: on the device, or of the process on a CPU."""
    if jax.default_backend() == "cpu":
        return peak_rss_gib()
    return float(jax.devices()[0].memory_stats()["peak_bytes_in_use"]) / 2**30
