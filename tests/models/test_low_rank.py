"""Adapters in the whole model: gradients by the chain rule, what is made, and merging."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.extend.core
import jax.numpy as jnp
import numpy as np
import pytest

from jaxgrpo.config import GrpoSection
from jaxgrpo.policy import Params, Policy
from jaxgrpo.update import UpdateBatch, grpo_gradients, split_frozen
from models.low_rank import Lora
from models.qwen2_5_vl.model import merge_adapters, random_adapters
from tests.jaxgrpo.cases import LAYOUTS, fast_jit, random_groups, small_model, update_batch

LORA = Lora(3, 6.0, ("text.attention", "text.mlp", "vision.attention", "vision.mlp"))
CONFIG = GrpoSection(clip_low=0.2, clip_high=0.28, kl=0.05, entropy=0.01, aggregation="token")
STACKS = {"text": "layers", "vision": "blocks"}
INPUTS = {"o": 2, "proj": 2}  # axes of a weight that are inputs, where not 1


class Case(NamedTuple):
    policy: Policy
    base: Params
    adapters: Params  # {"lora": ...}, B not zero
    batch: UpdateBatch
    merged: Params


@pytest.fixture(scope="module")
def case(tmp_path_factory: pytest.TempPathFactory) -> Case:
    small = small_model(tmp_path_factory.mktemp("model"), tied=False)
    policy = small.policy._replace(lora=LORA)
    pairs = random_adapters(policy.config, LORA, 0)
    rng = np.random.default_rng(0)
    pairs = jax.tree.map(
        lambda x: jnp.asarray(x + rng.normal(0, 0.05, x.shape).astype(np.float32)), pairs
    )
    batch = update_batch(random_groups(small, group=3, width=5, seed=2, layouts=LAYOUTS[:2]), 5)
    adapters = {"lora": pairs}
    merged = merge_adapters(small.params | adapters, LORA.scale, jnp.float32)
    return Case(policy, small.params, adapters, batch, merged)


def matrices(weight: Any, pair: dict[str, Any], inputs: int) -> tuple[Any, Any, Any]:
    """[L, I, O], [L, I, R], [L, R, O] of a weight and its pair."""
    weight, a, b = (np.asarray(x) for x in (weight, pair["a"], pair["b"]))
    layers, width = weight.shape[0], int(np.prod(weight.shape[1 : 1 + inputs]))
    return (
        weight.reshape(layers, width, -1),
        a.reshape(layers, width, -1),
        b.reshape(layers, b.shape[1], -1),
    )


def test_gradients_are_those_of_the_full_weight_by_the_chain_rule(case: Case) -> None:
    """Of W + s A B: dA = s dW B^T and dB = s A^T dW, with dW from training all weights."""
    trained, frozen = split_frozen(case.base | case.adapters, freeze_vision=False)
    assert trained.keys() == {"lora"} and frozen.keys() == {"text", "vision"}

    def gradients(params: Params, frozen: Params) -> tuple[Params, Any]:
        found, metrics, _ = grpo_gradients(case.policy, params, frozen, case.batch, CONFIG)
        return found, metrics["loss"]

    ours, our_loss = fast_jit(gradients)(trained, frozen)
    full, loss = fast_jit(gradients)(case.merged, {})
    np.testing.assert_allclose(our_loss, loss, rtol=1e-5)
    seen = 0
    for part, pairs in case.adapters["lora"].items():
        for name, pair in pairs.items():
            inputs = INPUTS.get(name, 1)
            dw, a, b = matrices(full[part][STACKS[part]][name], pair, inputs)
            _, da, db = matrices(
                case.base[part][STACKS[part]][name], ours["lora"][part][name], inputs
            )
            expected_a = LORA.scale * dw @ b.transpose(0, 2, 1)
            expected_b = LORA.scale * a.transpose(0, 2, 1) @ dw
            for found, expected in ((da, expected_a), (db, expected_b)):
                difference = np.linalg.norm(found - expected) / np.linalg.norm(expected)
                assert difference < 1e-4, (part, name)
            seen += 1
    assert seen == 7 + 5


def shapes_made(jaxpr: Any) -> set[tuple[int, ...]]:
    """Shapes of all that a program computes, loops and calls included, but not its arguments."""
    made: set[tuple[int, ...]] = set()
    for equation in jaxpr.eqns:
        if equation.primitive.name != "convert_element_type":
            made |= {x.aval.shape for x in equation.outvars}
        for value in jax.tree.leaves(
            list(equation.params.values()),
            is_leaf=lambda x: isinstance(x, (jax.extend.core.Jaxpr, jax.extend.core.ClosedJaxpr)),
        ):
            inner = value.jaxpr if isinstance(value, jax.extend.core.ClosedJaxpr) else value
            if isinstance(inner, jax.extend.core.Jaxpr):
                made |= shapes_made(inner)
    return made


def test_no_gradient_of_a_frozen_weight_is_made(case: Case) -> None:
    """Nothing of the shape of a stacked matrix is made; with all weights trained it is."""

    def made(trained: Params, frozen: Params) -> set[tuple[int, ...]]:
        traced = jax.make_jaxpr(
            lambda p, f: grpo_gradients(case.policy, p, f, case.batch, CONFIG)[0]
        )(trained, frozen)
        return shapes_made(traced.jaxpr)

    stacked = {
        case.base[part][STACKS[part]][name].shape
        for part, pairs in case.adapters["lora"].items()
        for name in pairs
    }
    assert stacked <= made(case.merged, {})
    assert not stacked & made(case.adapters, case.base)


def test_merged_weights_are_the_model_with_its_adapters(case: Case) -> None:
    def log_probs(params: Params) -> jax.Array:
        return case.policy.log_probs(params, case.batch.prompt, None, case.batch.completions)[0]

    adapted, merged, base = (
        np.asarray(fast_jit(log_probs)(params))
        for params in (case.base | case.adapters, case.merged, case.base)
    )
    batch = case.batch
    real = np.arange(batch.completions.shape[2]) < np.asarray(batch.lengths)[..., None]
    spread = float(adapted[real].std())
    np.testing.assert_allclose(adapted[real], merged[real], rtol=0, atol=1e-4 * spread)
    assert np.abs(adapted - base)[real].max() > 0.1 * spread  # the adapters do say something


def test_new_adapters_change_nothing(case: Case) -> None:
    fresh = {"lora": random_adapters(case.policy.config, LORA, 1)}
    published = case.policy.publish(case.base | fresh)
    jax.tree.map(np.testing.assert_array_equal, published, case.base)
