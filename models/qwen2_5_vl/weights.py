"""Weights between Hugging Face's safetensors and our parameter tree, by one table, both ways.

A row says where a released tensor lives in our tree and how its axes are rearranged, as an einops
pattern that is read from left to right to load and from right to left to export. `{n}` in a name
stands for the layer: those tensors are stacked along a leading layer axis.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import ml_dtypes
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import safe_open
from safetensors.numpy import save_file

from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model

Path_ = tuple[str, ...]


class WeightError(ValueError):
    """A checkpoint whose tensors are not those of the model its config.json describes."""


class Row(NamedTuple):
    """One kind of weight."""

    ours: str  # dotted path in the parameter tree
    theirs: str  # released name
    pattern: str  # einops: released axes -> our axes


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
        ("qkv", "attn.qkv.weight", "(QKV A H) D -> D QKV A H"),
        ("qkv_bias", "attn.qkv.bias", "(QKV A H) -> QKV A H"),
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
_NUMPY_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


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


def released_name(name: str) -> str:
    """The released spelling of a tensor name; transformers 5 nests `model.visual.*` and so on."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return re.sub(r"^model\.visual\.", "visual.", name)


# ---- loading ----


class Tensor(NamedTuple):
    """Where a tensor lies, and what the file's header says of it."""

    file: Path
    name: str  # as spelled in the file
    shape: tuple[int, ...]
    dtype: np.dtype


def read_index(directory: str | Path) -> dict[str, Tensor]:
    """The tensors of a model directory by released name, from the headers of its *.safetensors.

    Raises:
      FileNotFoundError: there are none, or the index names a shard that is not there.
      WeightError: two tensors have the same name, or one has a type that is not a float's.
    """
    directory = Path(directory)
    index_file = directory / "model.safetensors.index.json"
    if index_file.is_file():
        named = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
        files = [directory / name for name in sorted(set(named.values()))]
    else:
        files = sorted(directory.glob("*.safetensors"))
    if not files:
        raise FileNotFoundError(
            f"{directory} has no *.safetensors: download the model's weights there "
            "(PyTorch .bin files are not read)"
        )
    tensors: dict[str, Tensor] = {}
    for file in files:
        if not file.is_file():
            raise FileNotFoundError(f"{file} is named in {index_file.name} but does not exist")
        with safe_open(file, framework="numpy") as handle:
            for name in handle.keys():  # noqa: SIM118 (not a dict)
                view, released = handle.get_slice(name), released_name(name)
                if released in tensors:
                    other = tensors[released]
                    raise WeightError(
                        f"tensor {released} is there twice: as {other.name} in {other.file.name} "
                        f"and as {name} in {file.name}; delete the shard that is left over"
                    )
                if view.get_dtype() not in _NUMPY_DTYPES:
                    raise WeightError(
                        f"{file}: tensor {name} has type {view.get_dtype()}, expected one of "
                        f"{', '.join(_NUMPY_DTYPES)} (quantised checkpoints cannot be trained)"
                    )
                dtype = _NUMPY_DTYPES[view.get_dtype()]
                tensors[released] = Tensor(file, name, tuple(view.get_shape()), dtype)
    return tensors


def load(
    directory: str | Path,
    config: ModelConfig,
    *,
    dtype: Any = np.float32,
    place: Callable[[np.ndarray, Path_], jax.Array] = lambda array, path: jax.device_put(array),
) -> dict[str, Any]:
    """Reads a Hugging Face directory into our parameter tree, one weight at a time.

    Args:
      directory: holds *.safetensors under the released or the newer names.
      config: from the same directory.
      dtype: of the parameters (float32 for training's master weights).
      place: puts one host array on its devices; gets the weight's path in the tree.

    Raises:
      FileNotFoundError: a file is missing.
      WeightError: a tensor is unknown, missing, there twice, or of another shape; all are named.
    """
    tensors = read_index(directory)
    _, shapes = abstract_model(config)
    params: dict[Path_, jax.Array] = {}
    rows = list(_placed_rows(config, flatten_dict(shapes)))
    _check_tensors(str(directory), tensors, rows, config)
    with _Handles() as handles:
        for row, path, shape, names, sizes in rows:
            forward = [rearrange(handles.read(tensors[n]), row.pattern, **sizes) for n in names]
            array = np.stack(forward) if "{n}" in row.theirs else forward[0]
            params[path] = place(array.astype(dtype), path)
    return unflatten_dict(params)


def _placed_rows(
    config: ModelConfig, shapes: Mapping[Path_, Any]
) -> Iterator[tuple[Row, Path_, tuple[int, ...], list[str], dict[str, int]]]:
    """(row, path, our shape, released names in layer order, axis sizes) of the model's weights."""
    all_sizes = axis_sizes(config)
    paths = {tuple(row.ours.split(".")): row for row in TABLE}
    for path, shape in shapes.items():
        row = paths[path]
        layers = shape.shape[0] if "{n}" in row.theirs else 1
        names = [row.theirs.format(n=n) for n in range(layers)]
        sizes = {k: v for k, v in all_sizes[path[0]].items() if re.search(rf"\b{k}\b", row.pattern)}
        yield row, path, shape.shape, names, sizes


def _released_shape(row: Row, ours: tuple[int, ...], sizes: Mapping[str, int]) -> tuple[int, ...]:
    """The shape a released tensor must have, from our (unstacked) shape."""
    if "{n}" in row.theirs:
        ours = ours[1:]
    empty = np.broadcast_to(np.zeros((), np.uint8), ours)
    return rearrange(empty, _reverse(row.pattern), **sizes).shape


def _reverse(pattern: str) -> str:
    left, right = pattern.split(" -> ")
    return f"{right} -> {left}"


def _check_tensors(
    source: str, tensors: Mapping[str, Tensor], rows: list[Any], config: ModelConfig
) -> None:
    expected = {
        name: _released_shape(row, shape, sizes)
        for row, _, shape, names, sizes in rows
        for name in names
    }
    problems = [f"missing: {name}" for name in sorted(expected.keys() - tensors.keys())]
    for name in sorted(tensors.keys() - expected.keys()):
        if name == "lm_head.weight" and config.text.tied:
            if _same(tensors[name], tensors.get("model.embed_tokens.weight")):
                continue
            problems.append(
                "unknown: lm_head.weight, which differs from the embedding although config.json "
                "says tie_word_embeddings"
            )
        else:
            problems.append(f"unknown: {name}")
    problems += [
        f"mis-shaped: {name} is {tensors[name].shape}, expected {shape}"
        for name, shape in expected.items()
        if name in tensors and tensors[name].shape != shape
    ]
    if problems:
        more = f"\n  ... and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise WeightError(
            f"the weights in {source} are not those its config.json describes:\n  "
            + "\n  ".join(problems[:20])
            + more
        )


def _same(a: Tensor, b: Tensor | None) -> bool:
    with _Handles() as handles:
        return b is not None and np.array_equal(handles.read(a), handles.read(b))


class _Handles:
    """Open safetensors files, each opened once."""

    def __enter__(self) -> Self:
        self._open: dict[Path, Any] = {}
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()

    def read(self, tensor: Tensor) -> np.ndarray:
        if tensor.file not in self._open:
            self._open[tensor.file] = safe_open(tensor.file, framework="numpy")
        return self._open[tensor.file].get_tensor(tensor.name)


# ---- exporting ----


def released_tensors(
    params: Mapping[str, Any], config: ModelConfig
) -> Iterator[tuple[str, np.ndarray]]:
    """Our parameters as (released name, host array in our dtype), one at a time."""
    flat = flatten_dict(params)
    for row, path, _, names, sizes in _placed_rows(config, flat):
        stacked = np.asarray(flat[path])
        layers = stacked if "{n}" in row.theirs else stacked[None]
        for name, array in zip(names, layers, strict=True):
            yield name, rearrange(array, _reverse(row.pattern), **sizes)


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
    directory = Path(directory)
    shards: list[list[str]] = [[]]
    filled = total = 0
    for _, _, shape, names, _ in _placed_rows(config, flatten_dict(params)):
        for name in names:
            size = math.prod(shape) // len(names) * dtype_of(name).itemsize
            if filled and filled + size > shard_bytes:
                shards.append([])
                filled = 0
            shards[-1].append(name)
            filled += size
            total += size
    count = len(shards)
    single = count == 1
    files = [
        "model.safetensors" if single else f"model-{i + 1:05d}-of-{count:05d}.safetensors"
        for i in range(count)
    ]
    pending: dict[str, np.ndarray] = {}
    number = 0
    for name, array in released_tensors(params, config):
        pending[name] = np.ascontiguousarray(array.astype(dtype_of(name)))
        if len(pending) == len(shards[number]):
            save_file(pending, directory / files[number], metadata={"format": "pt"})
            pending, number = {}, number + 1
    written = [directory / file for file in files]
    if not single:
        weight_map = {
            name: file for file, names in zip(files, shards, strict=True) for name in names
        }
        index = directory / "model.safetensors.index.json"
        index.write_text(
            json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=2)
            + "\n",
            encoding="utf-8",
        )
        written.append(index)
    return written
