"""The fingerprint of a model directory: the SHA-256 of every tensor, beside the weights.

A directory in which two tensors of one shape have changed places loads without complaint, here and
in transformers, and computes nonsense in both alike: only a hash that was taken when the weights
were known to be right can tell. `jaxgrpo export` writes it, `jaxgrpo verify` compares it.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.qwen2_5_vl.tensor_files import Tensor, TensorFiles, read_index

FILE = "jaxgrpo_tensors.json"  # transformers and vLLM do not look at it

_FORMAT = 1
_THREADS = 4  # hashing does not hold Python's lock
_SUFFIXES = frozenset({".json", ".jinja", ".txt"})


class FingerprintError(ValueError):
    """A fingerprint that cannot be read."""


class Fingerprint(NamedTuple):
    """What a model directory holds.

    Attributes:
      config: the content of config.json, so that a key that changed can be named.
      files: SHA-256 by name of the files that a model is loaded with, but for its weights.
      tensors: SHA-256 by released name of each tensor's bytes, in row-major order.
    """

    config: dict[str, Any]
    files: dict[str, str]
    tensors: dict[str, str]


def take(directory: str | Path) -> Fingerprint:
    """Reads a whole model directory.

    Raises:
      FileNotFoundError, WeightError: see `models.qwen2_5_vl.tensor_files.read_index`.
    """
    directory = Path(directory)
    tensors = read_index(directory)
    with ThreadPoolExecutor(_THREADS) as pool:
        digests = pool.map(tensor_sha256, tensors.values())
        return Fingerprint(
            config=json.loads((directory / "config.json").read_text(encoding="utf-8")),
            files=files(directory),
            tensors=dict(zip(tensors, digests, strict=True)),
        )


def files(directory: Path) -> dict[str, str]:
    """SHA-256 by name of a directory's files besides weights and their index."""
    return {
        path.name: file_sha256(path)
        for path in sorted(directory.iterdir())
        if path.suffix in _SUFFIXES
        and path.name != FILE
        and not path.name.endswith(".index.json")
        and path.is_file()
    }


def write(directory: str | Path) -> Path:
    """Writes the fingerprint of a complete model directory into it."""
    path = Path(directory) / FILE
    content = {"format": _FORMAT, **take(directory)._asdict()}
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return path


def read(directory: str | Path) -> Fingerprint | None:
    """The fingerprint that was written into a model directory, if there is one.

    Raises:
      FingerprintError: it cannot be read.
    """
    path = Path(directory) / FILE
    if not path.is_file():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["format"] != _FORMAT:
            raise FingerprintError(
                f"{path} has format {content['format']}, expected {_FORMAT}: another version of "
                "jaxgrpo wrote it"
            )
        read_in = {key: content[key] for key in Fingerprint._fields}
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError) as error:
        raise FingerprintError(f"{path} is not a fingerprint of jaxgrpo ({error!r})") from error
    for key, value in read_in.items():
        if not isinstance(value, Mapping):
            raise FingerprintError(f"{path}: {key} is {value!r}, expected an object")
    return Fingerprint(**read_in)


def tensor_sha256(tensor: Tensor) -> str:
    """SHA-256 of a tensor's bytes; it is in memory meanwhile."""
    with TensorFiles() as opened:
        return array_sha256(opened.read(tensor))


def array_sha256(array: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data).hexdigest()


def file_sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
