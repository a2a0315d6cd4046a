"""`jaxgrpo export SOURCE OUT`: a Hugging Face directory for `transformers` and vLLM.

Only the weights are written anew, as safetensors under the released names. The other files of the
model directory (config.json, tokenizer, chat template, licence) are copied as they are: what
transformers 5 would save in their place fails to load in transformers 4. A fingerprint of all of it
is added, for `jaxgrpo verify`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import ml_dtypes
import numpy as np

from data.storage import is_url
from jaxgrpo import fingerprint
from jaxgrpo.load import model_directory, restore_params
from jaxgrpo.output import check_free, new_directory
from jaxgrpo.run_dir import is_run
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.tensor_files import TensorFiles, read_index, write_shards
from models.qwen2_5_vl.weights import model_tensors, save

ExportDtype = Literal["source", "bfloat16", "float32"]

_DTYPES: dict[str, np.dtype] = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float32": np.dtype(np.float32),
    "float16": np.dtype(np.float16),
}
# Weights in any format: they are those of the model before training.
_WEIGHT_SUFFIXES = frozenset(
    {".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack", ".onnx"}
)


class ExportError(ValueError):
    """A source that cannot be exported, or a place that cannot be exported to."""


def main(
    source: str | Path, out: str | Path, dtype: ExportDtype = "source", step: int | None = None
) -> None:
    """Exports a run or a model directory and says how to load the result.

    Args:
      source: a run directory (config.yaml and checkpoints/) or a Hugging Face model directory,
        which may be in a bucket.
      out: the directory to make; nothing or an empty directory may be there.
      dtype: of every weight; "source" writes each in the type that the model directory has it in.
      step: of the run's checkpoint; None is the newest.

    Raises:
      ExportError: `source` is neither, or a model directory with `step`.
      OutputError: `out` is taken or in a bucket.
      ConfigError: the run has no checkpoint, or none of `step`.
      FileNotFoundError, ModelConfigError, WeightError, StorageError: the model directory cannot be
        read.
    """
    check_free(out)  # before the weights are read
    out = Path(out)
    run = is_run(source)
    if not run and is_url(source):
        source = model_directory(source)
    if run:
        params, base_directory = restore_params(source, step)
        files = export_params(params, ModelConfig.load(base_directory), base_directory, out, dtype)
    elif (Path(source) / "config.json").is_file():
        if step is not None:
            raise ExportError(f"{source} is a model directory, which has no steps: leave step out")
        files = export_model(source, out, dtype)
    else:
        raise ExportError(
            f"{source} is neither a run directory (with config.yaml and checkpoints/) nor a model "
            "directory (with config.json and *.safetensors)"
        )
    print(f"wrote {out}:")
    for file in files:
        print(f"  {file.name}  {_readable(file.stat().st_size)}")
    print(
        f"next: vllm serve {out}\n"
        f"  or: Qwen2_5_VLForConditionalGeneration.from_pretrained({str(out)!r}) in transformers\n"
        f"check it: jaxgrpo verify {out}"
    )


def export_params(
    params: Mapping[str, Any],
    config: ModelConfig,
    base_directory: str | Path,
    out: str | Path,
    dtype: ExportDtype = "source",
) -> list[Path]:
    """Writes trained weights, with all other files from the model directory that they began as.

    The weights are cast once, rounding to nearest even: a bfloat16 export of a float32 master is
    the rounded master, bit for bit.

    Args:
      params: the parameter tree, on hosts or devices.
      config: its architecture.
      base_directory: the model directory that training started from.
      out, dtype: see `main`. A base directory without weights (training from random ones) gives
        "source" the type that its config.json names.

    Returns:
      The files of `out`.

    Raises:
      OutputError: `out` is taken.
    """
    base_directory = Path(base_directory)
    dtype_of = _dtype_of(base_directory, dtype)
    with new_directory(out, "export") as directory:
        save(directory, params, config, dtype_of)
        _copy_other_files(base_directory, directory, dtype)
        fingerprint.write(directory)
    return _files(Path(out))


def export_model(source: str | Path, out: str | Path, dtype: ExportDtype = "source") -> list[Path]:
    """Writes a model directory again, bit for bit where `dtype` changes nothing.

    Names become the released ones. The tensors stay in as many files as they were in, and one file
    at a time is in memory.

    Args, returns: see `main` and `export_params`.

    Raises:
      OutputError: `out` is taken.
      WeightError: the tensors are not those of config.json; all are named.
    """
    source = Path(source)
    config = ModelConfig.load(source)
    tensors = model_tensors(source, config)
    dtype_of = _dtype_of(source, dtype)
    sources = sorted({tensor.file for tensor in tensors.values()})
    with new_directory(out, "export") as directory, TensorFiles() as files:

        def shard(file: Path) -> Iterator[tuple[str, np.ndarray]]:
            for name, tensor in tensors.items():
                if tensor.file == file:
                    yield name, files.read(tensor).astype(dtype_of(name), copy=False)

        write_shards(directory, [shard(file) for file in sources])
        _copy_other_files(source, directory, dtype)
        fingerprint.write(directory)
    return _files(Path(out))


# ---- weights ----


def _dtype_of(base_directory: Path, dtype: ExportDtype) -> Callable[[str], np.dtype]:
    """The type to write a released name in."""
    if dtype != "source":
        return lambda name: _DTYPES[dtype]
    if any(base_directory.glob("*.safetensors")):
        tensors = read_index(base_directory)
        return lambda name: tensors[name].dtype
    path = base_directory / "config.json"
    raw = json.loads(path.read_text(encoding="utf-8"))
    named = raw.get("torch_dtype", raw.get("dtype", "float32"))
    if named not in _DTYPES:
        raise ExportError(
            f"{path}: torch_dtype is {named!r}, expected one of {', '.join(_DTYPES)}; "
            "choose with dtype=bfloat16 or dtype=float32"
        )
    return lambda name: _DTYPES[named]


# ---- files ----


def _copy_other_files(source: Path, directory: Path, dtype: ExportDtype) -> None:
    """Copies what is not a weight; config.json names the type that the weights have now.

    Sub-directories stay behind (a release has none, a download keeps its cache in one) and are
    named.
    """
    for path in sorted(source.iterdir()):
        if path.is_dir():
            print(f"not exported: the directory {path}")
        elif path.suffix not in _WEIGHT_SUFFIXES and not path.name.endswith(".index.json"):
            shutil.copyfile(path, directory / path.name)
    if dtype == "source":
        return
    raw = json.loads((source / "config.json").read_text(encoding="utf-8"))
    raw["dtype" if "dtype" in raw and "torch_dtype" not in raw else "torch_dtype"] = dtype
    for part in [raw, raw.get("text_config"), raw.get("vision_config")]:
        for key in ("torch_dtype", "dtype"):
            if part is not None and key in part:
                part[key] = dtype
    _write_json(directory / "config.json", raw)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _files(directory: Path) -> list[Path]:
    return sorted(directory.iterdir())


def _readable(size: float) -> str:
    for unit in ("B", "kB", "MB"):
        if size < 1000:
            return f"{size:.3g} {unit}"
        size /= 1000
    return f"{size:.3g} GB"
