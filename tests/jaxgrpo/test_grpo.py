"""The loss and the advantages against NumPy loops, and the worked examples of the docstrings."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import GrpoSection
from jaxgrpo.grpo import (
    LossInputs,
    completion_mask,
    group_advantages,
    grpo_loss,
    token_weights,
    zero_variance,
)

Aggregation = Literal["sequence", "token", "constant"]
AGGREGATIONS: tuple[Aggregation, ...] = ("sequence", "token", "constant")
PLAIN = GrpoSection(clip_low=0.2, clip_high=0.2, kl=0.0, entropy=0.0)


# ---- advantages ----


def test_advantages_are_centred_and_divided_by_the_sample_deviation() -> None:
    rewards = np.random.default_rng(0).normal(3.0, 2.0, (5, 8)).astype(np.float32)
    expected = rewards - rewards.mean(axis=1, keepdims=True)
    np.testing.assert_allclose(
        group_advantages(jnp.asarray(rewards), divide_by_std=False), expected, atol=1e-5
    )
    expected /= rewards.std(axis=1, ddof=1, keepdims=True) + 1e-6
    np.testing.assert_allclose(group_advantages(jnp.asarray(rewards)), expected, atol=1e-5)


def test_the_worked_example_of_advantages() -> None:
    rewards = jnp.array([[1.0, 0, 0, 1], [2, 2, 2, 2]])
    expected = [[0.87, -0.87, -0.87, 0.87], [0, 0, 0, 0]]
    np.testing.assert_allclose(group_advantages(rewards), expected, atol=0.005)


@pytest.mark.parametrize("reward", [0.1, 1 / 3, 0.7, 1e-20, 16777216.0])
@pytest.mark.parametrize("group", [2, 3, 7, 8])
@pytest.mark.parametrize("divide", [True, False])
def test_a_group_of_equal_rewards_gets_exact_zeros(reward: float, group: int, divide: bool) -> None:
    """Also where the mean of n equal float32 numbers is not that number."""
    rewards = jnp.full((2, group), reward, jnp.float32)
    assert np.array_equal(group_advantages(rewards, divide), np.zeros((2, group)))
    assert np.array_equal(zero_variance(rewards), [True, True])


def test_groups_do_not_see_each_other() -> None:
    rewards = jnp.array([[0.0, 1.0], [10.0, 11.0], [5.0, 5.0]])
    advantages = np.asarray(group_advantages(rewards))
    np.testing.assert_allclose(advantages[0], advantages[1], atol=1e-5)
    np.testing.assert_array_equal(zero_variance(rewards), [False, False, True])


# ---- masks and aggregation ----


def test_the_worked_example_of_the_mask() -> None:
    mask = completion_mask(jnp.array([[2, 0]]), 3)
    np.testing.assert_array_equal(mask, [[[1, 1, 0], [0, 0, 0]]])


def test_the_worked_example_of_token_weights() -> None:
    mask = jnp.array([[[1.0, 1, 0], [1, 0, 0]]])
    expected = {
        "sequence": ([[[0.5, 0.5, 0], [1, 0, 0]]], 2),
        "token": (mask, 3),
        "constant": (mask, 6),
    }
    for aggregation, (weights, count) in expected.items():
        ours, our_count = token_weights(mask, aggregation)
        np.testing.assert_array_equal(ours, weights)
        assert float(our_count) == count


def test_completions_masked_as_a_whole_are_not_counted() -> None:
    mask = jnp.array([[[1.0, 1, 0], [0, 0, 0]]])
    counts = {name: float(token_weights(mask, name, some=True)[1]) for name in AGGREGATIONS}
    assert counts == {"sequence": 1, "token": 2, "constant": 6}  # as in the docstring


@pytest.mark.parametrize("some", [False, True])
def test_empty_completions_divide_by_nothing(some: bool) -> None:
    for aggregation in AGGREGATIONS:
        weights, count = token_weights(jnp.zeros((1, 2, 3)), aggregation, some)
        assert np.array_equal(weights, np.zeros((1, 2, 3))) and float(count) > 0


# ---- the loss ----


def random_inputs(seed: int, p: int = 3, g: int = 4, c: int = 6) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)

    def normal(spread: float, *shape: int) -> np.ndarray:
        return rng.normal(0, spread, shape).astype(np.float32)

    logp = -np.abs(normal(2.0, p, g, c))
    return {
        "logp": logp,
        "entropy": np.abs(normal(1.0, p, g, c)),
        "advantages": normal(1.0, p, g),
        "lengths": rng.integers(1, c + 1, (p, g)).astype(np.int32),
        "old_logp": logp + normal(0.5, p, g, c),
        "ref_logp": logp + normal(0.5, p, g, c),
    }


def our_loss(
    x: dict[str, np.ndarray], config: GrpoSection, on_policy: bool = False
) -> tuple[jax.Array, dict[str, jax.Array]]:
    mask = completion_mask(jnp.asarray(x["lengths"]), x["logp"].shape[2])
    weights, count = token_weights(mask, config.aggregation)
    inputs = LossInputs(
        jnp.asarray(x["advantages"]),
        weights,
        mask,
        None if on_policy else jnp.asarray(x["old_logp"]),
        jnp.asarray(x["ref_logp"]) if config.kl else None,
    )
    loss, sums = grpo_loss(jnp.asarray(x["logp"]), jnp.asarray(x["entropy"]), inputs, config)
    return loss / count, sums


def loop_loss(x: dict[str, np.ndarray], config: GrpoSection) -> tuple[float, dict[str, float]]:
    """The loss as the papers write it, one token after another, in Python floats."""
    p, g, c = x["logp"].shape
    sums = dict.fromkeys(("ratio", "kl", "entropy", "clip_low", "clip_high"), 0.0)
    per_completion: list[list[float]] = []
    for i in range(p):
        for j in range(g):
            losses = []
            for t in range(x["lengths"][i, j]):
                logp, old, ref, entropy = (
                    float(x[name][i, j, t]) for name in ("logp", "old_logp", "ref_logp", "entropy")
                )
                a = float(x["advantages"][i, j])
                ratio = math.exp(logp - old)
                clipped = min(max(ratio, 1 - config.clip_low), 1 + config.clip_high)
                kl = math.exp(ref - logp) - (ref - logp) - 1
                surrogate = min(ratio * a, clipped * a)
                losses.append(-surrogate + config.kl * kl - config.entropy * entropy)
                sums["ratio"] += ratio
                sums["kl"] += kl
                sums["entropy"] += entropy
                sums["clip_low"] += ratio < 1 - config.clip_low and a < 0
                sums["clip_high"] += ratio > 1 + config.clip_high and a > 0
            per_completion.append(losses)
    tokens = [loss for losses in per_completion for loss in losses]
    loss = {
        "sequence": np.mean([np.mean(losses) for losses in per_completion]),
        "token": np.mean(tokens),
        "constant": np.sum(tokens) / (p * g * c),
    }[config.aggregation]
    return float(loss), sums


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("clip_high", [0.2, 0.28])
def test_the_loss_equals_a_loop_over_tokens(aggregation: Aggregation, clip_high: float) -> None:
    config = GrpoSection(
        clip_low=0.2, clip_high=clip_high, kl=0.04, entropy=0.01, aggregation=aggregation
    )
    x = random_inputs(1)
    expected, expected_sums = loop_loss(x, config)
    assert min(expected_sums["clip_low"], expected_sums["clip_high"]) >= 3
    loss, sums = our_loss(x, config)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert sums.keys() == expected_sums.keys()
    for name, value in sums.items():
        np.testing.assert_allclose(value, expected_sums[name], rtol=1e-5, err_msg=name)


def test_without_a_reference_there_is_no_kl() -> None:
    x = random_inputs(2)
    expected, _ = loop_loss(x, PLAIN)
    loss, sums = our_loss(x, PLAIN)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    assert "kl" not in sums


def one_token(
    logp: float, old: float | None, ref: float | None, advantage: float, config: GrpoSection
) -> tuple[float, float]:
    """(loss, its gradient by logp) of a single token."""
    one = jnp.ones((1, 1, 1))

    def loss(logp: jax.Array) -> jax.Array:
        inputs = LossInputs(
            jnp.full((1, 1), advantage),
            one,
            one,
            None if old is None else old * one,
            None if ref is None else ref * one,
        )
        return grpo_loss(logp, jnp.zeros((1, 1, 1)), inputs, config)[0]

    value, gradient = jax.value_and_grad(loss)(logp * one)
    return float(value), float(gradient[0, 0, 0])


@pytest.mark.parametrize(
    ("ratio", "advantage", "learns"),
    [
        (1.25, 1.0, True),  # between 1 + clip_low and 1 + clip_high: clip-higher lets it grow
        (1.35, 1.0, False),
        (1.35, -1.0, True),  # too likely and bad: always pushed back
        (0.85, -1.0, True),
        (0.75, -1.0, False),
        (0.75, 1.0, True),  # too unlikely and good: always pulled up
    ],
)
def test_clip_higher_stops_the_gradient_only_beyond_its_own_side(
    ratio: float, advantage: float, learns: bool
) -> None:
    config = GrpoSection(clip_low=0.2, clip_high=0.3, kl=0.0, entropy=0.0)
    logp = -1.0
    value, gradient = one_token(logp, logp - math.log(ratio), None, advantage, config)
    clipped = min(max(ratio, 0.8), 1.3)
    assert value == pytest.approx(-min(ratio * advantage, clipped * advantage), rel=1e-5)
    assert gradient == pytest.approx(-ratio * advantage if learns else 0.0, rel=1e-5)


@pytest.mark.parametrize(("ratio", "loss"), [(0.5, 0.8), (2.0, 2.0), (5.0, 3.0)])
def test_the_worked_example_of_the_dual_clip(ratio: float, loss: float) -> None:
    config = dataclasses.replace(PLAIN, dual_clip=3.0)
    value, gradient = one_token(-3.0, -3.0 - math.log(ratio), None, -1.0, config)
    assert value == pytest.approx(loss, rel=1e-5)
    assert gradient == pytest.approx(2.0 if ratio == 2 else 0.0, rel=1e-5)
    good = one_token(-3.0, -3.0 - math.log(ratio), None, 1.0, config)
    assert good == one_token(-3.0, -3.0 - math.log(ratio), None, 1.0, PLAIN)


@pytest.mark.parametrize(("gap", "weight"), [(math.log(0.5), 0.5), (0.0, 1.0), (1.0, 1.5)])
def test_what_the_sampler_made_too_likely_counts_less_and_no_token_more_than_the_cap(
    gap: float, weight: float
) -> None:
    """The weight is no function of the policy: no gradient passes through it."""
    config = dataclasses.replace(PLAIN, importance_cap=1.5)
    one = jnp.ones((1, 1, 1))

    def loss(logp: jax.Array) -> jax.Array:
        inputs = LossInputs(0.7 * one[0], one, one, None, None, sampler_logp=(-2.0 - gap) * one)
        return grpo_loss(logp, 0 * one, inputs, config)[0]

    value, gradient = jax.value_and_grad(loss)(-2.0 * one)
    assert float(value) == pytest.approx(-0.7 * weight, rel=1e-5)
    assert float(gradient[0, 0, 0]) == pytest.approx(-0.7 * weight, rel=1e-5)


def test_on_policy_the_gradient_is_that_of_plain_policy_gradients() -> None:
    """old_logp None: ratio 1 whatever logp is, gradient -A."""
    assert one_token(-2.3, None, None, 0.7, PLAIN) == pytest.approx((-0.7, -0.7))
    assert one_token(-2.3, None, None, -0.7, PLAIN) == pytest.approx((0.7, 0.7))


def test_on_policy_there_is_no_ratio_to_report() -> None:
    assert our_loss(random_inputs(2), PLAIN, on_policy=True)[1].keys() == {"entropy"}


@pytest.mark.parametrize("log_ratio", [-1.0, -0.1, 0.0, 0.1, 1.0])
def test_k3_is_positive_and_pulls_towards_the_reference(log_ratio: float) -> None:
    config = GrpoSection(kl=1.0, entropy=0.0)
    value, gradient = one_token(-2.0, None, -2.0 + log_ratio, 0.0, config)
    assert value == pytest.approx(math.exp(log_ratio) - log_ratio - 1, abs=1e-6)
    assert gradient == pytest.approx(1 - math.exp(log_ratio), abs=1e-6)


def test_k3_estimates_the_kl_divergence() -> None:
    """Its mean over draws from the policy is KL(policy || reference), exactly."""
    rng = np.random.default_rng(0)
    policy, reference = (rng.dirichlet(np.ones(10)) for _ in range(2))
    log_policy, log_reference = (
        jnp.log(jnp.asarray(x, jnp.float32)).reshape(1, 1, 10) for x in (policy, reference)
    )
    weights = jnp.asarray(policy, jnp.float32).reshape(1, 1, 10)
    ones = jnp.ones((1, 1, 10))
    inputs = LossInputs(jnp.zeros((1, 1)), weights, ones, None, log_reference)
    loss, _ = grpo_loss(log_policy, 0 * ones, inputs, GrpoSection(kl=1.0, entropy=0.0))
    assert float(loss) == pytest.approx(np.sum(policy * np.log(policy / reference)), rel=1e-5)


def test_entropy_lowers_the_loss() -> None:
    x = random_inputs(3)
    config = GrpoSection(kl=0.0, entropy=0.1, aggregation="token")
    before, _ = our_loss(x, config)
    after, sums = our_loss(x | {"entropy": x["entropy"] + 1.0}, config)
    assert float(after - before) == pytest.approx(-0.1, rel=1e-4)
    assert float(sums["entropy"]) > 0


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_what_stands_behind_a_completion_neither_counts_nor_learns(
    aggregation: Aggregation,
) -> None:
    config = GrpoSection(kl=0.04, entropy=0.01, aggregation=aggregation)
    x = random_inputs(4)
    padding = np.arange(6) >= x["lengths"][..., None]
    garbage = {name: np.where(padding, -1e30, x[name]) for name in ("logp", "old_logp")}
    garbage["ref_logp"] = np.where(padding, np.float32(55.0), x["ref_logp"])

    def loss(logp: jax.Array, x: dict[str, np.ndarray]) -> jax.Array:
        return our_loss(x | {"logp": logp}, config)[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(x["logp"]), x)
    dirty_value, dirty = jax.value_and_grad(loss)(jnp.asarray(garbage["logp"]), x | garbage)
    np.testing.assert_array_equal(value, dirty_value)
    np.testing.assert_array_equal(gradient, dirty)
    np.testing.assert_array_equal(np.asarray(gradient)[padding], 0.0)


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
def test_a_group_of_equal_rewards_has_no_gradient(aggregation: Aggregation) -> None:
    """Whatever the ratios are; with no KL and no entropy bonus, exact zeros."""
    config = dataclasses.replace(PLAIN, aggregation=aggregation)
    x = random_inputs(5)
    x["advantages"] = np.asarray(group_advantages(jnp.full((3, 4), 0.3)))

    def loss(logp: jax.Array) -> jax.Array:
        return our_loss(x | {"logp": logp}, config)[0]

    np.testing.assert_array_equal(jax.grad(loss)(jnp.asarray(x["logp"])), 0.0)
