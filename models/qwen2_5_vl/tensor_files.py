"""Files of safetensors: what is in them, parts of it, and writing them.

The names are those of the released checkpoints; newer spellings are read too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Self

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

_INDEX = "model.safetensors.index.json"
_NUMPY_DTYPES: dict[str, np.dtype] = {
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
}


class WeightError(ValueError):
    """A checkpoint whose tensors are not those of the model its config.json describes."""


def released_name(name: str) -> str:
    """The released spelling of a tensor name; transformers 5 nests `model.visual.*` and so on."""
    name = re.sub(r"^model\.language_model\.", "model.", name)
    return re.sub(r"^model\.visual\.", "visual.", name)


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
        except (ValueError, KeyError, TypeError, AttributeError) as error:
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


class TensorFiles:
    """Open safetensors files, each opened once."""

    def __enter__(self) -> Self:
        self._open: dict[Path, Any] = {}
        return self

    def __exit__(self, *error: object) -> None:
        self._open.clear()

    def read(self, tensor: Tensor, part: tuple[slice, ...] = ()) -> np.ndarray:
        """The values of a tensor, or those in `part`: only they are copied from the file."""
        if tensor.file not in self._open:
            self._open[tensor.file] = safe_open(tensor.file, framework="numpy")
        file = self._open[tensor.file]
        return file.get_slice(tensor.name)[part] if part else file.get_tensor(tensor.name)


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
