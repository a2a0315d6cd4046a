"""`jaxgrpo export`: a directory that transformers loads, bit for bit where nothing changed."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
import torch
from flax import nnx
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from jaxgrpo import export, fingerprint
from jaxgrpo.export import ExportError, export_model, export_params
from jaxgrpo.output import OutputError
from models.qwen2_5_vl import tensor_files
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model
from models.qwen2_5_vl.positions import Grid
from models.qwen2_5_vl.weights import WeightError, load
from tests.oracle import hf_model
from tests.oracle.prompts import grids, random_prompt

Tensors = dict[str, torch.Tensor]
OTHER_FILES = {
    "tokenizer.json": b'{"model": {}}',
    "tokenizer_config.json": b'{"eos_token": "<|im_end|>"}  ',
    "chat_template.json": '{"chat_template": "\u00e9"}'.encode(),
    "generation_config.json": b"{}",
    "preprocessor_config.json": b"{}\r\n",
    "merges.txt": b"a b\n",
    "README.md": b"# A model\n",
    "LICENSE": b"Apache\n",
}


@cache
def original(tied: bool) -> Any:
    return hf_model.random_model(hf_model.released_config(tied=tied), seed=2)


def model_directory(
    directory: Path, *, tied: bool = True, shards: int = 1, dtype: torch.dtype = torch.float32
) -> Path:
    """A released-style model directory with all its files."""
    raw = hf_model.released_config(tied=tied) | {"torch_dtype": str(dtype).split(".")[1]}
    hf_model.save_released(original(tied), raw, directory, shards)
    for file in directory.glob("*.safetensors"):
        tensors = {k: t.to(dtype, copy=True) for k, t in load_file(file).items()}  # off the file
        save_file(tensors, file, metadata={"format": "pt"})
    for name, content in OTHER_FILES.items():
        (directory / name).write_bytes(content)
    return directory


def weights(directory: Path) -> Tensors:
    """All tensors of a directory, which has an index if and only if it has several files."""
    files = sorted(directory.glob("*.safetensors"))
    tensors: Tensors = {}
    for file in files:
        tensors |= {name: tensor.clone() for name, tensor in load_file(file).items()}
    index_file = directory / "model.safetensors.index.json"
    assert index_file.exists() == (len(files) > 1)
    if index_file.exists():
        index = json.loads(index_file.read_text())
        assert index["weight_map"].keys() == tensors.keys()
        assert set(index["weight_map"].values()) == {file.name for file in files}
    return tensors


def assert_same_bits(got: Tensors, expected: Tensors) -> None:
    assert got.keys() == expected.keys()
    for name, tensor in expected.items():
        assert got[name].dtype == tensor.dtype, name
        as_integers = torch.int32 if tensor.dtype == torch.float32 else torch.int16
        assert torch.equal(got[name].view(as_integers), tensor.view(as_integers)), name


def perturbed(directory: Path) -> tuple[ModelConfig, Any]:
    """The weights of a directory after some "training"."""
    config = ModelConfig.load(directory)
    rng = np.random.default_rng(0)
    return config, jax.tree.map(
        lambda w: w + 0.1 * rng.standard_normal(w.shape, np.float32) * (w.std() + 0.01),
        load(directory, config),
    )


# ---- a model directory ----


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_an_untouched_model_comes_out_bit_for_bit(
    tmp_path: Path, dtype: torch.dtype, shards: int, tied: bool
) -> None:
    source = model_directory(tmp_path / "source", tied=tied, shards=shards, dtype=dtype)
    out = tmp_path / "out"
    files = export_model(source, out)
    assert sorted(files) == sorted(out.iterdir())
    assert_same_bits(weights(out), weights(source))
    for name in [*OTHER_FILES, "config.json"]:
        assert (out / name).read_bytes() == (source / name).read_bytes(), name


def test_newer_names_become_the_released_ones(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source", tied=False)
    expected = weights(source)
    newer = {name: t.contiguous() for name, t in original(False).state_dict().items()}
    save_file(newer, source / "model.safetensors")
    assert not newer.keys() & {"model.norm.weight", "visual.merger.ln_q.weight"}
    export_model(source, tmp_path / "out")
    assert_same_bits(weights(tmp_path / "out"), expected)


def test_files_of_any_name_get_the_names_that_transformers_looks_for(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source", shards=2)
    (source / "model.safetensors.index.json").unlink()
    for number, file in enumerate(sorted(source.glob("*.safetensors"))):
        file.rename(source / f"part-{number}.safetensors")
    export_model(source, tmp_path / "out")
    names = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
    assert names == ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
    assert weights(tmp_path / "out")


def test_types_are_kept_tensor_by_tensor_or_all_changed(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source")
    mixed = {
        name: tensor if "norm" in name else tensor.to(torch.bfloat16)
        for name, tensor in weights(source).items()
    }
    save_file(mixed, source / "model.safetensors")
    export_model(source, tmp_path / "same")
    assert_same_bits(weights(tmp_path / "same"), mixed)
    export_model(source, tmp_path / "half", "bfloat16")
    assert_same_bits(
        weights(tmp_path / "half"), {name: t.to(torch.bfloat16) for name, t in mixed.items()}
    )
    export_model(source, tmp_path / "whole", "float32")
    assert_same_bits(
        weights(tmp_path / "whole"), {name: t.to(torch.float32) for name, t in mixed.items()}
    )


def test_the_config_names_a_changed_type_and_nothing_else_changes(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source", dtype=torch.bfloat16)
    export_model(source, tmp_path / "out", "float32")
    before, after = (
        json.loads((path / "config.json").read_text()) for path in (source, tmp_path / "out")
    )
    assert before.pop("torch_dtype") == "bfloat16"
    assert after.pop("torch_dtype") == "float32"
    assert before == after


def test_the_newer_spelling_of_the_type_is_changed_wherever_it_stands(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source")
    original(True).config.save_pretrained(source)
    raw = json.loads((source / "config.json").read_text())
    raw["text_config"]["dtype"] = raw["vision_config"]["dtype"] = raw["dtype"] = "float32"
    (source / "config.json").write_text(json.dumps(raw))
    export_model(source, tmp_path / "out", "bfloat16")
    after = json.loads((tmp_path / "out" / "config.json").read_text())
    parts = [after, after["text_config"], after["vision_config"]]
    assert [part.get("dtype") for part in parts] == ["bfloat16"] * 3
    assert not any("torch_dtype" in part for part in parts)


def test_weights_in_other_formats_stay_behind(tmp_path: Path) -> None:
    """They are those of before training; vLLM may prefer them."""
    source = model_directory(tmp_path / "source")
    stale = ["pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.00.pth", "a.gguf"]
    for name in [*stale, "model.safetensors.index.json.bak"]:
        (source / name).write_bytes(b"old")
    files = {path.name for path in export_model(source, tmp_path / "out")}
    assert files == {*OTHER_FILES, "config.json", "model.safetensors"} | {
        "model.safetensors.index.json.bak",
        fingerprint.FILE,
    }


def test_a_directory_of_the_model_is_left_out_and_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = model_directory(tmp_path / "source")
    (source / ".cache").mkdir()
    export_model(source, tmp_path / "out")
    assert f"not exported: the directory {source / '.cache'}" in capsys.readouterr().out
    assert not (tmp_path / "out" / ".cache").exists()


def test_a_tied_models_repeated_head_is_dropped(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source")
    expected = weights(source)
    head = {"lm_head.weight": expected["model.embed_tokens.weight"].clone()}
    save_file(expected | head, source / "model.safetensors")
    export_model(source, tmp_path / "out")
    assert_same_bits(weights(tmp_path / "out"), expected)


def test_a_tied_models_other_head_is_refused(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source")
    tensors = weights(source)
    head = {"lm_head.weight": tensors["model.embed_tokens.weight"] + 1}
    save_file(tensors | head, source / "model.safetensors")
    with pytest.raises(WeightError, match="lm_head.weight, which differs"):
        export_model(source, tmp_path / "out")


def test_weights_that_the_config_does_not_describe_are_refused(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source")
    tensors = weights(source)
    del tensors["visual.merger.ln_q.weight"]
    tensors["extra"] = torch.zeros(3)
    tensors["model.norm.weight"] = torch.zeros(3)
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(WeightError) as caught:
        export_model(source, tmp_path / "out")
    for problem in [
        "missing: visual.merger.ln_q.weight",
        "unknown: extra",
        "mis-shaped: model.norm.weight is (3,), expected (64,)",
    ]:
        assert problem in str(caught.value)
    assert not list(tmp_path.glob("out*"))


def test_the_fingerprint_is_of_what_was_written(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source", shards=2)
    (source / fingerprint.FILE).write_text("of the source")
    export_model(source, tmp_path / "out", "bfloat16")
    assert fingerprint.read(tmp_path / "out") == fingerprint.take(tmp_path / "out")


# ---- trained weights ----


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_transformers_loads_trained_weights_and_computes_our_logits(
    tmp_path: Path, tied: bool
) -> None:
    base = model_directory(tmp_path / "base", tied=tied, dtype=torch.bfloat16)
    config, params = perturbed(base)
    export_params(params, config, base, tmp_path / "out", "float32")
    theirs, found = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        tmp_path / "out", attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found
    assert theirs.dtype == torch.float32

    layout = [3, Grid(2, 6, 10), 6]
    prompt = random_prompt(np.random.default_rng(0), layout)
    completion = np.random.default_rng(1).integers(7, 320, 5, np.int32)
    model = nnx.merge(abstract_model(config)[0], params)
    batch = jax.tree.map(lambda x: x[None], prompt)
    hidden = model.completion_hidden(batch, model.encode_vision(batch), completion[None, None])
    expected = hf_model.logits(theirs.eval(), prompt, *grids(layout), completion)
    expected = expected.detach().numpy()[len(prompt.tokens) - 1 : -1]
    np.testing.assert_allclose(
        model.logits(hidden)[0, 0], expected, rtol=0, atol=1e-4 * float(expected.std())
    )


def test_bfloat16_is_the_rounded_master(tmp_path: Path) -> None:
    base = model_directory(tmp_path / "base")
    config, params = perturbed(base)
    export_params(params, config, base, tmp_path / "whole", "float32")
    export_params(params, config, base, tmp_path / "half", "bfloat16")
    rounded = {name: t.to(torch.bfloat16) for name, t in weights(tmp_path / "whole").items()}
    assert_same_bits(weights(tmp_path / "half"), rounded)
    assert json.loads((tmp_path / "half" / "config.json").read_text())["torch_dtype"] == "bfloat16"


def test_source_means_the_type_of_the_model_that_training_began_from(tmp_path: Path) -> None:
    base = model_directory(tmp_path / "base", shards=2, dtype=torch.bfloat16)
    config, params = perturbed(base)
    files = export_params(params, config, base, tmp_path / "out")
    assert {tensor.dtype for tensor in weights(tmp_path / "out").values()} == {torch.bfloat16}
    written = {*OTHER_FILES, "config.json", "model.safetensors", fingerprint.FILE}
    assert {file.name for file in files} == written
    for name in [*OTHER_FILES, "config.json"]:
        assert (tmp_path / "out" / name).read_bytes() == (base / name).read_bytes(), name


@pytest.mark.parametrize("named", ["float32", "bfloat16"])
def test_training_from_random_weights_takes_the_type_of_the_config(
    tmp_path: Path, named: str
) -> None:
    base = model_directory(tmp_path / "base", dtype=getattr(torch, named))
    config, params = perturbed(base)
    (base / "model.safetensors").unlink()
    export_params(params, config, base, tmp_path / "out")
    assert {t.dtype for t in weights(tmp_path / "out").values()} == {getattr(torch, named)}


def test_a_type_that_is_not_known_is_refused(tmp_path: Path) -> None:
    base = model_directory(tmp_path / "base")
    config, params = perturbed(base)
    (base / "model.safetensors").unlink()
    raw = json.loads((base / "config.json").read_text()) | {"torch_dtype": "float8"}
    (base / "config.json").write_text(json.dumps(raw))
    with pytest.raises(ExportError, match="config.json: torch_dtype is 'float8'"):
        export_params(params, config, base, tmp_path / "out")


# ---- the place ----


def test_a_crash_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = model_directory(tmp_path / "source", shards=2)
    written = []

    def save_and_crash(arrays: Any, file: Path, metadata: Any) -> None:
        assert not (tmp_path / "out").exists()
        if written:
            raise KeyboardInterrupt
        written.append(file)
        file.write_bytes(b"half")

    monkeypatch.setattr(tensor_files, "save_file", save_and_crash)
    with pytest.raises(KeyboardInterrupt):
        export_model(source, tmp_path / "out")
    assert written
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


# ---- the command ----


def test_the_command_names_files_and_what_to_do_next(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = model_directory(tmp_path / "source", shards=2), tmp_path / "out"
    export.main(str(source), str(out))
    printed = capsys.readouterr().out
    for path in out.iterdir():
        assert path.name in printed
    assert f"vllm serve {out}" in printed


def test_a_run_is_exported_from_its_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = model_directory(tmp_path / "base")
    config, params = perturbed(base)
    run = tmp_path / "run"
    (run / "checkpoints").mkdir(parents=True)

    def restore_params(run_dir: str, step: int | None) -> tuple[Any, Path]:
        assert (run_dir, step) == (str(run), 40)
        return params, base

    monkeypatch.setattr(export, "restore_params", restore_params)
    export.main(str(run), str(tmp_path / "out"), "float32", step=40)
    jax.tree.map(np.testing.assert_array_equal, load(tmp_path / "out", config), params)


def test_a_taken_place_is_refused_before_a_checkpoint_is_read(tmp_path: Path) -> None:
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").touch()
    with pytest.raises(OutputError, match="out exists"):
        export.main(tmp_path / "run", tmp_path / "out")


def test_a_source_that_is_neither_says_what_is_expected(tmp_path: Path) -> None:
    with pytest.raises(ExportError, match="neither a run directory .* nor a model directory"):
        export.main(tmp_path / "nothing", tmp_path / "out")


def test_a_model_directory_has_no_steps(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source")
    with pytest.raises(ExportError, match="source is a model directory, which has no steps"):
        export.main(source, tmp_path / "out", step=2)


def test_a_quantised_model_is_refused(tmp_path: Path) -> None:
    source = model_directory(tmp_path / "source")
    tensors = weights(source) | {"model.norm.weight": torch.zeros(64, dtype=torch.int8)}
    save_file(tensors, source / "model.safetensors")
    with pytest.raises(WeightError, match="I8"):
        export_model(source, tmp_path / "out")
