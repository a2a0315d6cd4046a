"""Layer by layer against the original: the first part that differs is named."""

from __future__ import annotations

from pathlib import Path

import jax
import numpy as np
import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

from jaxgrpo.verification import activations, original, prompts
from jaxgrpo.verification.activations import TooLittleMemoryError
from jaxgrpo.verification.checks import Status
from jaxgrpo.verification.prompts import LIMITS, Inputs
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.processor import Processor
from tests.jaxgrpo.verification.directories import TINY, Tensors, copy, edit_weights
from tests.jaxgrpo.verification.test_prompts import noise

Parts = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def ours() -> Processor:
    return Processor.load(TINY, LIMITS)


@pytest.fixture(scope="module")
def given(ours: Processor) -> Inputs:
    return prompts.inputs(ours, noise(4, 90, 260))


@pytest.fixture(scope="module")
def parts(ours: Processor, given: Inputs) -> Parts:
    return activations.run(TINY, ours, given, "float32").parts


def test_every_part_is_the_originals(parts: Parts, ours: Processor, given: Inputs) -> None:
    theirs = original.run(TINY, given, "float32")
    assert list(theirs) == list(parts)
    assert list(parts) == [
        *("vision block 0", "vision block 1", "vision merger"),
        *(f"decoder layer {i}" for i in range(4)),
        *("final norm", "logits"),
    ]
    for name, expected in theirs.items():
        np.testing.assert_allclose(parts[name], expected, rtol=0, atol=1e-4 * expected.std())
    layers, logits = activations.compare(parts, theirs, "float32", ours)
    assert (layers.status, logits.status) == (Status.PASS, Status.PASS)
    length = given.prompt.length
    assert f"greedy tokens agree at {length} of {length} positions" in logits.summary


def test_bfloat16_is_within_its_own_tolerance_only(ours: Processor, given: Inputs) -> None:
    half = activations.run(TINY, ours, given, "bfloat16").parts
    theirs = original.run(TINY, given, "bfloat16")
    statuses = {check.status for check in activations.compare(half, theirs, "bfloat16", ours)}
    assert statuses == {Status.PASS}
    strict = activations.compare(half, theirs, "float32", ours)
    assert {check.status for check in strict} == {Status.FAIL}


def test_our_weights_are_gone_when_the_original_is_loaded(ours: Processor, given: Inputs) -> None:
    def held() -> int:
        return sum(array.nbytes for array in jax.live_arrays())

    before = held()
    found = activations.run(TINY, ours, given, "float32")
    assert found.parts
    assert held() - before < activations.bytes_needed(ours.config, "float32") / 4


@pytest.mark.parametrize(
    ("weight", "first"),
    [
        ("visual.blocks.1.attn.proj.bias", "vision block 1"),
        ("visual.merger.mlp.0.weight", "vision merger"),
        ("model.layers.2.mlp.down_proj.weight", "decoder layer 2"),
    ],
)
def test_the_first_part_that_differs_is_named(
    weight: str, first: str, parts: Parts, ours: Processor, given: Inputs, tmp_path: Path
) -> None:
    """A weight is half a percent off: in one of the two models only."""

    def change(tensors: Tensors) -> None:
        tensors[weight] = tensors[weight] * 1.005 + 0.01

    other = edit_weights(copy(tmp_path / "model"), change)
    theirs = original.run(other, given, "float32")
    layers, logits = activations.compare(parts, theirs, "float32", ours)
    assert (layers.status, logits.status) == (Status.FAIL, Status.FAIL)
    assert layers.summary.startswith(f"{first} is the first of ")
    (told,) = layers.details
    assert told.startswith(f"{first}[")
    assert "tolerance 0.0001" in told
    assert logits.details[0].startswith("logits[")


def test_what_is_not_finite_differs(parts: Parts, ours: Processor) -> None:
    broken = parts | {"decoder layer 1": np.full_like(parts["decoder layer 1"], np.nan)}
    layers, _ = activations.compare(parts, broken, "float32", ours)
    assert layers.status is Status.FAIL
    assert layers.summary == "decoder layer 1 is the first of 1 parts that differ"


def test_logits_of_another_vocabulary_differ(parts: Parts, ours: Processor) -> None:
    fewer = parts | {"logits": parts["logits"][:, :-1]}
    _, logits = activations.compare(parts, fewer, "float32", ours)
    assert logits.status is Status.FAIL
    assert "ours is [" in logits.summary


# ---- prose ----


def test_the_loss_on_prose_is_that_of_the_original(
    ours: Processor, given: Inputs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(activations, "_GENERAL", ours.config.text.vocab)
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(TINY, dtype=torch.float32)
    ids = torch.tensor(ours.encode(activations.TEXT)[None], dtype=torch.long)
    with torch.no_grad():
        expected = float(theirs(input_ids=ids, labels=ids).loss)
    found = activations.run(TINY, ours, given, "float32")
    assert found.prose == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize(
    ("loss", "status"),
    [(None, Status.SKIPPED), (2.5, Status.PASS), (9.0, Status.WARN), (float("nan"), Status.WARN)],
)
def test_a_model_that_cannot_read_is_a_warning(loss: float | None, status: Status) -> None:
    assert activations.prose(loss, 151_936).status is status


# ---- memory ----


def test_the_memory_of_a_release_is_that_of_its_parameters() -> None:
    config = ModelConfig.load(TINY.parents[1] / "configs" / "models" / "Qwen2.5-VL-3B-Instruct")
    parameters = 3_754_622_976
    largest = 36 * 2048 * 11008  # the gate projections of all layers
    assert activations.bytes_needed(config, "float32") == 4 * (parameters + largest)
    assert activations.bytes_needed(config, "bfloat16") == 2 * (parameters + largest)


def test_too_little_memory_is_told_before_loading(monkeypatch: pytest.MonkeyPatch) -> None:
    config = ModelConfig.load(TINY)
    need = activations.bytes_needed(config, "float32")
    monkeypatch.setattr(activations, "bytes_available", lambda: need)
    activations.check_memory(config, "float32")
    monkeypatch.setattr(activations, "bytes_available", lambda: need - 1)
    with pytest.raises(TooLittleMemoryError, match=r"--dtype bfloat16 .*--no-logits"):
        activations.check_memory(config, "float32")
    activations.check_memory(config, "bfloat16")
    monkeypatch.setattr(activations, "bytes_available", lambda: 1000)
    with pytest.raises(TooLittleMemoryError) as caught:
        activations.check_memory(config, "bfloat16")
    assert "--dtype" not in str(caught.value)
    monkeypatch.setattr(activations, "bytes_available", lambda: None)
    activations.check_memory(config, "float32")


def test_a_containers_limit_counts_without_its_file_cache(tmp_path: Path) -> None:
    assert activations._cgroup(tmp_path) is None
    (tmp_path / "memory.max").write_text("max\n")
    assert activations._cgroup(tmp_path) is None
    (tmp_path / "memory.max").write_text("1000\n")
    (tmp_path / "memory.stat").write_text("anon 300\nfile 500\nshmem 50\n")
    assert activations._cgroup(tmp_path) == 650


def test_this_machine_has_memory() -> None:
    found = activations.bytes_available()
    assert found is not None and found > 10**8
