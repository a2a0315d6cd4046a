"""Weights between Hugging Face's safetensors and our parameter tree, by one table, both ways.

A row says where a released tensor lives in our tree and how its axes are rearranged, as an einops
pattern that is read from left to right to load and from right to left to export. `{n}` in a name
stands for the layer: those tensors are stacked along a leading layer axis.
"""

from __future__ import annotations

import gc
import itertools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from jax.sharding import Sharding

from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model
from models.qwen2_5_vl.tensor_files import (
    Tensor,
    TensorFiles,
    WeightError,
    read_index,
    write_shards,
)
from models.slicing import read_part

Path_ = tuple[str, ...]


class Row(NamedTuple):
    """One kind of weight."""

    ours: str  # dotted path in the parameter tree
    theirs: str  # released name
    pattern: str  # einops: released axes -> our axes

    @property
    def backward(self) -> str:
        """The pattern from our axes to the released ones."""
        left, right = self.pattern.split(" -> ")
        return f"{right} -> {left}"

    @property
    def stacked(self) -> bool:
        """Whether ours stacks the released tensors of all layers."""
        return "{n}" in self.theirs


# Letters as in text.py and vision.py; (N H) is a released axis that ours keeps apart.
_TEXT = [
    Row("text.embed", "model.embed_tokens.weight", "V D -> V D"),
    Row("text.norm", "model.norm.weight", "D -> D"),
    Row("text.head", "lm_head.weight", "V D -> V D"),
] + [
    Row(f"text.layers.{ours}", f"model.layers.{{n}}.{theirs}", pattern)
    for ours, theirs, pattern in [
        ("attention_norm", "input_layernorm.weight", "D -> D"),
        ("q", "self_attn.q_proj.weight", "(N H) D -> D N H"),
        ("q_bias", "self_attn.q_proj.bias", "(N H) -> N H"),
        ("k", "self_attn.k_proj.weight", "(K H) D -> D K H"),
        ("k_bias", "self_attn.k_proj.bias", "(K H) -> K H"),
        ("v", "self_attn.v_proj.weight", "(K H) D -> D K H"),
        ("v_bias", "self_attn.v_proj.bias", "(K H) -> K H"),
        ("o", "self_attn.o_proj.weight", "D (N H) -> N H D"),
        ("mlp_norm", "post_attention_layernorm.weight", "D -> D"),
        ("gate", "mlp.gate_proj.weight", "F D -> D F"),
        ("up", "mlp.up_proj.weight", "F D -> D F"),
        ("down", "mlp.down_proj.weight", "D F -> F D"),
    ]
]
_VISION = [
    Row("vision.patch_embed", "visual.patch_embed.proj.weight", "D C T Y X -> (C T Y X) D"),
    Row("vision.merger.norm", "visual.merger.ln_q.weight", "D -> D"),
    Row("vision.merger.hidden", "visual.merger.mlp.0.weight", "E2 E -> E E2"),
    Row("vision.merger.hidden_bias", "visual.merger.mlp.0.bias", "E -> E"),
    Row("vision.merger.out", "visual.merger.mlp.2.weight", "O E -> E O"),
    Row("vision.merger.out_bias", "visual.merger.mlp.2.bias", "O -> O"),
] + [
    Row(f"vision.blocks.{ours}", f"visual.blocks.{{n}}.{theirs}", pattern)
    for ours, theirs, pattern in [
        ("norm1", "norm1.weight", "D -> D"),
        ("qkv", "attn.qkv.weight", "(QKV A H) D -> D A QKV H"),
        ("qkv_bias", "attn.qkv.bias", "(QKV A H) -> A QKV H"),
        ("proj", "attn.proj.weight", "D (A H) -> A H D"),
        ("proj_bias", "attn.proj.bias", "D -> D"),
        ("norm2", "norm2.weight", "D -> D"),
        ("gate", "mlp.gate_proj.weight", "F D -> D F"),
        ("gate_bias", "mlp.gate_proj.bias", "F -> F"),
        ("up", "mlp.up_proj.weight", "F D -> D F"),
        ("up_bias", "mlp.up_proj.bias", "F -> F"),
        ("down", "mlp.down_proj.weight", "D F -> F D"),
        ("down_bias", "mlp.down_proj.bias", "D -> D"),
    ]
]
TABLE: tuple[Row, ...] = tuple(_TEXT + _VISION)

_SHARD_BYTES = 5 * 1000**3  # as transformers writes them
_ROWS = 4096  # of an embedding, compared at a time


def axis_sizes(config: ModelConfig) -> dict[str, dict[str, int]]:
    """The lengths of the axes that patterns split, for the text model and the vision tower."""
    text, vision = config.text, config.vision
    return {
        "text": {"N": text.heads, "K": text.kv_heads, "H": text.head_dim},
        "vision": {
            "A": vision.heads,
            "H": vision.head_dim,
            "QKV": 3,
            "C": 3,
            "T": vision.temporal_patch_size,
            "Y": vision.patch_size,
            "X": vision.patch_size,
        },
    }


# ---- loading ----


def load(
    directory: str | Path,
    config: ModelConfig,
    *,
    dtype: Any = np.float32,
    shardings: Any = None,
) -> dict[str, Any]:
    """Reads a Hugging Face directory into our parameter tree.

    A process reads the parts that its devices hold, each once, and has one of them in host memory
    at a time: at most twice the bytes of the largest shard, however large the model. (Files are
    mapped: where the innermost axis of a file's tensor is split, whole pages are read from disk.)

    Args:
      directory: holds *.safetensors under the released or the newer names.
      config: from the same directory.
      dtype: of the parameters (float32 for training's master weights).
      shardings: where weights lie, in the nesting of the parameters; only those that it names are
        read. None: all, on one device.

    Raises:
      FileNotFoundError: a file is missing.
      WeightError: a tensor is unknown, missing, there twice, or of another shape; all are named.
    """
    with TensorFiles() as files:
        weights = HostWeights(files, directory, config, dtype)
        one_device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        where: dict[Path_, Sharding] = (
            dict.fromkeys(weights.shapes, one_device)
            if shardings is None
            else flatten_dict(shardings)
        )
        params = {
            path: _from_shards(partial(weights.read, path), weights.shapes[path], sharding)
            for path, sharding in where.items()
        }
    return unflatten_dict(params)


class HostWeights:
    """The weights of a Hugging Face directory as our arrays, of which any part can be read."""

    def __init__(
        self, files: TensorFiles, directory: str | Path, config: ModelConfig, dtype: Any
    ) -> None:
        """Args, raises: see `load`."""
        shapes = flatten_dict(abstract_model(config)[1])
        self.shapes: dict[Path_, tuple[int, ...]] = {path: x.shape for path, x in shapes.items()}
        self._weights = {weight.path: weight for weight in _placed(config, shapes)}
        self._tensors = model_tensors(directory, config)
        self._files = files
        self._dtype = np.dtype(dtype)

    def read(self, path: Path_, index: Sequence[slice]) -> np.ndarray:
        """Part `index` (one slice for each axis, step 1) of the weight at `path`, in our type."""
        weight = self._weights[path]
        lengths = [len(range(n)[part]) for part, n in zip(index, weight.shape, strict=True)]
        values = np.empty(lengths, self._dtype)
        if not weight.row.stacked:
            values[...] = self._read_released(weight, weight.names[0], index)
            return values
        layers, *rest = index
        for layer, name in zip(values, weight.names[layers], strict=True):
            layer[...] = self._read_released(weight, name, rest)
        return values

    def _read_released(self, weight: _Placed, name: str, index: Sequence[slice]) -> np.ndarray:
        tensor = self._tensors[name]
        read = partial(self._files.read, tensor)
        return read_part(read, tensor.shape, weight.row.pattern, weight.sizes, index)


def _from_shards(
    read: Callable[[tuple[slice, ...]], np.ndarray], shape: tuple[int, ...], sharding: Sharding
) -> jax.Array:
    """A global array of the parts that this process's devices hold.

    Not `jax.make_array_from_callback`, which keeps the parts of all devices until the last is read.
    """
    devices: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}  # by the part they hold
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None  # an addressable device holds something
        bounds = tuple(part.indices(n)[:2] for part, n in zip(index, shape, strict=True))
        devices.setdefault(bounds, []).append(device)
    shards: list[jax.Array] = []
    for bounds, holders in devices.items():
        shards += _put(read(tuple(slice(*bound) for bound in bounds)), holders)
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _put(values: np.ndarray, devices: Sequence[jax.Device]) -> list[jax.Array]:
    """Copies of a host array on devices, after which its memory may go.

    Only a CPU device may have taken it for its own.
    """
    copies = jax.block_until_ready([jax.device_put(values, device) for device in devices])
    gc.collect(0)  # jax puts down what it has copied when Python collects garbage
    return copies


def model_tensors(directory: str | Path, config: ModelConfig) -> dict[str, Tensor]:
    """The tensors of a model directory, which must be exactly those that its config describes.

    A tied model's file may repeat the embedding as lm_head.weight; it is left out.

    Raises:
      FileNotFoundError, WeightError: see `load`.
    """
    tensors = read_index(directory)
    problems: list[str] = []
    head = tensors.pop("lm_head.weight", None) if config.text.tied else None
    if head is not None and not _same(head, tensors.get("model.embed_tokens.weight")):
        problems.append(
            "unknown: lm_head.weight, which differs from the embedding although config.json says "
            "tie_word_embeddings"
        )
    _, shapes = abstract_model(config)
    expected = {
        name: weight.released_shape
        for weight in _placed(config, flatten_dict(shapes))
        for name in weight.names
    }
    problems += [f"missing: {name}" for name in sorted(expected.keys() - tensors.keys())]
    problems += [f"unknown: {name}" for name in sorted(tensors.keys() - expected.keys())]
    problems += [
        f"mis-shaped: {name} is {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise WeightError(
            f"the weights in {directory} are not those its config.json describes:\n  "
            + "\n  ".join(problems[:20])
            + more
        )
    return tensors


class _Placed(NamedTuple):
    """A row of the table, for one model."""

    row: Row
    path: Path_  # in the parameter tree
    shape: tuple[int, ...]  # ours, stacked
    names: list[str]  # released, in layer order
    sizes: dict[str, int]  # of the axes that the pattern splits

    @property
    def released_shape(self) -> tuple[int, ...]:
        ours = self.shape[1:] if self.row.stacked else self.shape
        empty = np.broadcast_to(np.zeros((), np.uint8), ours)
        return rearrange(empty, self.row.backward, **self.sizes).shape


def _placed(config: ModelConfig, shapes: Mapping[Path_, Any]) -> Iterator[_Placed]:
    """The table's rows for the weights of a model, in the order of `shapes`."""
    all_sizes = axis_sizes(config)
    rows = {tuple(row.ours.split(".")): row for row in TABLE}
    for path, array in shapes.items():
        row = rows[path]
        layers = array.shape[0] if row.stacked else 1
        names = [row.theirs.format(n=n) for n in range(layers)]
        sizes = {k: v for k, v in all_sizes[path[0]].items() if re.search(rf"\b{k}\b", row.pattern)}
        yield _Placed(row, path, array.shape, names, sizes)


def _same(a: Tensor, b: Tensor | None) -> bool:
    """Whether two tensors have the same values; read by rows, as an embedding is large."""
    if b is None or a.shape != b.shape:
        return False
    starts = range(0, a.shape[0], _ROWS)
    rows = [(slice(start, min(start + _ROWS, a.shape[0])),) for start in starts]
    with TensorFiles() as files:
        return all(np.array_equal(files.read(a, part), files.read(b, part)) for part in rows)


# ---- exporting ----


def released_tensors(
    params: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters as (released name, host array in our dtype), one at a time."""
    flat = flatten_dict(params)
    for weight in _placed(config, flat):
        array = np.asarray(flat[weight.path])
        layers = array if weight.row.stacked else array[None]
        for name, layer in zip(weight.names, layers, strict=True):
            yield name, rearrange(layer, weight.row.backward, **weight.sizes)


def save(
    directory: str | Path,
    params: Mapping[str, Any],
    config: ModelConfig,
    dtype_of: Callable[[str], np.dtype],
    shard_bytes: int = _SHARD_BYTES,
) -> list[Path]:
    """Writes released-style safetensors: one file, or shards of at most `shard_bytes` and an index.

    Args:
      directory: must exist.
      params: the parameter tree.
      config: its architecture.
      dtype_of: the type to write each released name in.
      shard_bytes: the size at which a new shard begins.

    Returns:
      The files written.
    """
    counts = [0]  # of the tensors in each shard
    filled = 0
    for weight in _placed(config, flatten_dict(params)):
        for name in weight.names:
            size = math.prod(weight.released_shape) * dtype_of(name).itemsize
            if filled and filled + size > shard_bytes:
                counts.append(0)
                filled = 0
            counts[-1] += 1
            filled += size
    tensors = (
        (name, array.astype(dtype_of(name))) for name, array in released_tensors(params, config)
    )
    return write_shards(directory, [itertools.islice(tensors, count) for count in counts])
