"""Files of safetensors: their index, parts of their tensors, and what is refused."""

from __future__ import annotations

import json
import re
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from models.qwen2_5_vl.tensor_files import TensorFiles, WeightError, read_index, write_shards

NORM = torch.arange(6.0).reshape(2, 3)


def test_an_index_is_read_from_headers(tmp_path: Path) -> None:
    save_file({"a": NORM, "b": NORM.bfloat16()[0].clone()}, tmp_path / "x.safetensors")
    a, b = read_index(tmp_path).values()
    assert (a.file, a.name, a.shape, a.dtype) == (tmp_path / "x.safetensors", "a", (2, 3), "f4")
    assert (b.name, b.shape, b.dtype) == ("b", (3,), ml_dtypes.bfloat16)


@pytest.mark.parametrize("name", ["model.language_model.norm.weight", "model.visual.norm.weight"])
def test_newer_names_are_listed_as_the_released_ones(tmp_path: Path, name: str) -> None:
    save_file({name: NORM}, tmp_path / "x.safetensors")
    [(released, tensor)] = read_index(tmp_path).items()
    assert released == name.replace("language_model.", "").replace("model.visual", "visual")
    assert tensor.name == name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_a_tensor_is_read_whole_or_in_part(tmp_path: Path, dtype: torch.dtype) -> None:
    values = torch.randn(5, 7, generator=torch.Generator().manual_seed(0)).to(dtype)
    save_file({"a": values, "b": values.T.contiguous()}, tmp_path / "x.safetensors")
    tensors = read_index(tmp_path)
    expected = values.float().numpy()
    with TensorFiles() as files:
        whole = files.read(tensors["a"])
        assert whole.dtype == tensors["a"].dtype
        np.testing.assert_array_equal(whole.astype(np.float32), expected)
        for part in ((slice(1, 4),), (slice(0, 5), slice(2, 3)), (slice(4, 5), slice(0, 7))):
            got = files.read(tensors["a"], part).astype(np.float32)
            np.testing.assert_array_equal(got, expected[part])
        part = (slice(2, 6), slice(1, 4))
        got = files.read(tensors["b"], part).astype(np.float32)
        np.testing.assert_array_equal(got, expected.T[part])


def test_written_files_say_that_they_are_for_pytorch(tmp_path: Path) -> None:
    """transformers 4 refuses safetensors without this."""
    [file] = write_shards(tmp_path, [[("a", np.zeros(3, np.float32))]])
    with safe_open(file, framework="numpy") as handle:
        assert handle.metadata() == {"format": "pt"}


def test_several_files_are_found_through_their_index(tmp_path: Path) -> None:
    arrays = {name: np.full(3, number, np.float32) for number, name in enumerate("abc")}
    *shards, index_file = write_shards(
        tmp_path, [[(name, arrays[name]) for name in names] for names in ("ab", "c")]
    )
    index = json.loads(index_file.read_text())
    assert index["metadata"] == {"total_size": 36}
    assert index["weight_map"] == dict(zip("abc", [shards[0].name] * 2 + [shards[1].name]))
    with TensorFiles() as files:
        for name, tensor in read_index(tmp_path).items():
            np.testing.assert_array_equal(files.read(tensor), arrays[name])


# ---- what is refused ----


def test_a_tensor_in_two_files_is_named_with_both(tmp_path: Path) -> None:
    for number in (0, 1):
        save_file({"model.norm.weight": NORM}, tmp_path / f"part-{number}.safetensors")
    with pytest.raises(WeightError, match="model.norm.weight is there twice") as caught:
        read_index(tmp_path)
    assert "part-0.safetensors" in str(caught.value)
    assert "part-1.safetensors" in str(caught.value)


def test_a_tensor_under_both_names_is_there_twice(tmp_path: Path) -> None:
    names = ("model.norm.weight", "model.language_model.norm.weight")
    save_file({name: NORM.clone() for name in names}, tmp_path / "x.safetensors")
    with pytest.raises(WeightError, match="as model.language_model.norm.weight"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    ("dtype", "spelled"), [(torch.int8, "I8"), (torch.float8_e4m3fn, "F8_E4M3")], ids=str
)
def test_a_quantised_tensor_is_named(tmp_path: Path, dtype: torch.dtype, spelled: str) -> None:
    save_file({"model.norm.weight": NORM.to(dtype)}, tmp_path / "x.safetensors")
    with pytest.raises(WeightError, match=f"tensor model.norm.weight has type {spelled}"):
        read_index(tmp_path)


def test_a_file_that_was_cut_short_is_named(tmp_path: Path) -> None:
    file = tmp_path / "x.safetensors"
    save_file({"a": NORM}, file)
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(WeightError, match=re.escape(f"{file} is not a whole safetensors file")):
        read_index(tmp_path)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"weight_map": 3}'])
def test_an_index_that_is_none_is_named(tmp_path: Path, text: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_text(text)
    with pytest.raises(WeightError, match="model.safetensors.index.json is not an index"):
        read_index(tmp_path)
