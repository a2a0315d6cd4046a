"""The whole model against transformers' Qwen2.5-VL in float32, on odd shapes."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from flax import nnx

from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import Qwen2_5_VL, abstract_model, next_position
from models.qwen2_5_vl.positions import Grid
from models.qwen2_5_vl.processor import Prompt, collate
from models.qwen2_5_vl.sizes import Size
from models.qwen2_5_vl.weights import load
from tests.oracle import hf_model
from tests.oracle.prompts import grids, random_prompt

# Text runs (numbers) and media (t, h, w in patches). Windows are 8 x 8 patches.
LAYOUTS: dict[str, list[int | Grid]] = {
    "one whole window": [5, Grid(2, 8, 8), 7],
    "ragged windows": [3, Grid(3, 10, 14), 6],
    "a strip": [4, Grid(2, 2, 18), 5],
    "two videos of different sizes": [2, Grid(2, 6, 10), 4, Grid(3, 12, 4), 5],
    "an image and a video": [3, Grid(1, 12, 6), 2, Grid(2, 4, 10), 6],
    "text only": [19],
}


@cache
def original(tied: bool, directory: str) -> Any:
    config = hf_model.released_config(tied=tied)
    model = hf_model.random_model(config, seed=3)
    hf_model.save_released(model, config, Path(directory))
    return model


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """tied -> (the original, ours with its weights loaded from a released-style directory)."""

    @cache
    def pair(tied: bool) -> tuple[Any, Qwen2_5_VL]:
        directory = tmp_path_factory.mktemp("model")
        theirs = original(tied, str(directory))
        config = ModelConfig.load(directory)
        graphdef, _ = abstract_model(config)
        return theirs, nnx.merge(graphdef, load(directory, config))

    return pair


def full_logits(model: Qwen2_5_VL, prompt: Prompt, completion: np.ndarray) -> np.ndarray:
    """[S + C, V] of one prompt and one completion, through the functions that training uses."""
    batch = jax.tree.map(lambda x: x[None], prompt)
    features = model.encode_vision(batch)
    hidden, _, _ = model.text(
        jnp.concatenate(
            [
                model.embed_prompt(batch, features),
                model.text.embed_tokens(jnp.asarray(completion)[None]),
            ],
            axis=1,
        ),
        jnp.concatenate(
            [
                batch.positions,
                jnp.broadcast_to(
                    (next_position(batch)[:, None] + np.arange(len(completion)))[..., None],
                    (1, len(completion), 3),
                ),
            ],
            axis=1,
        ),
        causal_attention,
    )
    return np.asarray(model.logits(hidden)[0])


def causal_attention(q: Any, k: Any, v: Any, extra: Any, carry: Any) -> Any:
    from models.attention import attend

    return attend(q, k, v, np.tril(np.ones((q.shape[1],) * 2, bool))), carry, None


def assert_close(ours: np.ndarray, theirs: torch.Tensor) -> None:
    """Design's bound: the largest error is at most 1e-4 of the logits' deviation."""
    expected = theirs.detach().numpy()
    deviation = expected.std()
    assert 1.0 <= deviation <= 5.0, f"logits must spread for the test to mean much: {deviation}"
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-4 * deviation)


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("name", LAYOUTS)
def test_logits_equal_the_originals(models: Any, name: str, tied: bool) -> None:
    theirs, ours = models(tied)
    rng = np.random.default_rng(len(name))
    prompt = random_prompt(rng, LAYOUTS[name], seconds_per_grid=1.3)
    completion = rng.integers(7, 320, 9, np.int32)
    expected = hf_model.logits(theirs, prompt, *grids(LAYOUTS[name]), completion)
    assert_close(full_logits(ours, prompt, completion), expected)


def test_greedy_tokens_equal_the_originals(models: Any) -> None:
    """Token by token through the caches, against the original's full forward each time."""
    theirs, ours = models(False)
    distinct: set[int] = set()
    for seed, layout in enumerate(LAYOUTS.values()):
        prompt = random_prompt(np.random.default_rng(seed), layout)
        expected: list[int] = []
        for _ in range(12):
            step = hf_model.logits(theirs, prompt, *grids(layout), np.array(expected, np.int32))
            expected.append(int(step[-1].argmax()))
        assert greedy(ours, prompt, 12) == expected
        distinct |= set(expected)
    assert len(distinct) >= 16


def greedy(model: Qwen2_5_VL, prompt: Prompt, length: int) -> list[int]:
    batch = jax.tree.map(lambda x: x[None], prompt)
    hidden, prompt_cache = model.prefill(batch, model.encode_vision(batch))
    cache = model.empty_cache(prompt_cache, group=1, length=length)
    decode = jax.jit(lambda token, step, cache: model.decode(token, step, prompt_cache, cache))
    tokens: list[int] = []
    hidden = hidden[:, None]
    for step in range(length):
        token = jnp.argmax(model.logits(hidden), -1)
        tokens.append(int(token[0, 0]))
        hidden, cache = decode(token, jnp.asarray(step), cache)
    return tokens


def test_a_padded_batch_equals_its_prompts_alone(models: Any) -> None:
    """Prompts of mixed sizes in one batch, against the original on each by itself."""
    theirs, ours = models(True)
    rng = np.random.default_rng(5)
    names = ["ragged windows", "an image and a video", "two videos of different sizes"]
    prompts = [random_prompt(rng, LAYOUTS[name]) for name in names]
    bucket = Size(*(3 + np.max([prompt.size for prompt in prompts], axis=0)))
    bucket = bucket._replace(patches=-(-bucket.patches // 4) * 4)
    batch = collate(prompts, bucket, pad_id=0)
    completions = rng.integers(7, 320, (3, 2, 6), np.int32)
    hidden = ours.completion_hidden(batch, ours.encode_vision(batch), completions)
    logits = np.asarray(ours.logits(hidden))
    for p, name in enumerate(names):
        length = len(prompts[p].tokens)
        for g in range(2):
            expected = hf_model.logits(theirs, prompts[p], *grids(LAYOUTS[name]), completions[p, g])
            assert_close(logits[p, g], expected[length - 1 : -1])


def test_vision_features_equal_the_originals(models: Any) -> None:
    theirs, ours = models(False)
    grid = Grid(3, 10, 14)
    prompt = random_prompt(np.random.default_rng(1), [2, grid, 2])
    batch = jax.tree.map(lambda x: x[None], prompt)
    assert_same_features(theirs, prompt, [grid], np.asarray(ours.encode_vision(batch))[0])


def test_features_of_large_and_small_frames_in_one_batch_equal_the_originals(models: Any) -> None:
    """Small frames share the rows that large ones need."""
    theirs, ours = models(False)
    media = [[Grid(2, 12, 14)], [Grid(21, 2, 6)], [Grid(1, 8, 8), Grid(3, 4, 6)]]
    rng = np.random.default_rng(2)
    prompts = [random_prompt(rng, [2, *grids_, 2]) for grids_ in media]
    bucket = Size(*np.max([prompt.size for prompt in prompts], axis=0).tolist())
    rows = max(prompt.size.rows(bucket.frame_patches) for prompt in prompts)
    batch = collate(prompts, bucket._replace(frames=rows), pad_id=0)
    assert batch.frame_index.shape == (3, 2, 168)
    features = np.asarray(ours.encode_vision(batch))
    for prompt, grids_, row in zip(prompts, media, features, strict=True):
        assert_same_features(theirs, prompt, grids_, row)


def assert_same_features(
    theirs: Any, prompt: Prompt, media: list[Grid], features: np.ndarray
) -> None:
    placed = features[prompt.vision_index[prompt.vision_index >= 0]]  # the original's order
    with torch.no_grad():
        expected = theirs.model.visual(
            hf_model.pixel_values(prompt), grid_thw=torch.tensor([tuple(grid) for grid in media])
        )
    expected = expected if isinstance(expected, torch.Tensor) else expected.pooler_output
    np.testing.assert_allclose(placed, expected.numpy(), rtol=0, atol=1e-4 * float(expected.std()))
