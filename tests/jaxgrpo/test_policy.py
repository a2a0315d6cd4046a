"""The policy's log-probabilities and entropies against PyTorch and NumPy."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch

from jaxgrpo.policy import NEVER, Vocabulary, cast, policy_logits, token_log_probs
from tests.jaxgrpo.cases import (
    LAYOUTS,
    TEMPERATURE,
    USABLE,
    VOCAB,
    SmallModel,
    fast_jit,
    random_groups,
    small_model,
    update_batch,
)
from tests.oracle import torch_grpo

FOUR = Vocabulary(np.array([True, False, True, True]), stop=(3,), pad=1)


# ---- the distribution ----


def test_unusable_ids_have_no_probability() -> None:
    logits = jnp.array([[1.0, 50.0, 2.0, 0.0]])
    p = np.asarray(jax.nn.softmax(policy_logits(logits, FOUR, 1.0)))
    assert p[0, 1] == 0.0
    np.testing.assert_allclose(p[0, [0, 2, 3]], scipy.special.softmax([1.0, 2.0, 0.0]), rtol=1e-6)


def test_temperature_divides_the_logits() -> None:
    logits = jnp.array([1.0, 50.0, 2.0, 0.0])
    np.testing.assert_allclose(
        policy_logits(logits, FOUR, 0.5), np.float32([2.0, NEVER, 4.0, 0.0]), rtol=1e-6
    )


def test_temperature_zero_leaves_the_logits_for_greedy_decoding() -> None:
    logits = jnp.array([1.0, 50.0, 2.0, 0.0])
    np.testing.assert_array_equal(
        policy_logits(logits, FOUR, 0.0), np.float32([1.0, NEVER, 2.0, 0.0])
    )


def test_casting_is_differentiated_through() -> None:
    """The master weights are float32, and so are their gradients."""
    gradient = jax.grad(lambda p: jnp.sum(cast(p, jnp.bfloat16)["w"]).astype(jnp.float32))(
        {"w": jnp.ones(3)}
    )
    assert gradient["w"].dtype == jnp.float32
    np.testing.assert_array_equal(gradient["w"], 1.0)


# ---- log-probabilities and entropies of given hidden states ----


class Identity(NamedTuple):
    """Stands in for the model where hidden states are the logits themselves."""

    def logits(self, hidden: jax.Array) -> jax.Array:
        return hidden


@pytest.mark.parametrize("chunk", [0, 1, 2, 3, 5, 8])
def test_log_probs_and_entropies_of_every_chunking_equal_scipys(chunk: int) -> None:
    """5 tokens: chunks that divide them, that do not, and that are longer."""
    rng = np.random.default_rng(0)
    hidden = (5 * rng.normal(size=(2, 3, 5, 4))).astype(np.float32)
    tokens = rng.choice([0, 2, 3], (2, 3, 5)).astype(np.int32)
    logp, entropy = token_log_probs(Identity(), hidden, tokens, FOUR, TEMPERATURE, chunk)
    scaled = np.where(FOUR.usable, hidden / TEMPERATURE, -np.inf)
    expected = scipy.special.log_softmax(scaled, axis=-1)
    np.testing.assert_allclose(
        logp, np.take_along_axis(expected, tokens[..., None], -1)[..., 0], atol=2e-6
    )
    np.testing.assert_allclose(
        entropy, scipy.stats.entropy(np.exp(expected), axis=-1), rtol=1e-5, atol=1e-6
    )


def test_a_certain_policy_has_zero_entropy_and_finite_gradients() -> None:
    """Probabilities that underflow to 0 must not make 0 * log 0."""
    hidden = jnp.array([[[[0.0, 0.0, 1e6, 0.0]]]])

    def total(hidden: jax.Array) -> jax.Array:
        logp, entropy = token_log_probs(
            Identity(),
            hidden,
            jnp.array([[[2]]]),
            FOUR,
            1.0,
            0,
        )
        return jnp.sum(logp + entropy)

    value, gradient = jax.value_and_grad(total)(hidden)
    assert float(value) == 0.0
    assert np.all(np.isfinite(gradient))


def test_the_entropy_of_equal_logits_is_the_log_of_the_usable_ids() -> None:
    _, entropy = token_log_probs(
        Identity(),
        jnp.zeros((1, 1, 1, 4)),
        jnp.zeros((1, 1, 1), jnp.int32),
        FOUR,
        1.0,
        0,
    )
    assert float(entropy[0, 0, 0]) == pytest.approx(np.log(3))


# ---- of the whole model ----


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return small_model(tmp_path_factory.mktemp("model"), tied=True)


def test_log_probs_equal_a_full_forward_of_the_original(small: SmallModel) -> None:
    """Per completion, [prompt, completion] through transformers; temperature and mask applied."""
    groups = random_groups(small, group=3, width=6, seed=1, layouts=LAYOUTS[1:3])
    batch = update_batch(groups, 6)
    logp, entropy = fast_jit(lambda p, b: small.policy.log_probs(p, b.prompt, None, b.completions))(
        small.params, batch
    )
    for p, group in enumerate(groups):
        for g, completion in enumerate(group.completions):
            with torch.no_grad():
                expected = torch_grpo.log_probs_and_entropies(
                    small.original, group, completion, TEMPERATURE, USABLE
                )
            n = len(completion)
            np.testing.assert_allclose(logp[p, g, :n], expected[0], atol=1e-4)
            np.testing.assert_allclose(entropy[p, g, :n], expected[1], atol=1e-4)


def test_what_stands_behind_a_completion_is_never_read(small: SmallModel) -> None:
    """Nor are other completions of the group: log-probabilities are the same bits."""
    groups = random_groups(small, group=3, width=6, seed=1, layouts=LAYOUTS[1:3])
    batch = update_batch(groups, 6)
    log_probs = fast_jit(lambda p, b, c: small.policy.log_probs(p, b.prompt, None, c)[0])
    before = np.asarray(log_probs(small.params, batch, batch.completions))
    mask = np.arange(6) < batch.lengths[..., None]
    garbage = np.where(mask, batch.completions, np.random.default_rng(2).integers(7, VOCAB))
    garbage[:, 1] = 299  # another completion altogether
    after = np.asarray(log_probs(small.params, batch, garbage.astype(np.int32)))
    kept = mask.copy()
    kept[:, 1] = False
    np.testing.assert_array_equal(before[kept], after[kept])
    assert not np.array_equal(before[:, 1], after[:, 1])
