"""Opening models: directories, runs, and what is missing or wrong in them."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import huggingface_hub
import jax
import numpy as np
import pytest
import torch
from flax import nnx
from huggingface_hub.utils import filter_repo_objects
from safetensors.numpy import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

from data.prompts import target_text
from data.records import read_manifest
from data.sources import FolderClips
from jaxgrpo import cli
from jaxgrpo.config import ConfigError, MeshSection, ModelSection
from jaxgrpo.inputs import PromptLoader
from jaxgrpo.load import (
    choose_backend,
    load_params,
    model_directory,
    open_processor,
    restore_params,
    vocabulary_of,
    weight_steps,
)
from jaxgrpo.sharding import make_mesh, param_shardings
from models.attention_backend import Backend
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import TINY, Workplace
from tests.oracle import hf_model

WEIGHTS = "model.safetensors"
NORM = "model.layers.2.input_layernorm.weight"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


def shardings(config: ModelConfig, **axes: int) -> Any:
    devices = jax.local_devices()[: int(np.prod(list(axes.values())))]
    return param_shardings(config, make_mesh(MeshSection(**axes), devices))


def by_name(tree: Any) -> dict[str, np.ndarray]:
    flat, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {jax.tree_util.keystr(key): np.asarray(leaf) for key, leaf in flat}


# ---- runs ----


def test_the_weights_of_a_run_are_those_of_its_newest_checkpoint(place: Workplace) -> None:
    run_dir = tiny_run.reference(place)
    config = ModelConfig.load(TINY)
    sharded = load_params(run_dir, config, shardings(config, data=1, fsdp=2, tensor=2))
    state = tiny_run.state_of(run_dir)
    expected = {k.removeprefix("['params']"): v for k, v in state.items() if "['params']" in k}
    tiny_run.assert_same_bits(by_name(sharded), expected)
    assert len(sharded["text"]["embed"].sharding.device_set) == 4


def test_a_run_begins_where_the_run_before_it_began(place: Workplace) -> None:
    """Two runs, one after the other, over one model directory, which holds the tokenizer."""
    assert model_directory(tiny_run.reference(place)) == TINY
    params, directory = restore_params(tiny_run.reference(place))
    assert directory == TINY and params.keys() == {"text", "vision"}


def test_an_exported_run_loads_back_bit_for_bit(place: Workplace, tmp_path: Path) -> None:
    run_dir, out = tiny_run.reference(place), tmp_path / "out"
    assert cli.main(["export", str(run_dir), str(out), "dtype=float32"]) == 0
    config = ModelConfig.load(out)
    again = load_params(out, config, shardings(config, data=1))
    tiny_run.assert_same_bits(by_name(again), by_name(restore_params(run_dir)[0]))
    for name in ("tokenizer.json", "chat_template.json"):
        assert (out / name).read_bytes() == (TINY / name).read_bytes()


def test_a_trained_run_is_the_same_model_in_transformers(place: Workplace, tmp_path: Path) -> None:
    """The logits of a question about a real clip and of its answer."""
    run_dir, out = tiny_run.reference(place), tmp_path / "out"
    assert cli.main(["export", str(run_dir), str(out), "dtype=float32"]) == 0
    theirs, found = Qwen2_5_VLForConditionalGeneration.from_pretrained(
        out, attn_implementation="eager", output_loading_info=True
    )
    assert not any(found.values()), found

    config = tiny_run.load_config(place)
    processor = open_processor(config)
    records = tuple(read_manifest(place.clips / "eval.jsonl", place.clips))
    item = next(i for i, record in enumerate(records) if record.task == "gqa")
    prompt = PromptLoader(processor, records, config.data, FolderClips(str(place.clips)))(item)
    completion = processor.encode_completion(target_text(records[item], thinking=False))
    grid = np.array([[len(prompt.frame_index), *(prompt.patch_hw.max(axis=0) + 1)]])
    no_images = np.zeros((0, 3), np.int64)
    with torch.no_grad():
        expected = hf_model.logits(theirs.eval(), prompt, no_images, grid, completion).numpy()

    params, _ = restore_params(run_dir)
    model = nnx.merge(abstract_model(processor.config)[0], params)
    batch = jax.tree.map(lambda x: x[None], prompt)
    hidden = model.completion_hidden(batch, model.encode_vision(batch), completion[None, None])
    ours = np.asarray(model.logits(hidden)[0, 0])
    np.testing.assert_allclose(ours, expected[len(prompt.tokens) - 1 : -1], rtol=0, atol=1e-4)


def test_a_run_that_has_no_checkpoint_yet(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "early" / "checkpoints").mkdir(parents=True)
    message = mistake(place, tmp_path / "early", tmp_path, capsys)
    assert f"{tmp_path / 'early'} holds no checkpoint yet" in message


@pytest.mark.parametrize("command", ["train", "eval"])
def test_random_weights_do_not_take_the_place_of_a_runs(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str], command: str
) -> None:
    cold_start = tiny_run.cold_start(place)
    overrides = [f"run_dir={tmp_path / 'run'}", f"model.path={cold_start}", "model.init=random"]
    assert cli.main([command, str(place.config), *overrides]) == 2
    message = capsys.readouterr().err
    assert f"model.path={cold_start} is a run" in message and "model.init=checkpoint" in message


def test_the_checkpoints_that_weights_come_from_are_known_by_their_steps(place: Workplace) -> None:
    assert weight_steps(TINY) == []
    assert weight_steps(tiny_run.cold_start(place)) == [16]
    assert weight_steps(tiny_run.reference(place)) == [tiny_run.STEPS]  # it trained all weights


def test_what_may_be_emitted_is_text_and_the_end_of_turn(place: Workplace) -> None:
    processor = open_processor(tiny_run.load_config(place))
    vocabulary = vocabulary_of(processor)
    tokenizer = processor.tokenizer
    for token in ("<|video_pad|>", "<|vision_start|>", "<|im_start|>", "<|endoftext|>"):
        assert not vocabulary.usable[tokenizer.convert_tokens_to_ids(token)]
    assert vocabulary.usable[tokenizer.convert_tokens_to_ids("<|im_end|>")]
    assert vocabulary.usable[processor.encode_completion("<answer>B</answer>")].all()
    assert not vocabulary.usable[len(tokenizer) :].any()
    assert vocabulary.stop == (tokenizer.convert_tokens_to_ids("<|im_end|>"),)


# ---- the hub ----


def test_a_model_of_the_hub_is_downloaded_whole(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Weights, tokenizer, and the licence and the model card, which `export` copies."""
    hub = Path(shutil.copytree(tiny_run.random_model(place), tmp_path / "hub"))
    kept, left = ["LICENSE", "README.md"], ["pytorch_model.bin", "model.gguf", "figure.png"]
    for name in kept + left:
        (hub / name).write_text(name)
    cache = tmp_path / "cache"

    def snapshot_download(repo_id: str, *, allow_patterns: list[str]) -> str:
        assert repo_id == "someone/tiny"
        names = [str(file.relative_to(hub)) for file in hub.rglob("*") if file.is_file()]
        cache.mkdir(exist_ok=True)
        for name in filter_repo_objects(names, allow_patterns=allow_patterns):
            shutil.copyfile(hub / name, cache / name)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    run = tiny_run.load_config(place, "model.path=someone/tiny", "model.init=checkpoint")
    open_processor(run, weights=False)
    assert not (cache / WEIGHTS).exists()
    processor = open_processor(run)
    assert processor.config == ModelConfig.load(hub)
    params = load_params("someone/tiny", processor.config, shardings(processor.config, data=1))
    expected = load_params(hub, processor.config, shardings(processor.config, data=1))
    tiny_run.assert_same_bits(by_name(params), by_name(expected))

    out = tmp_path / "out"
    assert cli.main(["export", str(model_directory("someone/tiny")), str(out)]) == 0
    assert {file.name for file in out.iterdir()} == {f.name for f in hub.iterdir()} - set(left)
    assert (out / "LICENSE").read_text() == "LICENSE"


# ---- mistakes ----


def mistake(
    place: Workplace, model: str | Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> str:
    """The message of `jaxgrpo eval` with that model, which must fail as a user's mistake."""
    overrides = [f"model.path={model}", "model.init=checkpoint", "eval.batch=8"]
    run_dir = f"run_dir={tmp_path / 'run'}"
    assert cli.main(["eval", str(place.config), run_dir, *overrides]) == 2
    return capsys.readouterr().err


def copy_of(place: Workplace, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_run.random_model(place), tmp_path / "model"))


@pytest.mark.parametrize("path", ["/no/such/model", "./models/tinny", "tinny", "a/b/c"])
def test_a_model_that_does_not_exist(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str], path: str
) -> None:
    message = mistake(place, path, tmp_path, capsys)
    assert f"model.path: there is no directory {path}" in message and "hub id" in message


def test_a_mistyped_path_that_looks_like_a_hub_id(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The tests are offline, as many machines are."""
    message = mistake(place, "models/tinny", tmp_path, capsys)
    assert "models/tinny" in message and "give model.path as a local directory" in message


@pytest.mark.parametrize("file", ["config.json", "tokenizer.json", WEIGHTS])
def test_a_missing_model_file(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    model = copy_of(place, tmp_path)
    (model / file).unlink()
    message = mistake(place, model, tmp_path, capsys)
    assert str(model) in message
    assert file in message or "has no *.safetensors" in message


def drop(weights: dict[str, np.ndarray]) -> None:
    del weights[NORM]


def add(weights: dict[str, np.ndarray]) -> None:
    weights["model.layers.9.input_layernorm.weight"] = weights[NORM]


def cut(weights: dict[str, np.ndarray]) -> None:
    weights[NORM] = weights[NORM][:-1]


@pytest.mark.parametrize(
    "change, says",
    [
        (drop, f"missing: {NORM}"),
        (add, "unknown: model.layers.9.input_layernorm.weight"),
        (cut, f"mis-shaped: {NORM} is (127,), expected (128,)"),
    ],
)
def test_a_wrong_weight_is_named(
    place: Workplace,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    change: Callable[[dict[str, np.ndarray]], None],
    says: str,
) -> None:
    model = copy_of(place, tmp_path)
    weights = load_file(model / WEIGHTS)
    change(weights)
    save_file(weights, model / WEIGHTS, metadata={"format": "pt"})
    message = mistake(place, model, tmp_path, capsys)
    assert says in message and str(model) in message
    assert message.startswith("error: ")


# ---- what computes attention ----


def section(attention: Any, dtype: Any = "bfloat16") -> ModelSection:
    return ModelSection("unused", attention=attention, compute_dtype=dtype, attention_chunk=7)


@pytest.mark.parametrize(
    ("platform", "dtype", "kernel"),
    [
        ("tpu", "bfloat16", "splash"),
        ("tpu", "float32", "splash"),
        ("gpu", "bfloat16", "cudnn"),
        ("gpu", "float32", "xla"),  # cuDNN's kernel has no float32
        ("cpu", "bfloat16", "xla"),
    ],
)
def test_attention_is_computed_by_what_fits_the_devices(
    platform: str, dtype: str, kernel: Any
) -> None:
    assert choose_backend(section("auto", dtype), platform) == Backend(kernel, chunk=7)
    assert choose_backend(section(kernel, dtype), platform) == Backend(kernel, chunk=7)
    assert choose_backend(section("xla", dtype), platform) == Backend("xla", chunk=7)


@pytest.mark.parametrize(
    ("named", "platform", "dtype", "says"),
    [
        ("splash", "cpu", "bfloat16", "needs TPUs; this is cpu .*=auto, which takes xla$"),
        ("splash", "gpu", "bfloat16", "needs TPUs; this is gpu .*=auto, which takes cudnn$"),
        ("cudnn", "tpu", "bfloat16", "needs GPUs and .*; this is tpu"),
        ("cudnn", "gpu", "float32", "model.compute_dtype=bfloat16; this is gpu in float32"),
    ],
)
def test_a_kernel_that_cannot_run_there_is_refused_by_name(
    named: str, platform: str, dtype: str, says: str
) -> None:
    with pytest.raises(ConfigError, match=f"model.attention={named} .*{says}"):
        choose_backend(section(named, dtype), platform)
