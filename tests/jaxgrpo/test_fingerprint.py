"""The fingerprint of a model directory: the SHA-256 of each tensor and of each other file."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from jaxgrpo import fingerprint
from jaxgrpo.fingerprint import FILE, FingerprintError
from tests.jaxgrpo.verification.directories import TINY, copy, edit_json, edit_weights, flip_a_bit

NAME = "model.layers.2.mlp.up_proj.weight"


def test_a_tensors_hash_is_that_of_its_bytes(tmp_path: Path) -> None:
    bits = load_file(TINY / "model.safetensors")[NAME].view(torch.int16)
    expected = hashlib.sha256(bits.numpy().tobytes()).hexdigest()
    assert fingerprint.take(TINY).tensors[NAME] == expected


def test_shards_and_newer_names_change_nothing(tmp_path: Path) -> None:
    directory = copy(tmp_path / "model")
    tensors = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    newer = {name.replace("visual.", "model.visual."): value for name, value in tensors.items()}
    names = sorted(newer)
    for number in range(2):
        part = {name: newer[name] for name in names[number::2]}
        save_file(part, directory / f"part-{number}.safetensors")
    assert fingerprint.take(directory) == fingerprint.take(TINY)


def test_one_bit_changes_one_hash(tmp_path: Path) -> None:
    directory = edit_weights(copy(tmp_path / "model"), flip_a_bit(NAME))
    before, after = fingerprint.take(TINY).tensors, fingerprint.take(directory).tensors
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == [NAME]


def test_it_holds_config_json_and_the_hashes_of_what_is_loaded_besides_weights() -> None:
    found = fingerprint.take(TINY)
    assert found.config == json.loads((TINY / "config.json").read_text())
    assert set(found.files) == {path.name for path in TINY.glob("*.json")} - {FILE}
    content = (TINY / "tokenizer.json").read_bytes()
    assert found.files["tokenizer.json"] == hashlib.sha256(content).hexdigest()


def test_what_was_written_is_read(tmp_path: Path) -> None:
    directory = copy(tmp_path / "model")
    (directory / FILE).unlink()
    assert fingerprint.read(directory) is None
    expected = fingerprint.take(directory)
    assert fingerprint.write(directory) == directory / FILE
    assert fingerprint.read(directory) == expected


@pytest.mark.parametrize(
    ("content", "told"),
    [
        ("{", "not a fingerprint"),
        ("[]", "not a fingerprint"),
        ('{"format": 1, "config": {}, "files": {}}', "not a fingerprint.*tensors"),
        ('{"format": 2}', "has format 2, expected 1"),
        ('{"format": 1, "config": {}, "files": [], "tensors": {}}', "files is .*an object"),
    ],
)
def test_a_damaged_one_is_named(content: str, told: str, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text(content)
    with pytest.raises(FingerprintError, match=f"{FILE}.*{told}"):
        fingerprint.read(tmp_path)


def test_a_changed_config_changes_its_hash(tmp_path: Path) -> None:
    directory = edit_json(copy(tmp_path / "model"), "config.json", rope_theta=5.0)
    files, expected = fingerprint.files(directory), fingerprint.files(TINY)
    assert [name for name in files if files[name] != expected[name]] == ["config.json"]
