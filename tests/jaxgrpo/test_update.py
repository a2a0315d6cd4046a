"""The update against PyTorch: GRPO gradients of a whole step, AdamW, and what must not matter."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import cache
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch

import jaxgrpo.policy
import jaxgrpo.update
from jaxgrpo.config import GrpoSection, OptimSection
from jaxgrpo.policy import Params, Policy
from jaxgrpo.update import (
    UpdateBatch,
    apply_gradients,
    grpo_gradients,
    init_state,
    learning_rate_schedule,
    make_optimizer,
    sft_gradients,
    split_frozen,
)
from models.attention_backend import Backend, Kernel
from models.layers import Remat
from models.qwen2_5_vl.positions import Grid
from models.qwen2_5_vl.weights import TABLE, released_tensors
from tests.jaxgrpo.cases import (
    LAYOUTS,
    TEMPERATURE,
    USABLE,
    SmallModel,
    fast_jit,
    objective,
    random_groups,
    relative_differences,
    repeated,
    small_model,
    tree_differences,
    update_batch,
)
from tests.oracle import torch_grpo
from tests.oracle.torch_grpo import Group

Aggregation = Literal["sequence", "token", "constant"]
Result = tuple[Params, dict[str, jax.Array]]
GRADIENT_TOLERANCE = 1e-4  # norm of the difference / norm, of every tensor
WIDTH = 7


def section(aggregation: Aggregation, **knobs: Any) -> GrpoSection:
    """Every term of the loss at work, the two clips of different widths."""
    return GrpoSection(
        clip_low=0.2, clip_high=0.28, kl=0.05, entropy=0.01, aggregation=aggregation, **knobs
    )


class Step(NamedTuple):
    """A model, a step's data for both sides, and the original's verdict."""

    small: SmallModel
    config: GrpoSection
    groups: list[Group]
    batch: UpdateBatch
    loss: torch_grpo.Loss
    gradients: dict[str, np.ndarray]  # by released name


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], SmallModel]:
    return cache(lambda tied: small_model(tmp_path_factory.mktemp("model"), tied=tied))


@pytest.fixture(scope="module")
def step(small: Callable[[bool], SmallModel]) -> Callable[..., Step]:
    @cache
    def make(
        tied: bool, aggregation: Aggregation, width: int = WIDTH, prompts: int = 4, **knobs: Any
    ) -> Step:
        model, config = small(tied), section(aggregation, **knobs)
        groups = random_groups(model, group=4, width=width, seed=2, layouts=LAYOUTS[:prompts])
        loss = torch_grpo.grpo_loss(model.original, groups, objective(config, width))
        gradients = torch_grpo.gradients(model.original, loss.value)
        return Step(model, config, groups, update_batch(groups, width), loss, gradients)

    return make


@pytest.fixture(scope="module")
def heavy(step: Callable[..., Step]) -> Step:
    return step(False, "token")


@pytest.fixture(scope="module")
def heavy_result(heavy: Step) -> Result:
    return our_gradients(heavy.small.policy, heavy.small.params, {}, heavy.batch, heavy.config)


def our_gradients(
    policy: Policy,
    params: Params,
    frozen: Params,
    batch: UpdateBatch,
    config: GrpoSection,
    accumulate: int = 1,
    length: int | None = None,
) -> Result:
    def compute(params: Params, frozen: Params, batch: UpdateBatch) -> Result:
        gradients, metrics, _ = grpo_gradients(
            policy, params, frozen, batch, config, accumulate, length
        )
        return gradients, metrics

    return fast_jit(compute)(params, frozen, batch)


def assert_equals_torch(step: Step, result: Result) -> None:
    """The comparison of the whole step; the mutations below must not pass it."""
    gradients, metrics = result
    differences = relative_differences(gradients, step.gradients, step.small.policy.config)
    too_far = {name: d for name, d in differences.items() if not d <= GRADIENT_TOLERANCE}
    assert not too_far
    np.testing.assert_allclose(metrics["loss"], step.loss.value.item(), rtol=1e-4, atol=1e-6)


def assert_same(ours: Result, theirs: Result, tolerance: float) -> None:
    too_far = {k: d for k, d in tree_differences(ours[0], theirs[0]).items() if not d <= tolerance}
    assert not too_far
    for name in theirs[1]:
        np.testing.assert_allclose(
            ours[1][name], theirs[1][name], rtol=max(tolerance, 1e-6), atol=1e-6, err_msg=name
        )


# ---- gradients of a whole step against torch autograd ----


def test_the_step_is_a_hard_one(heavy: Step) -> None:
    assert heavy.loss.clipped_low >= 0.1 and heavy.loss.clipped_high >= 0.1
    assert heavy.loss.kl > 0.01 and heavy.loss.entropy > 0.1
    assert len({len(completion) for group in heavy.groups for completion in group.completions}) > 3
    assert len({group.prompt.size for group in heavy.groups}) == 4
    assert all(np.linalg.norm(g) > 0 for g in heavy.gradients.values())


def test_gradients_equal_torch_autograd(heavy: Step, heavy_result: Result) -> None:
    assert_equals_torch(heavy, heavy_result)
    metrics = heavy_result[1]
    for ours, theirs in {
        "kl": heavy.loss.kl,
        "entropy": heavy.loss.entropy,
        "clip_low": heavy.loss.clipped_low,
        "clip_high": heavy.loss.clipped_high,
    }.items():
        np.testing.assert_allclose(metrics[ours], theirs, rtol=1e-4, err_msg=ours)


@pytest.mark.parametrize(
    ("tied", "aggregation"), [(True, "sequence"), (False, "constant")], ids=str
)
def test_gradients_equal_torch_autograd_in_every_aggregation(
    step: Callable[..., Step], tied: bool, aggregation: Aggregation
) -> None:
    light = step(tied, aggregation, width=5, prompts=2)
    result = our_gradients(light.small.policy, light.small.params, {}, light.batch, light.config)
    assert_equals_torch(light, result)


KNOBS = {"dual_clip": 1.05, "importance_cap": 1.2, "mask_truncated": True}


@pytest.mark.parametrize("aggregation", ["sequence", "token", "constant"])
def test_gradients_equal_torch_autograd_with_every_knob(
    step: Callable[..., Step], aggregation: Aggregation
) -> None:
    light = step(True, aggregation, width=5, prompts=2, **KNOBS)
    assert min(light.loss.clipped_twice, light.loss.capped) > 0
    assert 0 < sum(int(group.finished.sum()) for group in light.groups) < 8
    result = our_gradients(light.small.policy, light.small.params, {}, light.batch, light.config)
    assert_equals_torch(light, result)
    np.testing.assert_allclose(result[1]["dual_clip"], light.loss.clipped_twice, rtol=1e-5)
    np.testing.assert_allclose(result[1]["importance_capped"], light.loss.capped, rtol=1e-5)


def test_where_all_completions_are_cut_off_nothing_is_learnt(little: Step) -> None:
    none = little.batch._replace(finished=np.zeros_like(little.batch.finished))
    config = dataclasses.replace(little.config, mask_truncated=True)
    gradients, metrics = our_gradients(little.small.policy, little.small.params, {}, none, config)
    assert all(not np.any(np.asarray(g)) for g in jax.tree.leaves(gradients))
    assert float(metrics["loss"]) == 0.0


def test_log_probabilities_come_out_by_row_from_micro_batches_too(
    little: Step, heavy: Step
) -> None:
    """Those of the first update are the old ones of those that follow: their ratio is 1."""
    small, batch, config = heavy.small, heavy.batch, heavy.config

    def logp(accumulate: int) -> Any:
        def compute(params: Params) -> Any:
            return grpo_gradients(small.policy, params, {}, batch, config, accumulate)[2]

        return fast_jit(compute)(small.params)

    whole, parts = logp(1), logp(2)
    mask = np.arange(WIDTH) < batch.lengths[..., None]
    np.testing.assert_allclose(np.where(mask, parts, 0), np.where(mask, whole, 0), atol=1e-5)
    again = our_gradients(small.policy, small.params, {}, batch._replace(old_logp=whole), config)
    first = our_gradients(small.policy, small.params, {}, batch._replace(old_logp=None), config)
    assert float(again[1]["ratio"]) == pytest.approx(1.0, abs=1e-5)
    assert max(tree_differences(again[0], first[0]).values()) < 1e-4


def test_every_weight_of_the_table_gets_a_gradient(heavy: Step, heavy_result: Result) -> None:
    """So that comparing all tensors means comparing all weights."""
    named = dict(released_tensors(heavy_result[0], heavy.small.policy.config))
    for row in TABLE:
        assert np.linalg.norm(named[row.theirs.format(n=0)]) > 0


def test_one_token_completions_teach_through_the_last_prompt_position(
    step: Callable[..., Step],
) -> None:
    """C = 1: no completion token is ever read, so all gradient passes through the prompt."""
    one = step(False, "token", width=1, prompts=2)
    result = our_gradients(one.small.policy, one.small.params, {}, one.batch, one.config)
    assert_equals_torch(one, result)
    vision = jax.tree.leaves(result[0]["vision"])
    assert all(float(jnp.linalg.norm(g)) > 1e-4 for g in vision)


def test_sft_gradients_equal_torch_cross_entropy(step: Callable[..., Step]) -> None:
    light = step(True, "sequence", width=5, prompts=2)
    policy, batch = light.small.policy, light.batch
    loss = torch_grpo.cross_entropy(light.small.original, light.groups, TEMPERATURE, USABLE)
    expected = light._replace(
        loss=light.loss._replace(value=loss),
        gradients=torch_grpo.gradients(light.small.original, loss),
    )

    def compute(params: Params) -> Result:
        return sft_gradients(policy, params, {}, batch.prompt, batch.completions, batch.lengths)

    result = fast_jit(compute)(light.small.params)
    assert_equals_torch(expected, result)


# ---- tests of the tests: a broken loss must not pass the comparison ----


@pytest.fixture(scope="module")
def little(step: Callable[..., Step]) -> Step:
    return step(True, "sequence", width=5, prompts=2)


@pytest.mark.parametrize("mutation", ["advantage sign swapped", "KL dropped", "targets off by one"])
def test_a_broken_loss_fails_the_comparison(
    little: Step, mutation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, log_probs = jaxgrpo.update.grpo_loss, jaxgrpo.policy.token_log_probs
    if mutation == "targets off by one":
        # By one within the completion's tokens, so that padding is no give-away.
        monkeypatch.setattr(
            jaxgrpo.policy,
            "token_log_probs",
            lambda model, hidden, tokens, *rest: log_probs(
                model, hidden, jnp.maximum(jnp.roll(tokens, -1, axis=-1), 6), *rest
            ),
        )
    else:
        change: Callable[[Any], Any] = {
            "advantage sign swapped": lambda x: x._replace(advantages=-x.advantages),
            "KL dropped": lambda x: x._replace(ref_logp=None),
        }[mutation]
        monkeypatch.setattr(
            jaxgrpo.update,
            "grpo_loss",
            lambda logp, entropy, inputs, config: loss(logp, entropy, change(inputs), config),
        )
    result = our_gradients(
        little.small.policy, little.small.params, {}, little.batch, little.config
    )
    differences = relative_differences(result[0], little.gradients, little.small.policy.config)
    assert min(differences.values()) > 100 * GRADIENT_TOLERANCE
    with pytest.raises(AssertionError):
        assert_equals_torch(little, result)


# ---- what must not matter ----


def test_a_shared_prompt_equals_repeated_prompts(heavy: Step, heavy_result: Result) -> None:
    """P prompts with G completions, and P * G prompts with one completion each."""
    small = heavy.small
    result = our_gradients(small.policy, small.params, {}, repeated(heavy.batch), heavy.config)
    assert_same(result, heavy_result, 3e-5)


def test_accumulation_equals_one_batch(heavy: Step, heavy_result: Result) -> None:
    """Micro-batches hold different numbers of tokens: only the whole batch's count is right."""
    small = heavy.small
    tokens = heavy.batch.lengths.sum(axis=1)
    assert tokens[0::2].sum() != tokens[1::2].sum()
    result = our_gradients(small.policy, small.params, {}, heavy.batch, heavy.config, accumulate=2)
    assert_same(result, heavy_result, 5e-6)


@pytest.mark.parametrize("aggregation", ["sequence", "constant"])
def test_cutting_behind_the_longest_completion_changes_nothing(
    heavy: Step, aggregation: Aggregation
) -> None:
    length = WIDTH - 2
    assert heavy.batch.lengths.max() > length
    batch = heavy.batch._replace(lengths=np.minimum(heavy.batch.lengths, length))
    small, config = heavy.small, section(aggregation)
    whole, cut = (
        our_gradients(small.policy, small.params, {}, batch, config, length=n)
        for n in (None, length)
    )
    assert_same(cut, whole, 3e-5)


@pytest.mark.parametrize("remat", ["products", "layer"])
def test_chunks_of_logits_and_recomputation_change_nothing(
    heavy: Step, heavy_result: Result, remat: Remat
) -> None:
    policy = heavy.small.policy._replace(logit_chunk=3, backend=Backend(chunk=5), remat=remat)
    assert heavy.batch.completions.shape[2] % policy.logit_chunk
    result = our_gradients(policy, heavy.small.params, {}, heavy.batch, heavy.config)
    assert_same(result, heavy_result, 3e-5)


@pytest.mark.parametrize(
    ("kernel", "remat"),
    [
        ("splash", "none"),
        ("splash", "products"),
        ("splash", "layer"),
        ("cudnn", "products"),
        ("cudnn", "layer"),
    ],
)
def test_kernels_of_attention_change_nothing(
    heavy: Step, heavy_result: Result, kernel: Kernel, remat: Remat
) -> None:
    """What TPUs and GPUs run, emulated: all gradients of the whole model, vision tower included.

    Softmax by blocks and scaled queries round elsewhere: 1.3e-5 was seen.
    """
    policy = heavy.small.policy._replace(backend=Backend(kernel, emulated=True), remat=remat)
    result = our_gradients(policy, heavy.small.params, {}, heavy.batch, heavy.config)
    assert_same(result, heavy_result, 3e-5)


def test_a_frozen_tower_gets_no_gradient_and_no_optimiser_state(
    heavy: Step, heavy_result: Result
) -> None:
    """Its features, made once outside, give the loss and the text gradients of the whole."""
    small = heavy.small
    trained, frozen = split_frozen(small.params, freeze_vision=True)
    assert trained.keys() == {"text"} and frozen.keys() == {"vision"}
    features = fast_jit(lambda p: small.policy.merge(p).encode_vision(heavy.batch.prompt))(
        small.params
    )
    batch = heavy.batch._replace(features=features)
    result = our_gradients(small.policy, trained, frozen, batch, heavy.config)
    gradients, metrics = heavy_result
    assert_same(result, ({"text": gradients["text"]}, metrics), 3e-5)
    state = init_state(trained, make_optimizer(OptimSection(), 1))
    weights = len(jax.tree.leaves(small.params["text"]))
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
    assert len(moments) == 2 * weights


def test_a_trained_tower_is_split_from_nothing(heavy: Step) -> None:
    assert split_frozen(heavy.small.params, freeze_vision=False) == (heavy.small.params, {})


# ---- the optimiser against torch ----

OPTIM = OptimSection(
    learning_rate=1e-2, warmup_steps=3, weight_decay=0.1, b1=0.9, b2=0.95, clip_norm=1.0
)


def random_tree(seed: int, scale: float) -> Params:
    rng = np.random.default_rng(seed)
    return {
        name: jnp.asarray(scale * rng.normal(size=shape), jnp.float32)
        for name, shape in {"matrix": (6, 5), "norm": (5,), "bias": (3,)}.items()
    }


def five_steps_differ(first_moment: Literal["float32", "bfloat16"] = "float32") -> float:
    """Of AdamW under identical gradients: norm of the difference to torch / norm of the way."""
    start = random_tree(0, 0.5)
    # Three of the five gradients are clipped.
    gradients = [random_tree(1 + i, scale) for i, scale in enumerate([2.0, 0.1, 1.0, 0.02, 5.0])]

    optimizer = make_optimizer(dataclasses.replace(OPTIM, first_moment=first_moment), steps=5)
    state = init_state(start, optimizer)
    for gradient in gradients:
        state, _ = apply_gradients(state, gradient, jnp.float32(1.0), optimizer, OPTIM.clip_norm)

    weights = {k: torch.nn.Parameter(torch.tensor(np.asarray(v))) for k, v in start.items()}
    theirs = torch.optim.AdamW(
        weights.values(),
        lr=OPTIM.learning_rate,
        betas=(OPTIM.b1, OPTIM.b2),
        eps=OPTIM.eps,
        weight_decay=OPTIM.weight_decay,
    )
    warm_up = torch.optim.lr_scheduler.LambdaLR(
        theirs, lambda step: min(1.0, (step + 1) / OPTIM.warmup_steps)
    )
    norms = []
    for gradient in gradients:
        for name, weight in weights.items():
            weight.grad = torch.tensor(np.asarray(gradient[name]))
        norms.append(torch.nn.utils.clip_grad_norm_(weights.values(), OPTIM.clip_norm).item())
        theirs.step()
        warm_up.step()
    assert sum(norm > OPTIM.clip_norm for norm in norms) == 3
    ours, final, first = (
        np.concatenate([np.asarray(x).ravel() for x in tree])
        for tree in (
            [state.params[k] for k in weights],
            [w.detach().numpy() for w in weights.values()],
            [start[k] for k in weights],
        )
    )
    return float(np.linalg.norm(ours - final) / np.linalg.norm(final - first))


def test_a_first_moment_in_bfloat16_takes_half_its_bytes_and_turns_the_way_little() -> None:
    def bytes_of(first_moment: Literal["float32", "bfloat16"]) -> int:
        optimizer = make_optimizer(dataclasses.replace(OPTIM, first_moment=first_moment), 5)
        state = init_state(random_tree(0, 0.5), optimizer)
        return sum(x.nbytes for x in jax.tree.leaves(state.opt_state) if x.ndim)

    weights = sum(x.nbytes for x in random_tree(0, 0.5).values())
    assert bytes_of("float32") == 2 * weights
    assert bytes_of("bfloat16") == 1.5 * weights
    assert 1e-5 < five_steps_differ("bfloat16") < 2**-7


def test_five_steps_of_adamw_equal_torchs() -> None:
    assert five_steps_differ() <= 1e-5


def test_a_skipped_update_fails_the_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    """The test of the test above."""
    monkeypatch.setattr(jaxgrpo.update.optax, "apply_updates", lambda params, updates: params)
    assert five_steps_differ() > 0.9


def test_the_gradient_norm_is_reported_before_clipping() -> None:
    gradient = {"a": jnp.array([3.0, 4.0])}
    optimizer = make_optimizer(OPTIM, 5)
    _, metrics = apply_gradients(
        init_state(gradient, optimizer), gradient, jnp.float32(0), optimizer, 1.0
    )
    assert float(metrics["grad_norm"]) == pytest.approx(5.0)


@pytest.mark.parametrize("warmup", [0, 1, 4])
@pytest.mark.parametrize("decay", ["constant", "linear", "cosine"])
def test_the_schedule_warms_up_and_decays_to_nothing(
    warmup: int, decay: Literal["constant", "linear", "cosine"]
) -> None:
    steps = 12
    config = OptimSection(learning_rate=2.0, warmup_steps=warmup, decay=decay)
    schedule = learning_rate_schedule(config, steps)
    for step in range(steps):
        if step < warmup:
            expected = 2.0 * (step + 1) / warmup
        else:
            done = (step - warmup) / (steps - warmup)
            cosine = (1 + np.cos(np.pi * done)) / 2
            expected = 2.0 * {"constant": 1.0, "linear": 1 - done, "cosine": cosine}[decay]
        assert float(schedule(step)) == pytest.approx(expected, rel=1e-5), step
    if decay != "constant":
        assert float(schedule(steps)) == pytest.approx(0.0, abs=1e-6)


def test_all_updates_of_a_step_have_its_learning_rate() -> None:
    """By the way a weight goes: Adam's, under a constant gradient, is the rate."""
    steps, updates = 5, 3
    config = OptimSection(learning_rate=2.0, warmup_steps=2, decay="linear", weight_decay=0.0)
    optimizer, rate = make_optimizer(config, steps, updates), learning_rate_schedule(config, steps)
    weight = {"w": jnp.zeros(1)}
    state = optimizer.init(weight)
    for count in range(steps * updates):
        moved, state = optimizer.update({"w": jnp.ones(1)}, state, weight)
        assert float(moved["w"][0]) == pytest.approx(-float(rate(count // updates)), rel=1e-4)


# ---- non-finite steps ----


@pytest.mark.parametrize(
    ("bad_gradient", "bad_loss"),
    [(np.nan, 1.0), (np.inf, 1.0), (-np.inf, 1.0), (1.0, np.nan), (1.0, np.inf), (3e38, 1.0)],
)
def test_a_non_finite_step_changes_no_bit(bad_gradient: float, bad_loss: float) -> None:
    """3e38 is finite, but its norm is not."""
    optimizer = make_optimizer(OPTIM, 5)
    state = init_state(random_tree(0, 0.5), optimizer)
    good = random_tree(1, 1.0)
    apply = jax.jit(lambda s, g, loss: apply_gradients(s, g, loss, optimizer, OPTIM.clip_norm))
    state, metrics = apply(state, good, jnp.float32(0.1))
    assert (int(state.skipped), int(metrics["skipped_in_a_row"])) == (0, 0)

    bad = good | {"norm": good["norm"].at[2].set(bad_gradient)}
    after = state
    for count in (1, 2):
        after, metrics = apply(after, bad, jnp.float32(bad_loss))
        assert int(after.skipped) == int(metrics["skipped_in_a_row"]) == count
    for before, now in zip(
        jax.tree.leaves((state.params, state.opt_state)),
        jax.tree.leaves((after.params, after.opt_state)),
        strict=True,
    ):
        assert np.asarray(before).tobytes() == np.asarray(now).tobytes()

    resumed, metrics = apply(after, good, jnp.float32(0.1))
    assert (int(resumed.skipped), int(metrics["skipped_in_a_row"])) == (0, 0)
    assert not np.array_equal(resumed.params["matrix"], after.params["matrix"])
    # As if the bad steps had never been: the same weights as without them.
    expected, _ = apply(state, good, jnp.float32(0.1))
    np.testing.assert_array_equal(resumed.params["matrix"], expected.params["matrix"])


@pytest.mark.parametrize(
    ("updates", "counts"),
    [
        ("bbb bbb bbb", [1, 1, 1, 2, 2, 2, 3, 3, 3]),  # three steps, not nine
        ("bgg bgg ggg", [1, 1, 1, 2, 2, 2, 0, 0, 0]),  # one bad update is enough
        ("ggb ggg gbb", [0, 0, 1, 0, 0, 0, 0, 1, 1]),
    ],
)
def test_bad_updates_of_one_step_count_as_one_step(updates: str, counts: list[int]) -> None:
    """b: bad, g: good; three updates a step."""
    optimizer = make_optimizer(OPTIM, 5, 3)
    state = init_state(random_tree(0, 0.5), optimizer)
    found = []
    for step in updates.split():
        for number, kind in enumerate(step):
            loss = jnp.float32(np.nan if kind == "b" else 0.1)
            gradient = random_tree(1, 1.0)
            state, metrics = apply_gradients(
                state, gradient, loss, optimizer, OPTIM.clip_norm, first=number == 0
            )
            found.append(int(metrics["skipped_in_a_row"]))
    assert found == counts


def test_the_layouts_are_ragged() -> None:
    """At least one video has windows that are not whole, and one prompt has two videos."""
    media = [[part for part in layout if isinstance(part, Grid)] for layout in LAYOUTS]
    assert any(grid.h % 8 or grid.w % 8 for grids in media for grid in grids)
    assert any(len(grids) > 1 for grids in media)
