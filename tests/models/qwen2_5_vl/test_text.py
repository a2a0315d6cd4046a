"""The parts of the decoder; `test_model.py` compares the whole decoder with the original."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from transformers import Qwen2_5_VLConfig
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as original

from models.attention import attend
from models.layers import Remat, rms_norm
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model, random_params
from models.qwen2_5_vl.text import Decoder
from models.qwen2_5_vl.weights import load
from tests.oracle import hf_model
from tests.oracle.hf_model import released_config
from tests.oracle.prompts import grids, random_prompt

RELEASES = Path(__file__).parents[3] / "configs" / "models"


def decoder(raw: dict[str, Any], seed: int = 0) -> Decoder:
    config = ModelConfig.from_dict(raw)
    return nnx.merge(abstract_model(config)[0], random_params(config, seed)).text


@pytest.fixture(scope="module")
def small() -> Decoder:
    return decoder(released_config(tied=True))


def causal(q: Any, k: Any, v: Any, extra: Any, carry: Any) -> Any:
    return attend(q, k, v, np.tril(np.ones((q.shape[1],) * 2, bool))), carry, None


# ---- M-RoPE ----


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_rotary_embedding_of_the_7b_is_the_originals(dtype: str) -> None:
    directory = RELEASES / "Qwen2.5-VL-7B-Instruct"
    text_config = Qwen2_5_VLConfig.from_pretrained(directory).text_config
    rotary = original.Qwen2_5_VLRotaryEmbedding(text_config)
    positions = np.random.default_rng(0).integers(0, 300, (2, 30, 3), np.int32)
    expected = rotary(
        torch.zeros(1, dtype=getattr(torch, dtype)), torch.tensor(np.moveaxis(positions, 2, 0))
    )
    ours = abstract_decoder(ModelConfig.load(directory)).rotary(jnp.asarray(positions), dtype)
    for got, want in zip(ours, expected, strict=True):
        assert got.dtype == dtype
        assert got.shape == (2, 30, 128)
        got, want = np.asarray(got, np.float32), want.float().numpy()
        np.testing.assert_allclose(got, want, atol=4e-5 if dtype == "float32" else 4e-3)


def abstract_decoder(config: ModelConfig) -> Decoder:
    graphdef, shapes = abstract_model(config)
    return nnx.merge(graphdef, shapes).text


def test_far_positions_are_as_exact_as_float32_allows(small: Decoder) -> None:
    """At position 20,000 an angle is known to 1e-3; against float64."""
    positions = jnp.full((1, 1, 3), 20_000, jnp.int32)
    exponent = np.arange(8) / 8
    angle = 20_000 / 1e6**exponent
    np.testing.assert_allclose(
        small.rotary(positions, "float32")[0][0, 0, :8], np.cos(angle), atol=4e-3
    )


def test_each_axis_turns_its_own_frequencies(small: Decoder) -> None:
    """Sections [2, 3, 3]: time turns frequencies 0-1, rows 2-4, columns 5-7, in both halves."""
    for axis, turned in enumerate([[0, 1], [2, 3, 4], [5, 6, 7]]):
        positions = np.zeros((1, 1, 3), np.int32)
        positions[..., axis] = 50
        sin = np.asarray(small.rotary(jnp.asarray(positions), jnp.float32)[1])[0, 0]
        expected = turned + [8 + frequency for frequency in turned]
        np.testing.assert_array_equal(np.flatnonzero(sin), expected)


def test_queries_and_keys_are_rotated_as_in_the_original(small: Decoder) -> None:
    layer_def, params = nnx.split(small.layers)
    layer = nnx.merge(layer_def, jax.tree.map(lambda w: w[1], params))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 9, 64)), jnp.float32)
    cos, sin = small.rotary(jnp.asarray(rng.integers(0, 40, (2, 9, 3), np.int32)), jnp.float32)
    q, k, v = layer.query_key_value(x, jnp.ones_like(cos), jnp.zeros_like(sin))
    expected = original.apply_rotary_pos_emb(
        *(torch.tensor(np.asarray(a)) for a in (q, k, cos, sin)), unsqueeze_dim=2
    )
    rotated_q, rotated_k, same_v = layer.query_key_value(x, cos, sin)
    np.testing.assert_allclose(rotated_q, expected[0].numpy(), atol=1e-6)
    np.testing.assert_allclose(rotated_k, expected[1].numpy(), atol=1e-6)
    np.testing.assert_array_equal(same_v, v)


# ---- the layers ----


def test_eps_and_rotary_base_come_from_the_config(tmp_path: Path) -> None:
    """Against the original with values that no default has."""
    raw = released_config(tied=True, rms_norm_eps=0.5, rope_theta=100.0)
    theirs = hf_model.random_model(raw, seed=0)
    hf_model.save_released(theirs, raw, tmp_path)
    config = ModelConfig.load(tmp_path)
    ours = nnx.merge(abstract_model(config)[0], load(tmp_path, config)).text
    prompt = random_prompt(np.random.default_rng(0), [12])
    hidden, _, _ = ours(
        ours.embed_tokens(prompt.tokens[None]), jnp.asarray(prompt.positions)[None], causal
    )
    expected = hf_model.logits(theirs, prompt, *grids([12])).detach().numpy()
    np.testing.assert_allclose(
        ours.logits(hidden)[0], expected, rtol=0, atol=1e-4 * float(expected.std())
    )


def test_every_layer_gets_its_slice_and_hands_the_carry_on(small: Decoder) -> None:
    per_layer = jnp.array([10, 20, 30])

    def attention(q: Any, k: Any, v: Any, extra: Any, carry: Any) -> Any:
        return jnp.zeros_like(q), carry * 100 + extra, (extra, carry)

    x = small.embed_tokens(jnp.array([[8, 9]]))
    _, carry, (extras, carries) = small(
        x,
        jnp.zeros((1, 2, 3), jnp.int32),
        attention,
        per_layer=per_layer,
        carry=jnp.asarray(1),
    )
    assert int(carry) == 1_102_030
    np.testing.assert_array_equal(extras, per_layer)
    np.testing.assert_array_equal(carries, [1, 110, 11_020])


def test_kept_layers_are_what_each_layer_gives_up_to_the_final_norm(small: Decoder) -> None:
    x, positions = small.embed_tokens(jnp.array([[8, 9]])), jnp.zeros((1, 2, 3), jnp.int32)
    hidden, _, layers = small(x, positions, causal, keep=True)
    assert layers.shape == (3, 1, 2, 64)
    last = rms_norm(layers[-1], small.norm[...], small.config.norm_eps)
    np.testing.assert_allclose(last, hidden, rtol=1e-6)
    layer_def, params = nnx.split(small.layers)
    layer = nnx.merge(layer_def, jax.tree.map(lambda w: w[1], params))
    q, k, v = layer.query_key_value(layers[0], *small.rotary(positions, x.dtype))
    expected = layer.finish(layers[0], causal(q, k, v, None, None)[0])
    np.testing.assert_allclose(layers[1], expected, atol=1e-5)


def test_there_may_be_two_batch_axes(small: Decoder) -> None:
    """Prompt and completion axes, in decoding."""
    tokens = np.random.default_rng(0).integers(7, 320, (2, 3, 4), np.int32)
    positions = np.random.default_rng(1).integers(0, 9, (2, 3, 4, 3), np.int32)
    mask = np.tril(np.ones((4, 4), bool))

    def attention(q: Any, k: Any, v: Any, extra: Any, carry: Any) -> Any:
        return attend(q, k, v, mask), carry, None

    together, _, _ = small(small.embed_tokens(tokens), jnp.asarray(positions), attention)
    alone, _, _ = small(small.embed_tokens(tokens[1, 2:]), jnp.asarray(positions[1, 2:]), attention)
    np.testing.assert_allclose(together[1, 2], alone[0], atol=1e-5)


@pytest.mark.parametrize("remat", ["products", "layer"])
def test_rematerialisation_changes_neither_outputs_nor_gradients(
    small: Decoder, remat: Remat
) -> None:
    graphdef, params = nnx.split(small)
    tokens = np.random.default_rng(0).integers(7, 320, (1, 6), np.int32)

    @jax.jit(static_argnames="remat")
    def loss_and_gradient(params: nnx.State, remat: Remat) -> tuple[jax.Array, nnx.State]:
        def loss(params: nnx.State) -> jax.Array:
            model = nnx.merge(graphdef, params)
            positions = jnp.broadcast_to(jnp.arange(6, dtype=jnp.int32)[:, None], (1, 6, 3))
            hidden, _, _ = model(model.embed_tokens(tokens), positions, causal, remat=remat)
            return -jax.nn.log_softmax(model.logits(hidden))[0, :, 7].sum()

        return jax.value_and_grad(loss)(params)

    kept, kept_gradient = loss_and_gradient(params, "none")
    again, again_gradient = loss_and_gradient(params, remat)
    assert float(again) == pytest.approx(float(kept), rel=1e-5)
    for a, b in zip(*map(jax.tree.leaves, (again_gradient, kept_gradient)), strict=True):
        assert float(jnp.abs(b).max()) > 0, "every weight of the decoder is used"
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


# ---- the output head ----


def test_a_tied_head_is_the_embedding(small: Decoder) -> None:
    assert "head" not in nnx.to_pure_dict(nnx.state(small))
    hidden = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    expected = hidden @ np.asarray(small.embed[...]).T
    np.testing.assert_allclose(small.logits(hidden), expected, atol=1e-5)


def test_an_untied_head_is_its_own() -> None:
    untied = decoder(released_config(tied=False))
    hidden = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    expected = hidden @ np.asarray(untied.head[...]).T
    np.testing.assert_allclose(untied.logits(hidden), expected, atol=1e-5)


def test_logits_are_float32_also_from_bfloat16(small: Decoder) -> None:
    """Summed in float32, not rounded to bfloat16 at the end."""
    graphdef, params = nnx.split(small)
    half = nnx.merge(graphdef, jax.tree.map(lambda w: w.astype(jnp.bfloat16), params))
    hidden = jnp.asarray(np.random.default_rng(0).standard_normal((2, 64)), jnp.bfloat16)
    logits = half.logits(hidden)
    assert logits.dtype == jnp.float32
    exact = hidden.astype(jnp.float32) @ half.embed[...].astype(jnp.float32).T
    np.testing.assert_allclose(logits, exact, rtol=1e-5, atol=1e-5)
