"""Weights between Hugging Face's safetensors and our parameter tree, by one table, both ways.

A row says where a released tensor lives in our tree and how its axes are rearranged, as an einops
pattern that is read from left to right to load and from right to left to export. `{n}` in a name
stands for the layer: those tensors are stacked along a leading layer axis.
"""

from __future__ import annotations

import itertools
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import jax
import ml_dtypes
import numpy as np
from einops import rearrange
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import SafetensorError, safe_open
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

_INDEX = "model.safetensors.index.json"
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
    index_file = directory / _INDEX
    if index_file.is_file():
        try:
            named = json.loads(index_file.read_text(encoding="utf-8"))["weight_map"]
            files = [directory / name for name in sorted(set(named.values()))]
        except (ValueError, KeyError, AttributeError) as error:
            raise WeightError(
                f"{index_file} is not an index of safetensors ({error!r}): download it again"
            ) from error
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
        for tensor in _headers(file):
            released = released_name(tensor.name)
            if released in tensors:
                other = tensors[released]
                raise WeightError(
                    f"tensor {released} is there twice: as {other.name} in {other.file.name} "
                    f"and as {tensor.name} in {file.name}; delete the shard that is left over"
                )
            tensors[released] = tensor
    return tensors


def _headers(file: Path) -> list[Tensor]:
    try:
        with safe_open(file, framework="numpy") as handle:
            views = {name: handle.get_slice(name) for name in handle.keys()}  # noqa: SIM118
            kinds = {name: view.get_dtype() for name, view in views.items()}
            shapes = {name: tuple(view.get_shape()) for name, view in views.items()}
    except SafetensorError as error:
        raise WeightError(
            f"{file} is not a whole safetensors file ({error}): download it again"
        ) from error
    for name, kind in kinds.items():
        if kind not in _NUMPY_DTYPES:
            raise WeightError(
                f"{file}: tensor {name} has type {kind}, expected one of "
                f"{', '.join(_NUMPY_DTYPES)} (quantised checkpoints cannot be trained)"
            )
    return [Tensor(file, name, shapes[name], _NUMPY_DTYPES[kinds[name]]) for name in kinds]


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
    tensors = model_tensors(directory, config)
    _, shapes = abstract_model(config)
    params: dict[Path_, jax.Array] = {}
    with TensorFiles() as files:
        for weight in _placed(config, flatten_dict(shapes)):
            arrays = [
                rearrange(files.read(tensors[name]), weight.row.pattern, **weight.sizes)
                for name in weight.names
            ]
            array = np.stack(arrays) if weight.row.stacked else arrays[0]
            params[weight.path] = place(array.astype(dtype), weight.path)
    return unflatten_dict(params)


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
    with TensorFiles() as files:
        return b is not None and np.array_equal(files.read(a), files.read(b))


class TensorFiles:
    """Open safetensors files, each opened once."""

    def __enter__(self) -> Self:
        self._open: dict[Path, Any] = {}
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()

    def read(self, tensor: Tensor) -> np.ndarray:
        """The values of a tensor."""
        if tensor.file not in self._open:
            self._open[tensor.file] = safe_open(tensor.file, framework="numpy")
        return self._open[tensor.file].get_tensor(tensor.name)


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


def write_shards(
    directory: str | Path, shards: Sequence[Iterable[tuple[str, np.ndarray]]]
) -> list[Path]:
    """Writes one file, or several and their index, under the names that transformers looks for.

    Args:
      directory: must exist.
      shards: the (name, tensor) of each file; taken in order, so that one file's are in memory.

    Returns:
      The files written.
    """
    directory = Path(directory)
    written: list[Path] = []
    weight_map: dict[str, str] = {}
    total = 0
    for number, shard in enumerate(shards, 1):
        single = len(shards) == 1
        file = (
            "model.safetensors"
            if single
            else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        )
        tensors = {name: np.ascontiguousarray(tensor) for name, tensor in shard}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        written.append(directory / file)
        weight_map |= dict.fromkeys(tensors, file)
        total += sum(tensor.nbytes for tensor in tensors.values())
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        written.append(directory / _INDEX)
        written[-1].write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return written
