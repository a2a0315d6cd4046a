"""The executables of a run: how many, for which shapes, and a whole step through them."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from data.records import TASKS
from jaxgrpo.config import (
    Config,
    DataSection,
    GrpoSection,
    MeshSection,
    ModelSection,
    OptimSection,
    RolloutSection,
)
from jaxgrpo.metrics import CompileCounter
from jaxgrpo.policy import Params
from jaxgrpo.programs import (
    TrainPrograms,
    answer_shapes,
    cache_compilations,
    init_program,
    lower_train,
    lower_weights,
    prompt_shapes,
    publish_program,
    score_program,
    truth_shapes,
)
from jaxgrpo.rollout import Rollout
from jaxgrpo.sharding import (
    SAMPLER_RULES,
    make_mesh,
    param_shardings,
    put_global,
    put_prompts,
    put_scalar,
)
from jaxgrpo.update import TrainState, UpdateBatch, make_optimizer, split_frozen
from models.attention_backend import Backend
from models.qwen2_5_vl.processor import Prompt, collate
from rewards.answers import Answers
from rewards.dual import Truth
from rewards.reward import Reward
from rewards.weights import RewardWeights
from tests.jaxgrpo.cases import (
    LAYOUTS,
    PAD,
    TEMPERATURE,
    VOCAB,
    SmallModel,
    bucket_of,
    fast_jit,
    small_model,
)
from tests.oracle.prompts import random_prompt

P, G, C = 2, 3, 4
SHORT = 2  # tokens of the other length that programs are made for
CONFIG = Config(
    run_dir="unused",
    model=ModelSection(
        path="unused", compute_dtype="float32", freeze_vision=True, logit_chunk=3, attention_chunk=5
    ),
    data=DataSection(train="unused"),
    rollout=RolloutSection(P, G, C, TEMPERATURE, length_buckets=(SHORT,)),
    grpo=GrpoSection(kl=0.05, entropy=0.01),
    optim=OptimSection(learning_rate=1e-2),
)


class Run(NamedTuple):
    """What `jaxgrpo train` holds between its steps."""

    small: SmallModel
    mesh: Mesh
    programs: TrainPrograms
    compilations: CompileCounter
    reference: Params  # of the trained weights
    frozen: Params
    prompt: Prompt
    prompts: list[Prompt]

    def start(self) -> tuple[TrainState, Params]:
        """(state, the sampler's weights) before the first step; updates donate their state."""
        optimizer = make_optimizer(CONFIG.optim, 10)
        trained = jax.tree.map(jnp.copy, self.reference)
        state = init_program(self.mesh, optimizer, trained)(trained)
        return state, self.publish(state)

    def publish(self, state: TrainState) -> Params:
        layout = param_shardings(self.small.policy.config, self.mesh, SAMPLER_RULES)
        return publish_program(self.small.policy, layout)(state.params, self.frozen)

    def rollout(self, sampler: Params, seed: int, step: int) -> tuple[Rollout, Any]:
        return self.programs.rollout(
            sampler, self.prompt, put_scalar(self.mesh, seed), put_scalar(self.mesh, step)
        )

    def batch(self, rollout: Rollout, features: Any, advantages: Any) -> UpdateBatch:
        reference = self.programs.learn[C].reference
        assert reference is not None
        return UpdateBatch(
            prompt=self.prompt,
            features=features,
            completions=rollout.tokens,
            lengths=rollout.lengths,
            finished=rollout.finished,
            advantages=put_prompts(self.mesh, np.asarray(advantages, np.float32)),
            sampler_logp=rollout.sampler_logp,
            old_logp=None,
            ref_logp=reference(self.reference, self.frozen, self.prompt, features, rollout.tokens),
        )


ADVANTAGES = [[1.0, -0.5, -0.5], [0.0, 0.7, -0.7]]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    small = small_model(tmp_path_factory.mktemp("model"), tied=True)
    small = small._replace(
        policy=small.policy._replace(remat="layer", logit_chunk=3, backend=Backend(chunk=5))
    )
    mesh = make_mesh(MeshSection(data=1), jax.devices()[:1])
    shardings = param_shardings(small.policy.config, mesh)
    params = jax.tree.map(lambda x, s: put_global(np.asarray(x), s), small.params, shardings)
    trained, frozen = split_frozen(params, True)
    weights = lower_weights(CONFIG, mesh, small.policy, 10, reference=True)
    assert weights.to_reference is not None
    reference = weights.to_reference.compile()(trained, {})

    rng = np.random.default_rng(1)
    prompts = [random_prompt(rng, layout, vocab=VOCAB) for layout in LAYOUTS[:P]]
    bucket = bucket_of(prompts)
    with CompileCounter() as compilations:
        programs = lower_train(CONFIG, mesh, small.policy, bucket, weights).compile()
    prompt = put_prompts(mesh, collate(prompts, bucket, PAD))
    return Run(small, mesh, programs, compilations, reference, frozen, prompt, prompts)


def leaves(tree: Any) -> list[np.ndarray]:
    return [np.array(x) for x in jax.tree.leaves(tree)]


# ---- the cache ----


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("", None),
        ("/shared/compiled", "/shared/compiled"),
        ("~/compiled", "/home/me/compiled"),
        ("{run_dir}/compiled", "gs://bucket/runs/1/compiled"),
    ],
)
def test_compiled_programs_are_kept_where_the_config_says(
    path: str, expected: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    updates: dict[str, Any] = {}
    monkeypatch.setattr(jax.config, "update", updates.__setitem__)
    monkeypatch.setenv("HOME", "/home/me")
    model, data = ModelSection("m"), DataSection(train="t")
    cache_compilations(Config("gs://bucket/runs/1", model, data, compilation_cache=path))
    assert updates.get("jax_compilation_cache_dir") == expected


# ---- executables ----


def test_a_bucket_costs_a_rollout_and_for_each_length_two_executables(run: Run) -> None:
    assert run.compilations.counts == {"jit(rollout)": 1, "jit(reference)": 2, "jit(update)": 2}


def test_the_longest_completion_chooses_the_programs_that_learn(run: Run) -> None:
    for longest, expected in ((1, SHORT), (SHORT, SHORT), (SHORT + 1, C), (C, C)):
        lengths = np.full((P, G), 1, np.int32)
        lengths[1, 2] = longest
        assert run.programs.learn_from(lengths) == expected


def test_an_executable_refuses_shapes_that_were_not_foreseen(run: Run) -> None:
    """Instead of compiling for them, as `jax.jit` would."""
    _, sampler = run.start()
    bucket = bucket_of(run.prompts, slack=5)
    longer = put_prompts(run.mesh, collate(run.prompts, bucket, PAD))
    scalar = put_scalar(run.mesh, 0)
    with pytest.raises(TypeError, match="compiled"):
        run.programs.rollout(sampler, longer, scalar, scalar)


def test_the_shapes_of_prompts_are_those_that_collate_makes(run: Run) -> None:
    bucket = bucket_of(run.prompts)
    foreseen = prompt_shapes(run.mesh, run.small.policy.config.vision, bucket, P)
    for field, shape, array in zip(Prompt._fields, foreseen, run.prompt, strict=True):
        assert (shape.shape, shape.dtype) == (array.shape, array.dtype), field
        assert array.sharding.is_equivalent_to(shape.sharding, array.ndim), field


# ---- rollout ----


def test_draws_are_a_function_of_seed_and_step(run: Run) -> None:
    _, sampler = run.start()
    first, again, other_step, other_seed = (
        np.asarray(run.rollout(sampler, *key)[0].tokens) for key in ((1, 2), (1, 2), (1, 3), (2, 2))
    )
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other_step)
    assert not np.array_equal(first, other_seed)
    assert not np.array_equal(other_step, other_seed)


def test_features_leave_the_rollout_when_the_tower_is_frozen(run: Run) -> None:
    _, sampler = run.start()
    _, features = run.rollout(sampler, 0, 0)
    encode = fast_jit(lambda params, prompt: run.small.policy.merge(params).encode_vision(prompt))
    expected = encode(run.reference | run.frozen, run.prompt)
    np.testing.assert_allclose(features, expected, rtol=1e-4, atol=1e-4)


# ---- steps ----


def test_the_first_step_is_on_policy_and_the_next_leaves_the_reference(run: Run) -> None:
    """No ratio to clip, no KL and no gap to the sampler at first; then a KL."""
    state, sampler = run.start()
    kls = []
    for step in range(2):
        rollout, features = run.rollout(sampler, 0, step)
        batch = run.batch(rollout, features, ADVANTAGES)
        state, metrics, _ = run.programs.learn[C].update(state, run.frozen, batch)
        sampler = run.publish(state)
        assert not metrics.keys() & {"ratio", "clip_low", "clip_high"}
        assert float(metrics["sampler_gap"]) < 1e-5
        assert int(metrics["skipped_in_a_row"]) == 0 and float(metrics["grad_norm"]) > 0
        kls.append(float(metrics["kl"]))
    assert kls[0] == pytest.approx(0.0, abs=1e-9)
    assert kls[1] > 1e-4


def test_updates_donate_their_state_but_leave_reference_and_frozen_weights(run: Run) -> None:
    """The reference is a copy: donating the weights must not take its buffers along."""
    before = leaves(run.reference)
    state, sampler = run.start()
    batch = run.batch(*run.rollout(sampler, 0, 0), ADVANTAGES)
    after, _, _ = run.programs.learn[C].update(state, run.frozen, batch)
    assert all(x.is_deleted() for x in jax.tree.leaves(state.params))
    assert after.params.keys() == {"text"}
    for old, now in zip(before, leaves(run.reference), strict=True):
        np.testing.assert_array_equal(old, now)
    moved = [
        np.abs(a - b).max()
        for a, b in zip(leaves(after.params), leaves(run.reference), strict=True)
    ]
    assert min(moved) > 0


def test_likely_is_what_was_rewarded(run: Run) -> None:
    """After ten updates on the same rollout: what had a positive advantage is likelier."""
    state, sampler = run.start()
    rollout, features = run.rollout(sampler, 0, 0)
    batch = run.batch(rollout, features, ADVANTAGES)
    for _ in range(10):
        state, _, _ = run.programs.learn[C].update(state, run.frozen, batch)
    reference = run.programs.learn[C].reference
    assert reference is not None
    logp = reference(state.params, run.frozen, run.prompt, features, rollout.tokens)
    mask = np.arange(C) < np.asarray(rollout.lengths)[..., None]
    gained = (mask * (np.asarray(logp) - np.asarray(batch.ref_logp))).sum(-1)
    gained -= gained.mean(axis=1, keepdims=True)
    assert np.sum(gained * np.array(ADVANTAGES)) > 0.1


def test_a_non_finite_step_is_skipped_in_the_compiled_update_too(run: Run) -> None:
    state, sampler = run.start()
    rollout, features = run.rollout(sampler, 0, 0)
    bad = run.batch(rollout, features, [[np.nan, 0.0, 0.0], [0.0, 0.7, -0.7]])
    before = leaves((state.params, state.opt_state))
    state, metrics, _ = run.programs.learn[C].update(state, run.frozen, bad)
    assert int(metrics["skipped_in_a_row"]) == 1 and int(state.skipped) == 1
    for old, now in zip(before, leaves((state.params, state.opt_state)), strict=True):
        assert old.tobytes() == now.tobytes()
    good = run.batch(rollout, features, ADVANTAGES)
    state, metrics, _ = run.programs.learn[C].update(state, run.frozen, good)
    assert int(metrics["skipped_in_a_row"]) == 0 and int(state.skipped) == 0


def test_a_second_step_compiles_nothing(run: Run) -> None:
    state, sampler = run.start()
    for step in range(2):
        with CompileCounter() as compilations:
            rollout, features = run.rollout(sampler, 0, step)
            batch = run.batch(rollout, features, ADVANTAGES)
            state, _, _ = run.programs.learn[C].update(state, run.frozen, batch)
    assert compilations.total == 0


# ---- the smaller programs ----


def test_the_sampler_gets_the_weights_in_the_compute_dtype(run: Run) -> None:
    policy = run.small.policy._replace(compute_dtype=jnp.dtype("bfloat16"))
    layout = param_shardings(policy.config, run.mesh, SAMPLER_RULES)
    sampler = publish_program(policy, layout)(run.reference, run.frozen)
    masters = run.reference | run.frozen
    assert sampler.keys() == masters.keys()
    for ours, master in zip(leaves(sampler), leaves(masters), strict=True):
        np.testing.assert_array_equal(ours, master.astype(jnp.bfloat16))


def test_scores_become_rewards_and_advantages(run: Run) -> None:
    """A choice question of which one answer is right, and a span question all answer alike."""
    nothing = np.full((P, G), np.nan, np.float32)
    answers = Answers(
        format_ok=np.ones((P, G), bool),
        choice=np.array([[0, 1, 2], [-1, -1, -1]], np.int32),
        span=np.array([[[np.nan] * 2] * G, [[2.0, 6.0]] * G], np.float32),
        number=nothing,
        match=np.zeros((P, G), np.float32),
        length=np.ones((P, G), np.int32),
        custom=np.zeros((P, G), np.float32),
    )
    truth = Truth(
        choice=np.array([1, -1], np.int32),
        spans=np.array([[[np.nan] * 2], [[0.0, 4.0]]], np.float32),
        task=np.array([TASKS.index("mcqa"), TASKS.index("tvg")], np.int32),
        number=nothing[:, 0],
        duration=nothing[:, 0],
    )
    program = score_program(
        run.mesh, Reward(RewardWeights(0.5, 1.0, 2.0), thinking=True), divide_by_std=True
    )
    compiled = program.lower(answer_shapes(run.mesh, P, G), truth_shapes(run.mesh, P, 1)).compile()
    scores = compiled(*put_prompts(run.mesh, (answers, truth)))
    np.testing.assert_allclose(scores.total, [[0.5, 1.5, 0.5], [0.5 + 2.0 / 3] * 3], rtol=1e-6)
    np.testing.assert_allclose(
        scores.advantages, [[-(3**-0.5), 2 * 3**-0.5, -(3**-0.5)], [0, 0, 0]], atol=1e-5
    )
    np.testing.assert_array_equal(scores.zero_variance, [False, True])
    np.testing.assert_array_equal(scores.components["choice"][0], [0, 1, 0])
