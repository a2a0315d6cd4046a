"""Weights that are not what they should be: each is named."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from jaxgrpo import fingerprint
from jaxgrpo.verification import tensors
from jaxgrpo.verification.checks import Check, Status
from models.qwen2_5_vl.config import ModelConfig
from tests.jaxgrpo.verification.directories import (
    TINY,
    Tensors,
    copy,
    edit_json,
    edit_weights,
    flip_a_bit,
    swap,
)

CONFIG = ModelConfig.load(TINY)
UP, GATE = "model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"


def checked(directory: Path) -> dict[str, Check]:
    return {check.name: check for check in tensors.check(directory, CONFIG)}


def changed(tmp_path: Path, change: Callable[[Tensors], None]) -> Path:
    return edit_weights(copy(tmp_path / "model"), change)


def test_the_shipped_model_is_whole() -> None:
    found = {name: (check.status, check.details) for name, check in checked(TINY).items()}
    assert found == {
        "hub hashes": (Status.SKIPPED, ()),
        "weights": (Status.PASS, ()),
        "fingerprint": (Status.PASS, ()),
        "plausibility": (Status.PASS, ()),
    }


# ---- the table, and what is finite ----


def test_what_is_missing_unknown_or_mis_shaped_is_named(tmp_path: Path) -> None:
    def change(weights: Tensors) -> None:
        weights["extra"] = weights.pop(UP)
        weights["model.norm.weight"] = torch.ones(3)

    found = checked(changed(tmp_path, change))
    assert found["weights"].status is Status.FAIL
    for told in (f"missing: {UP}", "unknown: extra", "mis-shaped: model.norm.weight is (3,)"):
        assert told in found["weights"].summary
    assert found["fingerprint"].status is Status.SKIPPED


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = copy(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1000])
    check = checked(file.parent)["weights"]
    assert check.status is Status.FAIL
    assert f"{file} is not a whole safetensors file" in check.summary
    assert "download it again" in check.summary


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    file = copy(tmp_path / "model") / "model.safetensors"
    file.unlink()
    check = checked(file.parent)["weights"]
    assert check.status is Status.FAIL
    assert "has no *.safetensors" in check.summary


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_value_that_is_not_finite_is_named_with_its_place(value: float, tmp_path: Path) -> None:
    def change(weights: Tensors) -> None:
        weights[UP][5, 7] = value
        weights[UP][9, 0] = value

    check = checked(changed(tmp_path, change))["weights"]
    assert check.status is Status.FAIL
    assert check.details == (
        f"{UP} in model.safetensors: 2 values are not finite, the first at [5, 7]",
    )


# ---- the fingerprint ----


def test_tensors_that_have_changed_places_are_named_together(tmp_path: Path) -> None:
    check = checked(changed(tmp_path, swap(UP, GATE)))["fingerprint"]
    assert check.status is Status.FAIL
    assert len(check.details) == 1
    told = check.details[0]
    assert UP in told and GATE in told
    assert told.endswith("have changed places: each holds the other's content")


def test_a_tensor_that_was_overwritten_by_another_is_named_with_it(tmp_path: Path) -> None:
    def change(weights: Tensors) -> None:
        weights[UP] = weights[GATE].clone()

    found = checked(changed(tmp_path, change))
    assert found["fingerprint"].details == (f"{UP} holds the content of {GATE}",)
    assert found["plausibility"].status is Status.WARN
    assert "hold the same values" in found["plausibility"].details[0]


def test_three_tensors_in_a_ring_are_all_named(tmp_path: Path) -> None:
    third = UP.replace(".2.", ".3.")

    def change(weights: Tensors) -> None:
        weights[UP], weights[GATE], weights[third] = weights[GATE], weights[third], weights[UP]

    assert set(checked(changed(tmp_path, change))["fingerprint"].details) == {
        f"{UP} holds the content of {GATE}",
        f"{GATE} holds the content of {third}",
        f"{third} holds the content of {UP}",
    }


def test_one_bit_is_noticed(tmp_path: Path) -> None:
    found = checked(changed(tmp_path, flip_a_bit(UP)))
    assert found["fingerprint"].details == (f"{UP}: other bytes than were written",)
    assert found["plausibility"].status is Status.PASS


def test_equal_tensors_are_not_taken_for_one_another(tmp_path: Path) -> None:
    """Two tensors hold the same zeros; one is overwritten."""
    names = [f"visual.blocks.{n}.mlp.up_proj.bias" for n in (0, 1)]

    def zeros(weights: Tensors) -> None:
        for name in names:
            weights[name].zero_()

    directory = changed(tmp_path, zeros)
    fingerprint.write(directory)
    assert checked(directory)["fingerprint"].status is Status.PASS

    def change(weights: Tensors) -> None:
        weights[names[0]].fill_(1.0)

    check = checked(edit_weights(directory, change))["fingerprint"]
    assert check.details == (f"{names[0]}: other bytes than were written",)


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"rope_theta": 5.0}, "config.json: rope_theta is 5.0, was 10000.0"),
        (
            {"rope_scaling": {"type": "mrope", "mrope_section": [6, 4, 6]}},
            "config.json: rope_scaling.mrope_section is [6, 4, 6], was [4, 6, 6]",
        ),
        ({}, "config.json: the same values, written otherwise"),
    ],
)
def test_a_changed_config_is_named_by_its_key(
    values: dict[str, object], told: str, tmp_path: Path
) -> None:
    """transformers reads it alike, so that no comparison with it could tell."""
    directory = edit_json(copy(tmp_path / "model"), "config.json", **values)
    if not values:
        (directory / "config.json").write_text((directory / "config.json").read_text() + "\n\n")
    assert checked(directory)["fingerprint"].details == (told,)


def test_other_files_that_changed_or_are_gone_are_named(tmp_path: Path) -> None:
    directory = edit_json(copy(tmp_path / "model"), "generation_config.json", top_k=1)
    (directory / "chat_template.json").unlink()
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    check = checked(directory)["fingerprint"]
    assert check.status is Status.FAIL
    assert set(check.details) == {
        "generation_config.json: other content than was written",
        "chat_template.json is missing",
        "chat_template.jinja was not there",
    }


def test_a_file_that_was_added_is_a_warning(tmp_path: Path) -> None:
    directory = copy(tmp_path / "model")
    (directory / "chat_template.jinja").write_text("{{ messages }}")
    check = checked(directory)["fingerprint"]
    assert (check.status, check.details) == (Status.WARN, ("chat_template.jinja was not there",))


def test_a_damaged_fingerprint_fails(tmp_path: Path) -> None:
    directory = copy(tmp_path / "model")
    (directory / fingerprint.FILE).write_text("{")
    check = checked(directory)["fingerprint"]
    assert check.status is Status.FAIL
    assert fingerprint.FILE in check.summary


def test_without_a_fingerprint_what_cannot_be_known_is_said(tmp_path: Path) -> None:
    directory = changed(tmp_path, swap(UP, GATE))
    (directory / fingerprint.FILE).unlink()
    check = checked(directory)["fingerprint"]
    assert check.status is Status.SKIPPED
    assert "nothing here can tell two tensors of one shape that have changed places" in (
        check.summary
    )


# ---- the hub's hashes ----


def in_the_hubs_cache(folder: Path) -> Path:
    """models/tiny as huggingface_hub keeps a model: links to blobs that are named by hashes."""
    snapshot, blobs = folder / "snapshots" / "abc", folder / "blobs"
    snapshot.mkdir(parents=True)
    blobs.mkdir()
    for path in TINY.iterdir():
        if path.name == fingerprint.FILE:
            continue
        content = path.read_bytes()
        large = path.suffix == ".safetensors"
        blob = hashlib.sha1(f"blob {len(content)}\0".encode() + content)
        digest = hashlib.sha256(content) if large else blob
        shutil.copyfile(path, blobs / digest.hexdigest())
        (snapshot / path.name).symlink_to(blobs / digest.hexdigest())
    return snapshot


def test_files_of_the_hubs_cache_have_its_hashes(tmp_path: Path) -> None:
    check = tensors.hub(in_the_hubs_cache(tmp_path))
    assert check.status is Status.PASS
    assert check.summary == "7 files have the hashes that the hub gave them"


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_file_of_the_hubs_cache_is_named(name: str, tmp_path: Path) -> None:
    path = in_the_hubs_cache(tmp_path) / name
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    check = tensors.hub(path.parent)
    assert check.status is Status.FAIL
    assert len(check.details) == 1
    assert check.details[0].startswith(f"{name}: hash ")


def test_a_downloads_metadata_holds_the_hubs_hashes_too(tmp_path: Path) -> None:
    directory = copy(tmp_path / "model")
    kept = directory / ".cache" / "huggingface" / "download"
    kept.mkdir(parents=True)
    digest = fingerprint.file_sha256(directory / "model.safetensors")
    (kept / "model.safetensors.metadata").write_text(f"commit\n{digest}\n1700000000.0\n")
    assert tensors.hub(directory).status is Status.PASS
    edit_weights(directory, flip_a_bit(UP))
    assert tensors.hub(directory).status is Status.FAIL


# ---- plausibility ----


@pytest.mark.parametrize(
    ("name", "factor", "told"),
    [
        (UP, 40.0, "times the median of its 4 layers"),
        (UP, 0.0, "holds one value only"),
        ("model.norm.weight", 1000.0, "norms lie around 1"),
        ("visual.blocks.0.norm1.weight", 1e-3, "norms lie around 1"),
    ],
)
def test_an_unusual_tensor_is_a_warning_that_names_it(
    name: str, factor: float, told: str, tmp_path: Path
) -> None:
    def change(weights: Tensors) -> None:
        weights[name] *= factor

    check = checked(changed(tmp_path, change))["plausibility"]
    assert check.status is Status.WARN
    assert check.details[0].startswith(name)
    assert told in check.details[0]
