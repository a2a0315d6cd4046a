"""The parts of the vision tower; `test_model.py` compares the whole tower with the original."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen2_5_VLConfig
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD
from transformers.models.qwen2_5_vl import modeling_qwen2_5_vl as original

from models.layers import Remat
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model, random_params
from models.qwen2_5_vl.positions import Grid, pack_frames
from models.qwen2_5_vl.vision import VisionTower, _frame_numbers, invert, permute
from tests.oracle.hf_model import released_config
from tests.oracle.prompts import random_prompt

RAW = released_config(tied=True)
CONFIG = ModelConfig.from_dict(RAW)


@pytest.fixture(scope="module")
def tower() -> VisionTower:
    return nnx.merge(abstract_model(CONFIG)[0], random_params(CONFIG, seed=0)).vision


# ---- moving patches ----


@st.composite
def partial_permutations(draw: st.DrawFn) -> tuple[np.ndarray, int]:
    """(int32[2, J] with -1 for padding and each row at most once, number of rows)."""
    rows, slots = draw(st.sampled_from([(5, 7), (7, 4), (1, 1)]))  # few shapes to compile
    index = np.full((2, slots), -1, np.int32)
    for line in index:
        count = draw(st.integers(0, min(rows, slots)))
        chosen = draw(st.permutations(range(slots)))[:count]
        line[chosen] = draw(st.permutations(range(rows)))[:count]
    return index, rows


def test_the_example_of_the_docstring_holds() -> None:
    index = jnp.array([[2, 0, -1]])
    inverse = invert(index, 4)
    np.testing.assert_array_equal(inverse, [[1, -1, 0, -1]])
    x = jnp.arange(10.0, 14.0)[None, :, None]
    np.testing.assert_array_equal(permute(x, index, inverse)[0, :, 0], [12, 10, 0])


@given(partial_permutations())
@settings(max_examples=30, deadline=None)
def test_an_inverse_says_where_each_row_went(case: tuple[np.ndarray, int]) -> None:
    index, rows = case
    inverse = np.asarray(invert(jnp.asarray(index), rows))
    for line, back in zip(index, inverse, strict=True):
        expected = [list(line).index(row) if row in line else -1 for row in range(rows)]
        np.testing.assert_array_equal(back, expected)


@given(partial_permutations())
@settings(max_examples=15, deadline=None)
def test_the_gradient_of_permute_is_the_gathers_own(case: tuple[np.ndarray, int]) -> None:
    index, rows = case

    def gather(x: jax.Array) -> jax.Array:
        taken = jax.vmap(lambda x, i: x[i])(x, jnp.maximum(index, 0))
        return jnp.where((index >= 0)[..., None, None], taken, 0.0)

    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, rows, 3, 2)), jnp.float32)
    inverse = invert(jnp.asarray(index), rows)
    ours, pullback = jax.vjp(lambda x: permute(x, index, inverse), x)
    expected, expected_pullback = jax.vjp(gather, x)
    np.testing.assert_array_equal(ours, expected)
    cotangent = jnp.asarray(rng.standard_normal(ours.shape), jnp.float32)
    np.testing.assert_array_equal(pullback(cotangent)[0], expected_pullback(cotangent)[0])


# ---- rotation, pixels ----


def test_the_rotary_embedding_is_the_originals(tower: VisionTower) -> None:
    vision_config = Qwen2_5_VLConfig.from_dict(RAW).vision_config
    rotary = original.Qwen2_5_VLVisionRotaryEmbedding(vision_config)
    patch_hw = np.random.default_rng(0).integers(0, 200, (40, 2), np.int32)
    expected = rotary(torch.zeros(1), torch.tensor(patch_hw))
    ours = tower.rotary(jnp.asarray(patch_hw)[None])
    for got, want in zip(ours, expected, strict=True):
        assert got.dtype == jnp.float32
        np.testing.assert_allclose(got[0], want.numpy(), atol=2e-5)


def test_queries_and_keys_are_rotated_as_in_the_original(tower: VisionTower) -> None:
    """Against the original's rotation of what an unrotated block makes."""
    block_def, params = nnx.split(tower.blocks)
    block = nnx.merge(block_def, jax.tree.map(lambda w: w[1], params))
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 12, CONFIG.vision.width)), jnp.float32)
    cos, sin = tower.rotary(jnp.asarray(rng.integers(0, 30, (1, 12, 2), np.int32)))
    plain = np.asarray(block.query_key_value(x, jnp.ones_like(cos), jnp.zeros_like(sin)))
    q, k, v = (torch.tensor(part) for part in np.moveaxis(plain[0], -2, 0))
    angles = [torch.tensor(np.asarray(a[0])) for a in (cos, sin)]
    q, k = original.apply_rotary_pos_emb_vision(q, k, *angles)
    ours = np.moveaxis(np.asarray(block.query_key_value(x, cos, sin))[0], -2, 0)
    for got, want in zip(ours, (q, k, v), strict=True):
        np.testing.assert_allclose(got, want.numpy(), atol=1e-6)


def test_pixels_are_normalised_by_clips_statistics_per_channel(tower: VisionTower) -> None:
    patches = np.random.default_rng(0).integers(0, 256, (1, 6, 1176), np.uint8)
    channels = patches.reshape(1, 6, 3, 2 * 14 * 14) / 255
    mean, std = (np.array(s)[:, None] for s in (OPENAI_CLIP_MEAN, OPENAI_CLIP_STD))
    ours = tower.normalise(jnp.asarray(patches))
    assert ours.dtype == jnp.float32
    np.testing.assert_allclose(ours, ((channels - mean) / std).reshape(1, 6, 1176), atol=1e-5)


# ---- the tower ----


@pytest.mark.parametrize("remat", ["products", "layer"])
def test_rematerialisation_changes_neither_features_nor_gradients(
    tower: VisionTower, remat: Remat
) -> None:
    prompt = random_prompt(np.random.default_rng(0), [1, Grid(2, 6, 10)])
    batch = jax.tree.map(lambda x: x[None], prompt)
    graphdef, params = nnx.split(tower)

    @jax.jit(static_argnames="remat")
    def features_and_gradient(params: nnx.State, remat: Remat) -> tuple[jax.Array, nnx.State]:
        def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            features, _ = nnx.merge(graphdef, params)(
                batch.patches, batch.patch_hw, batch.window_index, batch.frame_index, remat=remat
            )
            return jnp.sum(jnp.square(features)), features

        gradient, features = jax.grad(loss, has_aux=True)(params)
        return features, gradient

    kept, kept_gradient = features_and_gradient(params, "none")
    again, again_gradient = features_and_gradient(params, remat)
    np.testing.assert_allclose(again, kept, rtol=1e-5, atol=1e-6)
    for a, b in zip(*map(jax.tree.leaves, (again_gradient, kept_gradient)), strict=True):
        assert float(jnp.abs(b).max()) > 0, "every weight of the tower is used"
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * float(jnp.abs(b).max()))


def test_frames_that_share_a_row_are_as_frames_in_rows_of_their_own(tower: VisionTower) -> None:
    """Features and gradients."""
    rng = np.random.default_rng(0)
    prompt = random_prompt(rng, [1, Grid(9, 4, 6), 2, Grid(1, 6, 8)])
    graphdef, params = nnx.split(tower)
    weight = rng.standard_normal((1, len(prompt.patches) // 4, CONFIG.text.width))

    @jax.jit
    def features_and_gradient(params: nnx.State, table: jax.Array) -> tuple[jax.Array, nnx.State]:
        def loss(params: nnx.State) -> tuple[jax.Array, jax.Array]:
            rest = (prompt.patches, prompt.patch_hw, prompt.window_index)
            features, _ = nnx.merge(graphdef, params)(*(jnp.asarray(x)[None] for x in rest), table)
            return jnp.sum(features * weight), features

        gradient, features = jax.grad(loss, has_aux=True)(params)
        return features, gradient

    apart, packed = np.full((2, 1, 10, 110), -1, np.int32)
    apart[0, :, :48] = prompt.frame_index
    packed[0, :3] = pack_frames(prompt.frame_index, 110)
    assert [np.count_nonzero(row >= 0) for row in packed[0, :4]] == [96, 96, 24 + 48, 0]
    expected, expected_gradient = features_and_gradient(params, apart)
    features, gradient = features_and_gradient(params, packed)
    np.testing.assert_allclose(features, expected, rtol=0, atol=1e-5 * float(expected.std()))
    for a, b in zip(*map(jax.tree.leaves, (gradient, expected_gradient)), strict=True):
        assert float(jnp.linalg.norm(a - b)) <= 1e-5 * float(jnp.linalg.norm(b))


def test_frames_are_numbered_as_in_the_docstring() -> None:
    patch_hw = jnp.array([[[0, 0], [0, 1], [0, 0], [0, 0]]])  # the last is padding
    table = jnp.array([[[0, 1, 2, -1]]])
    inverse, number = _frame_numbers(table, patch_hw)
    np.testing.assert_array_equal(inverse, [[0, 1, 2, -1]])
    np.testing.assert_array_equal(number, [[[1, 1, 2, 0]]])


def test_kept_blocks_are_what_each_block_gives_up_to_the_merger(tower: VisionTower) -> None:
    prompt = random_prompt(np.random.default_rng(0), [1, Grid(2, 4, 4)])
    batch = jax.tree.map(lambda x: x[None], prompt)
    inputs = (batch.patches, batch.patch_hw, batch.window_index, batch.frame_index)
    features, blocks = tower(*inputs, keep=True)
    assert blocks is not None and blocks.shape == (3, 1, 32, CONFIG.vision.width)
    merged = tower.merger(blocks[-1], CONFIG.vision.merge_area)
    np.testing.assert_allclose(merged, features, atol=1e-5)
    np.testing.assert_allclose(tower(*inputs)[0], features, atol=1e-5)


def test_features_have_the_weights_type_and_the_text_models_width(tower: VisionTower) -> None:
    prompt = random_prompt(np.random.default_rng(0), [1, Grid(2, 4, 4)])
    batch = jax.tree.map(lambda x: x[None], prompt)
    graphdef, params = nnx.split(tower)
    half = nnx.merge(graphdef, jax.tree.map(lambda w: w.astype(jnp.bfloat16), params))
    inputs = (batch.patches, batch.patch_hw, batch.window_index, batch.frame_index)
    (features, _), (exact, _) = half(*inputs), tower(*inputs)
    assert features.shape == (1, 8, CONFIG.text.width)
    assert features.dtype == jnp.bfloat16
    scale = float(exact.std())
    np.testing.assert_allclose(features.astype(jnp.float32), exact, rtol=0, atol=0.1 * scale)
