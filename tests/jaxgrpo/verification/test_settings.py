"""config.json and preprocessor_config.json, read by both sides."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo.verification.checks import Check, OtherSideError, Status
from jaxgrpo.verification.settings import config_json, processor_files
from models.qwen2_5_vl.config import ModelConfig
from tests.jaxgrpo.verification.directories import TINY, copy, edit_json

RELEASES = TINY.parents[1] / "configs" / "models"
RELEASE = RELEASES / "Qwen2.5-VL-3B-Instruct"


def checked(directory: Path) -> Check:
    return config_json(directory, ModelConfig.load(directory))


# ---- config.json ----


@pytest.mark.parametrize("directory", [TINY, *sorted(RELEASES.iterdir())], ids=lambda d: d.name)
def test_the_releases_are_read_as_transformers_reads_them(directory: Path) -> None:
    check = checked(directory)
    assert (check.status, check.details) == (Status.PASS, ())
    assert check.summary == "26 values are those that transformers reads"


def test_transformers_nested_layout_is_read_alike(tmp_path: Path) -> None:
    from transformers import AutoConfig

    AutoConfig.from_pretrained(str(TINY)).save_pretrained(tmp_path)
    assert "text_config" in json.loads((tmp_path / "config.json").read_text())
    check = checked(tmp_path)
    assert (check.status, check.details) == (Status.PASS, ())


def test_every_value_that_differs_is_named() -> None:
    ours = ModelConfig.load(TINY)
    text = dataclasses.replace(ours.text, rope_theta=5.0, norm_eps=1e-5)
    check = config_json(TINY, dataclasses.replace(ours, text=text))
    assert check.status is Status.FAIL
    assert check.details == (
        "text.rope_theta: ours 5.0, transformers 10000.0",
        "text.norm_eps: ours 1e-05, transformers 1e-06",
    )


@pytest.mark.parametrize(
    ("values", "told"),
    [
        (
            {"rope_scaling": {"type": "yarn", "factor": 4.0, "mrope_section": [4, 6, 6]}},
            "rope_scaling.type is 'yarn', expected 'mrope' or 'default'",
        ),
        ({"attention_dropout": 0.1}, "attention_dropout is 0.1, not 0"),
    ],
)
def test_what_we_do_not_implement_fails(values: Any, told: str, tmp_path: Path) -> None:
    check = checked(edit_json(copy(tmp_path / "model"), "config.json", **values))
    assert check.status is Status.FAIL
    assert told in "\n".join(check.details)


def test_a_field_that_nobody_knows_is_a_warning(tmp_path: Path) -> None:
    check = checked(edit_json(copy(tmp_path / "model"), "config.json", qk_norm=True))
    assert check.status is Status.WARN
    assert check.details == ("qk_norm is True: jaxgrpo does not know this field and ignores it",)


def test_a_value_unlike_the_release_of_the_same_sizes_is_a_warning(tmp_path: Path) -> None:
    """Both sides read the file alike, so that the logits would agree."""
    directory = shutil.copytree(RELEASE, tmp_path / "model")
    check = checked(edit_json(directory, "config.json", rope_theta=10000.0))
    assert check.status is Status.WARN
    (told,) = check.details
    assert "unlike Qwen2.5-VL-3B-Instruct" in told
    assert told.endswith("text.rope_theta is 10000.0, there 1000000.0")


# ---- the processor's files ----


def test_the_shipped_processor_agrees() -> None:
    check = processor_files(TINY, ModelConfig.load(TINY))
    assert (check.status, check.details) == (Status.PASS, ())
    assert "3136 to 12845056 pixels" in check.summary


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"patch_size": 16}, "patch_size is 16, config.json's vision_config.patch_size is 14"),
        (
            {"temporal_patch_size": 1},
            "temporal_patch_size is 1, config.json's vision_config.temporal_patch_size is 2",
        ),
        ({"merge_size": 4}, "merge_size is 4, config.json's vision_config.spatial_merge_size is 2"),
        (
            {"image_mean": [0.5, 0.5, 0.5]},
            "image_mean is [0.5, 0.5, 0.5], jaxgrpo's is [0.481455, 0.457828, 0.408211]",
        ),
        ({"do_normalize": False}, "do_normalize is False, jaxgrpo's is True"),
        ({"min_pixels": 0}, "min_pixels 0, max_pixels 12845056: not a range"),
    ],
)
def test_another_value_is_named_with_both(values: Any, told: str, tmp_path: Path) -> None:
    directory = edit_json(copy(tmp_path / "model"), "preprocessor_config.json", **values)
    check = processor_files(directory, ModelConfig.load(directory))
    assert check.status is Status.FAIL
    assert check.details == (f"preprocessor_config.json: {told}",)


def test_the_newer_files_are_read_too(tmp_path: Path) -> None:
    directory = copy(tmp_path / "model")
    (directory / "preprocessor_config.json").unlink()
    settings = {"image_processor": {"patch_size": 14}, "video_processor": {"patch_size": 16}}
    (directory / "processor_config.json").write_text(json.dumps(settings))
    check = processor_files(directory, ModelConfig.load(directory))
    (told,) = check.details
    assert told.startswith("processor_config.json, video_processor: patch_size is 16, config.json")


def test_no_file_at_all_is_told(tmp_path: Path) -> None:
    directory = copy(tmp_path / "model")
    (directory / "preprocessor_config.json").unlink()
    with pytest.raises(OtherSideError, match="none of preprocessor_config.json"):
        processor_files(directory, ModelConfig.load(directory))


@pytest.mark.parametrize(("content", "told"), [("{", "is not JSON"), ("[]", "holds list")])
def test_a_file_that_is_no_json_object_is_named(content: str, told: str, tmp_path: Path) -> None:
    path = copy(tmp_path / "model") / "preprocessor_config.json"
    path.write_text(content)
    with pytest.raises(OtherSideError, match=f"{path} {told}"):
        processor_files(path.parent, ModelConfig.load(path.parent))
