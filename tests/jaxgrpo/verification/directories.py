"""Copies of the shipped tiny model, with something wrong in each."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

TINY = Path(__file__).parents[3] / "models" / "tiny"

Tensors = dict[str, torch.Tensor]


def copy(out: Path) -> Path:
    shutil.copytree(TINY, out)
    return out


def edit_weights(directory: Path, change: Callable[[Tensors], None]) -> Path:
    """Rewrites the weights after `change`, and nothing else."""
    file = directory / "model.safetensors"
    tensors = {name: tensor.clone() for name, tensor in load_file(file).items()}
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})
    return directory


def edit_json(directory: Path, name: str, **values: Any) -> Path:
    path = directory / name
    content = json.loads(path.read_text(encoding="utf-8")) | values
    path.write_text(json.dumps(content, indent=2), encoding="utf-8")
    return directory


def swap(first: str, second: str) -> Callable[[Tensors], None]:
    def change(tensors: Tensors) -> None:
        tensors[first], tensors[second] = tensors[second], tensors[first]

    return change


def flip_a_bit(name: str) -> Callable[[Tensors], None]:
    """The lowest bit of the first value."""

    def change(tensors: Tensors) -> None:
        tensors[name].view(torch.int16).view(-1)[0] ^= 1

    return change
