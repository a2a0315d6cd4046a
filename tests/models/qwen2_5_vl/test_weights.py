"""Weights to and from Hugging Face's safetensors, bit for bit, and what is refused."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model, weight_axes
from models.qwen2_5_vl.weights import (
    TABLE,
    WeightError,
    load,
    read_index,
    released_tensors,
    save,
)
from tests.oracle import hf_model

RELEASES = Path(__file__).parents[3] / "configs" / "models"
Tensors = dict[str, torch.Tensor]


@cache
def _original(tied: bool) -> Any:
    return hf_model.random_model(hf_model.released_config(tied=tied), seed=1)


def released_weights(tied: bool = False, dtype: torch.dtype = torch.float32) -> Tensors:
    """Every tensor of a small model by released name."""
    tensors = {
        hf_model.released(name): tensor.to(dtype).contiguous()
        for name, tensor in _original(tied).state_dict().items()
    }
    if tied:
        tensors.pop("lm_head.weight", None)
    return tensors


def write(directory: Path, *files: Tensors, tied: bool = False) -> ModelConfig:
    """A model directory of one file, or of several without an index."""
    raw = hf_model.released_config(tied=tied)
    (directory / "config.json").write_text(json.dumps(raw))
    for number, tensors in enumerate(files):
        name = f"part-{number}.safetensors" if len(files) > 1 else "model.safetensors"
        save_file(tensors, directory / name)
    return ModelConfig.load(directory)


def assert_same_bits(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        as_integers = torch.int32 if tensor.dtype == torch.float32 else torch.int16
        assert torch.equal(got[name].view(as_integers), tensor.view(as_integers)), name


# ---- there and back ----


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_round_trip_keeps_every_bit(tmp_path: Path, dtype: torch.dtype, tied: bool) -> None:
    """Through the float32 parameters of training."""
    expected = released_weights(tied, dtype)
    config = write(tmp_path, expected, tied=tied)
    params = load(tmp_path, config)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(np.float32)}
    source = read_index(tmp_path)
    out = tmp_path / "out"
    out.mkdir()
    files = save(out, params, config, lambda name: source[name].dtype)
    assert files == [out / "model.safetensors"] == list(out.iterdir())
    assert_same_bits(load_file(files[0]), expected)


def test_each_tensor_may_have_its_own_type(tmp_path: Path) -> None:
    expected = {
        name: tensor if "norm" in name or "ln_q" in name else tensor.to(torch.bfloat16)
        for name, tensor in released_weights().items()
    }
    config = write(tmp_path, expected)
    source = read_index(tmp_path)
    assert {tensor.dtype.name for tensor in source.values()} == {"float32", "bfloat16"}
    params = load(tmp_path, config)
    [file] = save(tmp_path, params, config, lambda name: source[name].dtype)
    assert_same_bits(load_file(file), expected)


def test_a_float32_master_is_rounded_to_nearest(tmp_path: Path) -> None:
    """Written as bfloat16 it is what torch rounds it to."""
    config = write(tmp_path, released_weights())
    bfloat16 = np.dtype(ml_dtypes.bfloat16)
    [file] = save(tmp_path, load(tmp_path, config), config, lambda name: bfloat16)
    assert_same_bits(load_file(file), released_weights(dtype=torch.bfloat16))


def test_parameters_can_be_loaded_in_bfloat16(tmp_path: Path) -> None:
    config = write(tmp_path, released_weights(dtype=torch.bfloat16))
    params = load(tmp_path, config, dtype=ml_dtypes.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype(ml_dtypes.bfloat16)}


def test_shards_have_an_index_and_a_bound(tmp_path: Path) -> None:
    expected = released_weights()
    config = write(tmp_path, expected)
    out = tmp_path / "out"
    out.mkdir()
    bound = 100_000
    files = save(
        out, load(tmp_path, config), config, lambda name: np.dtype(np.float32), shard_bytes=bound
    )
    *shards, index_file = files
    assert set(files) == set(out.iterdir())
    assert index_file.name == "model.safetensors.index.json"
    assert len(shards) > 2
    assert [shard.name for shard in shards] == [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    index = json.loads(index_file.read_text())
    together: Tensors = {}
    for shard in shards:
        tensors = load_file(shard)
        size = sum(tensor.nbytes for tensor in tensors.values())
        assert size <= bound or len(tensors) == 1
        assert all(index["weight_map"].pop(name) == shard.name for name in tensors)
        together |= tensors
    assert not index["weight_map"]
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
    assert_same_bits(together, expected)
    again = load(out, config)
    jax.tree.map(np.testing.assert_array_equal, again, load(tmp_path, config))


def test_files_say_that_they_are_for_pytorch(tmp_path: Path) -> None:
    """transformers 4 refuses safetensors without this."""
    config = write(tmp_path, released_weights())
    [file] = save(tmp_path, load(tmp_path, config), config, lambda name: np.dtype(np.float32))
    with safe_open(file, framework="numpy") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_shards_of_others_are_read_through_their_index(tmp_path: Path) -> None:
    """A stray file beside them is not."""
    raw = hf_model.released_config(tied=False)
    hf_model.save_released(_original(False), raw, tmp_path, shards=3)
    save_file({"adapter.weight": torch.zeros(2)}, tmp_path / "adapter.safetensors")
    config = ModelConfig.load(tmp_path)
    ours = {name: torch.tensor(a) for name, a in released_tensors(load(tmp_path, config), config)}
    assert_same_bits(ours, released_weights())


def test_the_names_of_transformers_5_are_read(tmp_path: Path) -> None:
    newer = {name: t.contiguous() for name, t in _original(False).state_dict().items()}
    assert any(name.startswith("model.language_model.layers.") for name in newer)
    assert any(name.startswith("model.visual.blocks.") for name in newer)
    config = write(tmp_path, newer)
    ours = {name: torch.tensor(a) for name, a in released_tensors(load(tmp_path, config), config)}
    assert_same_bits(ours, released_weights())


def test_each_weight_is_placed_once_with_its_path(tmp_path: Path) -> None:
    config = write(tmp_path, released_weights())
    placed: dict[tuple[str, ...], tuple[int, ...]] = {}

    def place(array: np.ndarray, path: tuple[str, ...]) -> jax.Array:
        assert path not in placed
        placed[path] = array.shape
        return jax.device_put(array)

    load(tmp_path, config, place=place)
    shapes = flatten_dict(abstract_model(config)[1])
    assert placed == {path: shape.shape for path, shape in shapes.items()}


# ---- an output head in the file of a tied model ----


def test_a_tied_model_may_repeat_its_embedding(tmp_path: Path) -> None:
    tensors = released_weights(tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    config = write(tmp_path, tensors, tied=True)
    assert "head" not in load(tmp_path, config)["text"]


def test_a_tied_model_with_another_head_is_refused(tmp_path: Path) -> None:
    tensors = released_weights(tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][3, 4] += 1
    config = write(tmp_path, tensors, tied=True)
    with pytest.raises(WeightError, match="lm_head.weight, which differs from the embedding"):
        load(tmp_path, config)


# ---- what is refused ----


def test_a_directory_without_weights_says_what_is_read(tmp_path: Path) -> None:
    config = write(tmp_path)
    with pytest.raises(FileNotFoundError, match=re.escape(f"{tmp_path} has no *.safetensors")):
        load(tmp_path, config)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    raw = hf_model.released_config(tied=False)
    hf_model.save_released(_original(False), raw, tmp_path, shards=3)
    (tmp_path / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="model-00002-of-00003.safetensors is named in"):
        load(tmp_path, ModelConfig.load(tmp_path))


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    tensors = released_weights()
    del tensors["model.layers.2.mlp.up_proj.weight"]
    config = write(tmp_path, tensors)
    with pytest.raises(WeightError, match=r"missing: model\.layers\.2\.mlp\.up_proj\.weight"):
        load(tmp_path, config)


def test_an_untied_model_needs_its_head(tmp_path: Path) -> None:
    tensors = released_weights()
    del tensors["lm_head.weight"]
    config = write(tmp_path, tensors)
    with pytest.raises(WeightError, match=r"missing: lm_head\.weight"):
        load(tmp_path, config)


@pytest.mark.parametrize(
    "name",
    ["model.layers.3.input_layernorm.weight", "model.layers.0.self_attn.o_proj.bias", "scale"],
    ids=["a layer too many", "a bias where none is", "anything else"],
)
def test_an_unknown_tensor_is_named(tmp_path: Path, name: str) -> None:
    config = write(tmp_path, released_weights() | {name: torch.zeros(64)})
    with pytest.raises(WeightError, match=re.escape(f"unknown: {name}")):
        load(tmp_path, config)


def test_a_mis_shaped_tensor_is_named_with_both_shapes(tmp_path: Path) -> None:
    tensors = released_weights()
    tensors["visual.patch_embed.proj.weight"] = torch.zeros(32, 3, 14, 14, 2)
    config = write(tmp_path, tensors)
    expected = (
        "mis-shaped: visual.patch_embed.proj.weight is (32, 3, 14, 14, 2), "
        "expected (32, 3, 2, 14, 14)"
    )
    with pytest.raises(WeightError, match=re.escape(expected)):
        load(tmp_path, config)


def test_all_problems_are_named_up_to_a_bound(tmp_path: Path) -> None:
    tensors = released_weights()
    del tensors["model.norm.weight"]
    config = write(tmp_path, tensors | {f"extra.{i}": torch.zeros(1) for i in range(30)})
    with pytest.raises(WeightError) as caught:
        load(tmp_path, config)
    message = str(caught.value)
    assert "missing: model.norm.weight" in message and "unknown: extra.0" in message
    assert message.endswith("... and 11 more")


def test_a_tensor_in_two_files_is_named_with_both(tmp_path: Path) -> None:
    tensors = released_weights()
    config = write(tmp_path, tensors, {"model.norm.weight": tensors["model.norm.weight"]})
    with pytest.raises(WeightError, match="model.norm.weight is there twice") as caught:
        load(tmp_path, config)
    assert "part-0.safetensors" in str(caught.value)
    assert "part-1.safetensors" in str(caught.value)


def test_a_tensor_under_both_names_is_there_twice(tmp_path: Path) -> None:
    tensors = released_weights()
    tensors["model.language_model.norm.weight"] = tensors["model.norm.weight"].clone()
    config = write(tmp_path, tensors)
    with pytest.raises(WeightError, match="as model.language_model.norm.weight"):
        load(tmp_path, config)


@pytest.mark.parametrize(
    ("dtype", "spelled"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")], ids=str
)
def test_a_quantised_tensor_is_named(tmp_path: Path, dtype: torch.dtype, spelled: str) -> None:
    tensors = released_weights()
    tensors["model.norm.weight"] = tensors["model.norm.weight"].to(dtype)
    config = write(tmp_path, tensors)
    with pytest.raises(WeightError, match=f"tensor model.norm.weight has type {spelled}"):
        load(tmp_path, config)


# ---- the table, and real sizes ----


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_table_has_every_parameter_exactly_once(tied: bool) -> None:
    config = ModelConfig.from_dict(hf_model.released_config(tied=tied))
    _, shapes = abstract_model(config)
    rows = Counter(row.ours for row in TABLE)
    assert set(rows.values()) == {1}
    assert len({row.theirs for row in TABLE}) == len(TABLE)
    ours = {".".join(path) for path in flatten_dict(shapes)}
    assert rows.keys() - ours == ({"text.head"} if tied else set())
    assert not ours - rows.keys()


def real_size(size: str) -> tuple[Path, ModelConfig, Any]:
    directory = RELEASES / f"Qwen2.5-VL-{size}-Instruct"
    config = ModelConfig.load(directory)
    return directory, config, abstract_model(config)[1]


@pytest.mark.parametrize(
    ("size", "tensors", "parameters"),
    [("3B", 824, 3_754_622_976), ("7B", 729, 8_292_166_656), ("72B", 1353, 73_410_777_344)],
)
def test_a_real_size_has_the_originals_names_shapes_and_count(
    size: str, tensors: int, parameters: int
) -> None:
    """Nothing is allocated on either side: shapes here, the meta device there."""
    directory, config, shapes = real_size(size)
    assert sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes)) == parameters
    zeros = jax.tree.map(lambda s: np.broadcast_to(np.zeros((), bool), s.shape), shapes)
    ours = {name: array.shape for name, array in released_tensors(zeros, config)}
    assert len(ours) == tensors
    with torch.device("meta"):
        original = Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig.from_pretrained(directory))
    theirs = {hf_model.released(k): tuple(v.shape) for k, v in original.state_dict().items()}
    if config.text.tied:
        del theirs["lm_head.weight"]  # released without it
    assert ours == theirs


@pytest.mark.parametrize("size", ["3B", "7B", "72B"])
def test_every_weight_of_a_real_size_has_a_name_per_axis(size: str) -> None:
    _, config, shapes = real_size(size)
    axes = flatten_dict(weight_axes(config))
    flat = flatten_dict(shapes)
    assert axes.keys() == flat.keys()
    assert all(len(axes[path]) == len(flat[path].shape) for path in flat)
