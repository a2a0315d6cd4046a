"""Sampling against SciPy's distributions, and rollouts against full forwards of the original."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from jaxgrpo.policy import NEVER
from jaxgrpo.rollout import Rollout, Sampling, generate, restrict, sample
from models.qwen2_5_vl.processor import Prompt, collate
from tests.jaxgrpo.cases import (
    LAYOUTS,
    PAD,
    TEMPERATURE,
    USABLE,
    VOCAB,
    SmallModel,
    bucket_of,
    fast_jit,
    small_model,
)
from tests.oracle import hf_model, torch_grpo
from tests.oracle.prompts import grids, random_prompt
from tests.oracle.torch_grpo import Group

# ---- top-k and top-p ----


def kept(logits: Any, top_k: int, top_p: float) -> np.ndarray:
    return np.asarray(restrict(jnp.asarray(logits, jnp.float32), top_k, top_p)) > NEVER


def reference_kept(logits: np.ndarray, top_k: int, top_p: float) -> set[int]:
    """The definition, one id after another, likeliest first."""
    order = [int(i) for i in np.argsort(-logits, kind="stable")]
    if top_k:
        order = order[:top_k]
    p = scipy.special.softmax(logits[order].astype(np.float64))
    chosen: list[int] = []
    for i, token in enumerate(order):
        chosen.append(token)
        if p[: i + 1].sum() >= top_p:
            break
    return set(chosen)


def test_the_worked_example_of_top_p() -> None:
    """[.5, .3, .2] at 0.6 keeps two: the first alone falls short."""
    logits = np.log([0.5, 0.3, 0.2])
    assert kept(logits, 0, 0.6).tolist() == [True, True, False]
    assert kept(logits, 0, 0.4).tolist() == [True, False, False]
    assert kept(logits, 0, 0.9).tolist() == [True, True, True]


def test_top_k_keeps_the_likeliest() -> None:
    assert kept([0.0, 3.0, -1.0, 2.0], 2, 1.0).tolist() == [False, True, False, True]
    assert kept([0.0, 3.0, -1.0, 2.0], 1, 1.0).tolist() == [False, True, False, False]
    assert kept([0.0, 3.0, -1.0, 2.0], 9, 1.0).all()


def test_nothing_is_restricted_by_default() -> None:
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(3, 9)), jnp.float32)
    np.testing.assert_array_equal(restrict(logits, 0, 1.0), logits)


def test_top_p_counts_probability_after_top_k() -> None:
    """Of [.4, .3, .2, .1], top-k 2 leaves [.57, .43]: 0.5 of that is the first alone."""
    logits = np.log([0.4, 0.3, 0.2, 0.1])
    assert kept(logits, 0, 0.5).tolist() == [True, True, False, False]
    assert kept(logits, 2, 0.5).tolist() == [True, False, False, False]


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    arrays(np.float32, 12, elements=st.floats(-8, 8, width=16), unique=True),
    st.sampled_from([0, 1, 3, 12]),
    st.sampled_from([0.1, 0.37, 0.8, 0.95, 1.0]),
)
def test_restrict_equals_its_definition(logits: np.ndarray, top_k: int, top_p: float) -> None:
    ours = kept(logits, top_k, top_p)
    expected = reference_kept(logits, top_k, top_p)
    # Where a cumulative sum is within rounding of top_p, either answer is right.
    p = np.cumsum(np.sort(scipy.special.softmax(logits.astype(np.float64)))[::-1])
    if top_p < 1.0 and not top_k and np.any(np.abs(p - top_p) < 1e-5):
        return
    assert set(np.flatnonzero(ours)) == expected


def test_rows_are_restricted_apart() -> None:
    logits = np.array([[[0.0, 1.0, 2.0]], [[2.0, 1.0, 0.0]]])
    assert kept(logits, 1, 1.0).tolist() == [[[False, False, True]], [[True, False, False]]]


# ---- drawing one token ----


def frequencies(logits: np.ndarray, sampling: Sampling, draws: int = 20000) -> np.ndarray:
    """How often each id is drawn from one row of logits."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (draws, len(logits)))
    tokens, logp = sample(rows, jax.random.key(0), sampling)
    expected = scipy.special.log_softmax(logits)
    np.testing.assert_allclose(logp, expected[np.asarray(tokens)], atol=1e-5)
    return np.bincount(tokens, minlength=len(logits))


def assert_drawn_from(counts: np.ndarray, p: np.ndarray) -> None:
    """Chi-square: the draws could well be the distribution's, and never are what has none."""
    assert counts[p == 0].sum() == 0
    expected = counts.sum() * p[p > 0] / p.sum()
    assert expected.min() >= 5, "too few draws for a chi-square test"
    assert scipy.stats.chisquare(counts[p > 0], expected).pvalue > 1e-3


LOGITS = np.array([0.3, -1.0, 2.0, 1.1, -0.5, NEVER, 0.0, 1.4])
NO_ONE = np.zeros(0, bool)  # what the oracle need not know of a group


def test_draws_follow_the_distribution() -> None:
    counts = frequencies(LOGITS, Sampling(1, 1, temperature=1.0))
    assert_drawn_from(counts, scipy.special.softmax(LOGITS))


def test_the_chi_square_test_would_notice_another_distribution() -> None:
    counts = frequencies(LOGITS, Sampling(1, 1, temperature=1.0))
    with pytest.raises(AssertionError):
        assert_drawn_from(counts, scipy.special.softmax(LOGITS / 0.9))


@pytest.mark.parametrize(("top_k", "top_p"), [(3, 1.0), (0, 0.7), (5, 0.8)])
def test_restricted_draws_follow_what_is_left_but_report_the_policy(
    top_k: int, top_p: float
) -> None:
    """`frequencies` checks the log-probability: that of the policy before top-k and top-p."""
    counts = frequencies(LOGITS, Sampling(1, 1, 1.0, top_p, top_k))
    left = reference_kept(LOGITS, top_k, top_p)
    assert 1 < len(left) < 7
    p = np.where(np.isin(np.arange(8), list(left)), scipy.special.softmax(LOGITS), 0.0)
    assert_drawn_from(counts, p / p.sum())


def test_temperature_zero_takes_the_likeliest() -> None:
    counts = frequencies(LOGITS, Sampling(1, 1, temperature=0.0), draws=50)
    assert counts[2] == 50


# ---- whole rollouts ----

WIDTH, GROUP = 8, 6
STOPS = tuple(int(i) for i in np.flatnonzero(USABLE)[1::8])  # so many that half of all end early


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    small = small_model(tmp_path_factory.mktemp("model"), tied=False)
    vocabulary = small.policy.vocabulary._replace(stop=STOPS)
    return small._replace(policy=small.policy._replace(vocabulary=vocabulary))


@pytest.fixture(scope="module")
def prompts() -> list[Prompt]:
    rng = np.random.default_rng(4)
    return [random_prompt(rng, layout, vocab=VOCAB) for layout in LAYOUTS[:3]]


def roller(small: SmallModel, prompts: list[Prompt], sampling: Sampling) -> Any:
    """key -> Rollout on the host, compiled once."""
    batch = collate(prompts, bucket_of(prompts), PAD)
    policy = small.policy

    def roll(params: Any, key: jax.Array) -> Rollout:
        model = policy.merge(params)
        features = model.encode_vision(batch)
        return generate(model, batch, features, key, sampling, policy.vocabulary)

    jitted = fast_jit(roll)
    return lambda seed: jax.tree.map(np.asarray, jitted(small.params, jax.random.key(seed)))


@pytest.fixture(scope="module")
def roll(small: SmallModel, prompts: list[Prompt]) -> Any:
    return roller(small, prompts, Sampling(GROUP, WIDTH, TEMPERATURE))


@pytest.fixture(scope="module")
def rollout(roll: Any) -> Rollout:
    return roll(0)


def test_some_completions_stop_early_and_some_are_truncated(rollout: Rollout) -> None:
    assert len(np.unique(rollout.lengths)) >= 4
    assert rollout.finished.any() and not rollout.finished.all()


def test_a_completion_ends_with_its_first_stop_token(rollout: Rollout) -> None:
    for tokens, length, finished in zip(
        rollout.tokens.reshape(-1, WIDTH),
        rollout.lengths.ravel(),
        rollout.finished.ravel(),
        strict=True,
    ):
        stops = np.flatnonzero(np.isin(tokens, STOPS))
        assert finished == (len(stops) > 0)
        assert length == (stops[0] + 1 if finished else WIDTH)


def test_behind_the_stop_token_there_is_padding_of_log_probability_zero(rollout: Rollout) -> None:
    behind = np.arange(WIDTH) >= rollout.lengths[..., None]
    assert behind.any()
    assert np.all(rollout.tokens[behind] == PAD)
    assert np.all(rollout.sampler_logp[behind] == 0.0)
    assert np.all(rollout.sampler_logp[~behind] < 0.0)


def test_unusable_ids_are_never_sampled(
    small: SmallModel, prompts: list[Prompt], rollout: Rollout
) -> None:
    """Although the model would love to: some prompt's likeliest first token is unusable."""
    drawn = np.arange(WIDTH) < rollout.lengths[..., None]
    assert USABLE[rollout.tokens[drawn]].all()
    with torch.no_grad():
        everything = [
            hf_model.logits(small.original, prompt, *grids(layout)).softmax(-1).numpy()
            for prompt, layout in zip(prompts, LAYOUTS[:3], strict=True)
        ]
    assert sum(p[:, ~USABLE].sum() for p in everything) > 1


def test_sampler_logp_equals_a_full_forward_of_the_same_distribution(
    small: SmallModel, prompts: list[Prompt], rollout: Rollout
) -> None:
    """Of the original, on each completion by itself, with temperature and masked ids."""
    worst = 0.0
    for p, layout in enumerate(LAYOUTS[:3]):
        group = Group(prompts[p], *grids(layout), [], np.zeros(GROUP), [], [], [], NO_ONE)
        for g in range(GROUP):
            n = rollout.lengths[p, g]
            with torch.no_grad():
                expected, _ = torch_grpo.log_probs_and_entropies(
                    small.original, group, rollout.tokens[p, g, :n], TEMPERATURE, USABLE
                )
            difference = rollout.sampler_logp[p, g, :n] - expected.numpy()
            worst = max(worst, float(np.abs(difference).max()))
    assert worst <= 1e-4


def test_sampler_logp_equals_the_trainers(
    small: SmallModel, prompts: list[Prompt], rollout: Rollout
) -> None:
    """Our two paths: token by token through the caches, and packed as in the update."""
    batch = collate(prompts, bucket_of(prompts), PAD)
    logp, _ = fast_jit(lambda params, tokens: small.policy.log_probs(params, batch, None, tokens))(
        small.params, rollout.tokens
    )
    drawn = np.arange(WIDTH) < rollout.lengths[..., None]
    np.testing.assert_allclose(np.asarray(logp)[drawn], rollout.sampler_logp[drawn], atol=5e-5)


def test_the_same_key_draws_the_same_and_another_does_not(roll: Any, rollout: Rollout) -> None:
    again, other = roll(0), roll(1)
    for name in Rollout._fields:
        np.testing.assert_array_equal(again._asdict()[name], rollout._asdict()[name])
    assert not np.array_equal(other.tokens, rollout.tokens)


def test_completions_of_a_group_differ(rollout: Rollout) -> None:
    for group in rollout.tokens:
        assert len(np.unique(group, axis=0)) > 1


def test_tokens_of_a_rollout_follow_the_originals_distribution(
    small: SmallModel, prompts: list[Prompt]
) -> None:
    """The first, and the second after the commonest first: draws of another step are new ones."""
    rollout = roller(small, prompts[:1], Sampling(6000, 2, TEMPERATURE))(7)
    first, second = rollout.tokens[0].T
    goes_on = first[~np.isin(first, STOPS)]
    commonest = int(np.bincount(goes_on).argmax())
    group = Group(prompts[0], *grids(LAYOUTS[0]), [], np.zeros(0), [], [], [], NO_ONE)
    with torch.no_grad():
        log_p = torch_grpo.distribution(
            small.original, group, np.array([commonest, STOPS[0]]), TEMPERATURE, USABLE
        )
    for drawn, p in zip(
        (first, second[first == commonest]), log_p.double().exp().numpy(), strict=True
    ):
        assert len(drawn) >= 500
        counts = np.bincount(drawn, minlength=VOCAB)
        rare = p * len(drawn) < 5  # pooled: chi-square wants at least five expected draws
        assert (~rare).sum() >= 5
        assert_drawn_from(
            np.append(counts[~rare], counts[rare].sum()), np.append(p[~rare], p[rare].sum())
        )


def test_greedy_rollouts_take_the_originals_likeliest_usable_token(
    small: SmallModel, prompts: list[Prompt]
) -> None:
    rollout = roller(small, prompts, Sampling(1, WIDTH, temperature=0.0))(0)
    for p, layout in enumerate(LAYOUTS[:3]):
        n = rollout.lengths[p, 0]
        tokens = rollout.tokens[p, 0, :n]
        group = Group(prompts[p], *grids(layout), [], np.zeros(1), [], [], [], NO_ONE)
        with torch.no_grad():
            log_p = torch_grpo.distribution(small.original, group, tokens, 1.0, USABLE)
        np.testing.assert_array_equal(log_p.argmax(-1), tokens)
        np.testing.assert_allclose(rollout.sampler_logp[p, 0, :n], log_p.max(-1).values, atol=1e-4)
