"""Weights to and from Hugging Face's safetensors, bit for bit, and what is refused."""

from __future__ import annotations

import json
import math
import re
import tracemalloc
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
import torch
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from models.qwen2_5_vl import weights
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model, random_params, weight_axes
from models.qwen2_5_vl.tensor_files import Tensor, TensorFiles, read_index
from models.qwen2_5_vl.weights import (
    TABLE,
    HostWeights,
    WeightError,
    load,
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


# ---- onto devices ----

MESH = ("x", "y")
FSDP = {"embed": "x", "vision_embed": "x"}
TENSOR = dict.fromkeys(("heads", "kv_heads", "vision_heads", "mlp", "vision_mlp", "vocab"), "y")
LAYOUTS: dict[str, tuple[tuple[int, int], dict[str, str]]] = {
    "replicated": ((4, 2), {}),
    "fsdp": ((8, 1), FSDP),
    "tensor": ((4, 2), TENSOR),
    "fsdp and tensor": ((4, 2), FSDP | TENSOR),
    "inside of heads": ((4, 2), {"head_dim": "x", "mlp": "y"}),
    "layers, and queries from keys": ((3, 2), {"layers": "x", "qkv": "x", "vocab": "y"}),
    "across the pixels of a patch": ((8, 1), {"patch": "x"}),
}


def layout(config: ModelConfig, name: str) -> dict[tuple[str, ...], NamedSharding]:
    """By path, where a weight lies on simulated devices."""
    shape, rules = LAYOUTS[name]
    devices = np.array(jax.devices()[: math.prod(shape)]).reshape(shape)
    mesh = Mesh(devices, MESH)

    def sharding(names: tuple[str, ...]) -> NamedSharding:
        # A mesh axis splits one axis of an array: stacked query weights by layer.
        axes = [rules.get(axis) for axis in names]
        axes = [axis if axis not in axes[:i] else None for i, axis in enumerate(axes)]
        return NamedSharding(mesh, PartitionSpec(*axes))

    axes_of = flatten_dict(weight_axes(config))
    return {path: sharding(names) for path, names in axes_of.items()}


class Counted(TensorFiles):
    """Counts what is read of each tensor."""

    def __init__(self) -> None:
        self.values: Counter[str] = Counter()

    def read(self, tensor: Tensor, part: tuple[slice, ...] = ()) -> np.ndarray:
        read = super().read(tensor, part)
        self.values[tensor.name] += read.size
        return read


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, ModelConfig]:
    """A directory in bfloat16, as released."""
    directory = tmp_path_factory.mktemp("small")
    return directory, write(directory, released_weights(dtype=torch.bfloat16))


@pytest.mark.parametrize("name", LAYOUTS)
def test_sharded_weights_are_the_unsharded_ones_bit_for_bit(
    small: tuple[Path, ModelConfig], monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """And what several devices hold is read once."""
    directory, config = small
    expected = flatten_dict(load(directory, config))
    counted = Counted()
    monkeypatch.setattr(weights, "TensorFiles", lambda: counted)
    shardings = layout(config, name)
    sharded = flatten_dict(load(directory, config, shardings=unflatten_dict(shardings)))
    assert sharded.keys() == expected.keys()
    for path, array in sharded.items():
        assert array.sharding == shardings[path]
        got, want = np.asarray(array), np.asarray(expected[path])
        np.testing.assert_array_equal(got.view(np.int32), want.view(np.int32), str(path))
    whole = {name: math.prod(tensor.shape) for name, tensor in read_index(directory).items()}
    if name == "across the pixels of a patch":  # the smallest boxes around its parts overlap
        assert counted.values.pop(PATCHES) <= 3 * whole.pop(PATCHES)
    assert counted.values == whole


PATCHES = "visual.patch_embed.proj.weight"


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name[:6] != "across"])
def test_a_host_reads_the_parts_of_its_devices_and_nothing_else(
    small: tuple[Path, ModelConfig], name: str
) -> None:
    """The host of the first half of the devices; the other half need not exist."""
    directory, config = small
    with Counted() as files:
        source = HostWeights(files, directory, config, np.float32)
        for path, sharding in layout(config, name).items():
            files.values.clear()
            shape = source.shapes[path]
            indices = list(sharding.devices_indices_map(shape).values())
            mine = {str(index): index for index in indices[: len(indices) // 2]}.values()
            needed = sum(source.read(path, index).size for index in mine)
            assert files.values.total() == needed
            assert needed * len(set(map(str, indices))) == math.prod(shape) * len(mine)


def test_only_what_is_asked_for_is_read(
    small: tuple[Path, ModelConfig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """For example the vision tower that a run froze."""
    directory, config = small
    counted = Counted()
    monkeypatch.setattr(weights, "TensorFiles", lambda: counted)
    shardings = unflatten_dict(layout(config, "fsdp"))
    tower = load(directory, config, shardings={"vision": shardings["vision"]})
    assert tower.keys() == {"vision"}
    assert counted.values.keys() == {
        name for name in read_index(directory) if name.startswith("visual.")
    }


def test_a_host_holds_one_part_of_one_weight_at_a_time(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Twice the largest shard: the shard, and what is read for it at once, here all of it."""
    raw = hf_model.released_config(tied=False, vocab=16_000, intermediate_size=3200)
    config = ModelConfig.from_dict(raw)
    random = random_params(config, seed=0)
    save(tmp_path, random, config, lambda name: np.dtype(np.float32))
    shardings = layout(config, "fsdp and tensor")
    sizes = {path: leaf.nbytes for path, leaf in flatten_dict(random).items()}
    parts = {
        path: len(set(map(str, shardings[path].devices_indices_map(leaf.shape).values())))
        for path, leaf in flatten_dict(random).items()
    }
    shard = max(size // parts[path] for path, size in sizes.items())

    put = jax.device_put  # a simulated device may work on the host's array: give it its own
    monkeypatch.setattr(jax, "device_put", lambda values, device: jnp.copy(put(values, device)))
    load(tmp_path, config, shardings=unflatten_dict(shardings))  # fills caches
    tracemalloc.start()
    load(tmp_path, config, shardings=unflatten_dict(shardings))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    python_objects = 300_000  # headers, shapes, shardings
    assert peak < 2 * shard + python_objects
    assert 2 * shard + python_objects < min(max(sizes.values()), sum(sizes.values()) / 10)


# ---- an output head in the file of a tied model ----


def test_a_tied_model_may_repeat_its_embedding(tmp_path: Path) -> None:
    tensors = released_weights(tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    config = write(tmp_path, tensors, tied=True)
    assert "head" not in load(tmp_path, config)["text"]


def test_a_tied_model_with_another_head_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(weights, "_ROWS", 100)
    tensors = released_weights(tied=True)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["lm_head.weight"][-1, 4] += 1  # in the last of the blocks of rows that are compared
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
