"""`jaxgrpo verify`: a verdict on a model directory, loud where something is wrong."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from jaxgrpo import export, verify
from jaxgrpo.verification import activations
from jaxgrpo.verification.checks import Check, Status
from tests.jaxgrpo.verification.directories import (
    TINY,
    copy,
    edit_json,
    edit_weights,
    flip_a_bit,
    swap,
)

CLONE = TINY.parents[1]
UP, GATE = "model.layers.2.mlp.up_proj.weight", "model.layers.1.mlp.gate_proj.weight"
NAMES = [
    *("config.json", "processor config", "tokenizer", "processor", "positions", "hub hashes"),
    *("weights", "fingerprint", "plausibility", "prose", "layers", "logits"),
]

Lines = dict[str, str]


def lines(printed: str) -> Lines:
    """The status of each check by name, and the verdict."""
    found = {}
    for line in printed.splitlines():
        status, _, rest = line.partition(" ")
        if status in set(Status):
            found[rest.strip().split(":")[0]] = status
    return found | {"verdict": printed.splitlines()[-1]}


def test_an_exported_model_passes(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export.export_model(TINY, tmp_path / "out", "float32")
    assert verify.main(str(tmp_path / "out")) == 0
    found = lines(capsys.readouterr().out)
    verdict = found.pop("verdict")
    assert list(found) == NAMES
    assert {name for name in NAMES if found[name] != "PASS"} == {"hub hashes", "prose"}
    assert verdict == (
        f"PASS: jaxgrpo computes with {tmp_path / 'out'} what transformers computes; "
        "not checked: hub hashes, prose."
    )


def test_the_shipped_model_passes_and_the_figures_are_for_programs_too(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert verify.main(str(TINY), as_json=True) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["passed"] is True
    assert report["verdict"].startswith("PASS")
    assert report["dtype"] == "float32"
    assert [check["name"] for check in report["checks"]] == NAMES
    assert {check["status"] for check in report["checks"]} == {"PASS", "SKIPPED"}


def test_swapped_tensors_fail_although_the_logits_agree(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = edit_weights(copy(tmp_path / "model"), swap(UP, GATE))
    assert verify.main(str(directory)) == 1
    printed = capsys.readouterr().out
    found = lines(printed)
    assert (found["fingerprint"], found["logits"]) == ("FAIL", "PASS")
    assert f"{GATE} and {UP} have changed places" in printed
    assert found["verdict"].startswith(f"FAIL: fingerprint: do not train {directory}")


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (
            lambda d: edit_json(d, "preprocessor_config.json", patch_size=16),
            "patch_size is 16, config.json's vision_config.patch_size is 14",
        ),
        (lambda d: edit_weights(d, flip_a_bit(UP)), f"{UP}: other bytes than were written"),
        (
            lambda d: edit_json(d, "config.json", rope_theta=5.0),
            "config.json: rope_theta is 5.0, was 10000.0",
        ),
        (
            lambda d: edit_json(d, "config.json", model_type="qwen3_vl"),
            "model_type is 'qwen3_vl', expected 'qwen2_5_vl'",
        ),
        (
            lambda d: edit_json(d, "config.json", video_token_id=3),
            "<|video_pad|> has id 454, but config.json says 3",
        ),
    ],
    ids=["patch size", "one bit", "rope theta", "model type", "token id"],
)
def test_what_is_wrong_fails_and_is_named(
    change: object, told: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert callable(change)
    directory = change(copy(tmp_path / "model"))
    assert verify.main(str(directory), logits=False) == 1
    printed = capsys.readouterr().out
    assert told in printed
    assert printed.splitlines()[-1].startswith("FAIL: ")


def test_a_truncated_file_fails_and_leaves_out_what_needs_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = copy(tmp_path / "model") / "model.safetensors"
    file.write_bytes(file.read_bytes()[: 1 << 20])
    assert verify.main(str(file.parent)) == 1
    printed = capsys.readouterr().out
    assert f"{file} is not a whole safetensors file" in printed
    found = lines(printed)
    assert {found[name] for name in ("fingerprint", "prose", "layers", "logits")} == {"SKIPPED"}


def test_without_logits_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    assert verify.main(str(TINY), logits=False) == 0
    assert lines(capsys.readouterr().out)["verdict"] == (
        f"PASS, but what {TINY} computes was not compared with transformers; "
        "not checked: hub hashes, prose, layers, logits."
    )


# Hides torch from every import, as if it were not installed.
WITHOUT_TORCH = """
import importlib.machinery, sys
find = importlib.machinery.PathFinder.find_spec
hidden = lambda name, *rest: None if name.split(".")[0] == "torch" else find(name, *rest)
importlib.machinery.PathFinder.find_spec = hidden
from jaxgrpo import cli
sys.exit(cli.main(["verify", sys.argv[1]]))
"""


def test_without_torch_what_needs_it_is_skipped() -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH, str(TINY)],
        cwd=CLONE, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = lines(done.stdout)
    for name in ("positions", "layers", "logits"):
        assert found[name] == "SKIPPED"
        assert f"{name}: torch is not installed: pip install torch" in done.stdout
    for name in ("config.json", "processor config", "tokenizer", "processor", "fingerprint"):
        assert found[name] == "PASS"
    assert "was not compared with transformers; not checked: positions" in found["verdict"]


def test_too_little_memory_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(activations, "bytes_available", lambda: 1000)
    with pytest.raises(activations.TooLittleMemoryError, match="needs 0.0 GB"):
        verify.main(str(TINY))


def test_a_run_is_to_be_exported_first(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("run_dir: x")
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(verify.VerifyError, match=f"jaxgrpo export {tmp_path} OUT"):
        verify.main(str(tmp_path))


def test_warnings_and_failures_are_all_in_the_verdict() -> None:
    done = [
        Check("a", Status.PASS, ""),
        Check("b", Status.WARN, ""),
        Check("c", Status.FAIL, ""),
        Check("d", Status.SKIPPED, ""),
        Check("e", Status.FAIL, ""),
    ]
    assert verify.verdict("m", done) == (
        "FAIL: c, e: do not train m before this is explained; with warnings: b; not checked: d."
    )
    assert verify.verdict("m", done[:2]) == (
        "PASS: jaxgrpo computes with m what transformers computes; with warnings: b."
    )
