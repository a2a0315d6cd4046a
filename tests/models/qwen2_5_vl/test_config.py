"""config.json in the released and in transformers 5's layout, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen2_5_VLConfig

from models.qwen2_5_vl.config import ModelConfig, ModelConfigError
from tests.oracle.hf_model import released_config

RELEASES = Path(__file__).parents[3] / "configs" / "models"
Raw = dict[str, Any]


@pytest.fixture
def saved_by_transformers(tmp_path: Path) -> Callable[[Raw], Path]:
    """Writes a released config as `save_pretrained` of transformers 5 does: nested."""

    def save(raw: Raw) -> Path:
        Qwen2_5_VLConfig.from_dict(raw).save_pretrained(tmp_path)
        nested = json.loads((tmp_path / "config.json").read_text())
        assert "text_config" in nested and "hidden_size" not in nested
        assert "rope_parameters" in nested["text_config"]
        return tmp_path

    return save


# ---- what is read ----


@pytest.mark.parametrize(
    ("size", "text", "vision"),
    [
        (
            "3B",
            {"layers": 36, "width": 2048, "heads": 16, "kv_heads": 2, "mlp_width": 11008}
            | {"vocab": 151936, "tied": True},
            {"mlp_width": 3420, "out_width": 2048},
        ),
        (
            "7B",
            {"layers": 28, "width": 3584, "heads": 28, "kv_heads": 4, "mlp_width": 18944}
            | {"vocab": 152064, "tied": False},
            {"mlp_width": 3420, "out_width": 3584},
        ),
        (
            "72B",
            {"layers": 80, "width": 8192, "heads": 64, "kv_heads": 8, "mlp_width": 29568}
            | {"vocab": 152064, "tied": False},
            {"mlp_width": 3456, "out_width": 8192},
        ),
    ],
)
def test_the_releases_are_read(size: str, text: Raw, vision: Raw) -> None:
    config = ModelConfig.load(RELEASES / f"Qwen2.5-VL-{size}-Instruct")
    assert dataclasses.asdict(config.text) == text | {
        "head_dim": 128,
        "rope_theta": 1e6,
        "mrope_section": (16, 24, 24),
        "norm_eps": 1e-6,
    }
    assert dataclasses.asdict(config.vision) == vision | {
        "depth": 32,
        "width": 1280,
        "heads": 16,
        "full_attention_blocks": (7, 15, 23, 31),
        "window_size": 112,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "tokens_per_second": 2,
    }
    assert (config.image_token_id, config.video_token_id) == (151655, 151656)
    assert (config.vision_start_token_id, config.vision_end_token_id) == (151652, 151653)


def test_the_tower_sizes_that_follow_from_a_release() -> None:
    vision = ModelConfig.load(RELEASES / "Qwen2.5-VL-7B-Instruct").vision
    assert vision.head_dim == 80
    assert vision.patch_dim == 1176
    assert vision.merge_area == 4
    assert vision.window_side == 4
    assert vision.window_patches == 64


@pytest.mark.parametrize("size", ["3B", "7B", "72B"])
def test_transformers_5_saves_a_release_to_the_same_config(
    size: str, saved_by_transformers: Callable[[Raw], Path]
) -> None:
    directory = RELEASES / f"Qwen2.5-VL-{size}-Instruct"
    raw = json.loads((directory / "config.json").read_text())
    assert ModelConfig.load(saved_by_transformers(raw)) == ModelConfig.load(directory)


@pytest.mark.parametrize("tied", [True, False])
def test_both_layouts_of_a_small_model_read_the_same(
    tied: bool, saved_by_transformers: Callable[[Raw], Path]
) -> None:
    raw = released_config(tied=tied)
    flat = ModelConfig.from_dict(raw)
    assert flat.text.tied is tied
    assert flat.text.rope_theta == 1e6
    assert ModelConfig.load(saved_by_transformers(raw)) == flat


def test_an_unusual_rotary_base_survives_both_layouts(
    saved_by_transformers: Callable[[Raw], Path],
) -> None:
    raw = released_config(tied=True, rope_theta=12345.0)
    assert ModelConfig.from_dict(raw).text.rope_theta == 12345.0
    assert ModelConfig.load(saved_by_transformers(raw)).text.rope_theta == 12345.0


def test_the_released_sliding_window_is_ignored() -> None:
    """The releases name one, with use_sliding_window false."""
    raw = released_config(tied=True)
    assert ModelConfig.from_dict(raw) == ModelConfig.from_dict(raw | {"sliding_window": None})


def test_a_config_can_be_a_key() -> None:
    """Compiled programs are cached by it."""
    raw = released_config(tied=True)
    assert hash(ModelConfig.from_dict(raw)) == hash(ModelConfig.from_dict(raw))


# ---- what is refused ----


def test_a_directory_without_config_says_what_belongs_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json does not exist: a model directory"):
        ModelConfig.load(tmp_path)


def test_broken_json_is_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": ')
    with pytest.raises(ModelConfigError, match=re.escape(f"{tmp_path}/config.json is not valid")):
        ModelConfig.load(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"model_type": "qwen2_5_vl", "text_config": {"rope_scaling": 5}, "vision_config": {}}',
        (
            b'{"model_type": "qwen2_5_vl", "vision_config": {}, "text_config": {"hidden_size": 8,'
            b'"num_attention_heads": 0}}'
        ),
    ],
)
def test_a_config_of_another_shape_is_named(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelConfigError, match=re.escape(f"{tmp_path}/config.json")):
        ModelConfig.load(tmp_path)


def test_an_error_names_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "llama"}')
    expected = f"{tmp_path}/config.json: model_type is 'llama', expected 'qwen2_5_vl'"
    with pytest.raises(ModelConfigError, match=re.escape(expected)):
        ModelConfig.load(tmp_path)


def test_a_missing_vision_config_is_named() -> None:
    raw = released_config(tied=True)
    del raw["vision_config"]
    with pytest.raises(ModelConfigError, match=r"config\.json: vision_config is missing"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    "key",
    [
        "hidden_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "intermediate_size",
        "vocab_size",
        "rms_norm_eps",
        "image_token_id",
        "video_token_id",
        "vision_start_token_id",
        "vision_end_token_id",
    ],
)
def test_a_missing_field_is_named(key: str) -> None:
    raw = released_config(tied=True)
    del raw[key]
    with pytest.raises(ModelConfigError, match=f"field '{key}' is missing"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    "key",
    [
        "depth",
        "hidden_size",
        "num_heads",
        "intermediate_size",
        "out_hidden_size",
        "fullatt_block_indexes",
        "window_size",
        "patch_size",
        "temporal_patch_size",
        "spatial_merge_size",
        "tokens_per_second",
    ],
)
def test_a_missing_vision_field_is_named(key: str) -> None:
    raw = released_config(tied=True)
    del raw["vision_config"][key]
    with pytest.raises(ModelConfigError, match=f"vision_config: field '{key}' is missing"):
        ModelConfig.from_dict(raw)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"use_sliding_window": True}, "use_sliding_window is true"),
        ({"hidden_act": "gelu"}, "text_config: hidden_act must be 'silu'"),
        ({"vision_config": {"hidden_act": "gelu"}}, "vision_config: hidden_act must be 'silu'"),
        ({"rope_scaling": None}, r"mrope_section is \[\]"),
        ({"rope_scaling": {"mrope_section": [2, 3]}}, r"mrope_section is \[2, 3\]"),
        ({"rope_scaling": {"mrope_section": [2, 3, 4]}}, r"half the head dimension \(16 / 2\)"),
        ({"vision_config": {"out_hidden_size": 128}}, "out_hidden_size equals"),
        ({"vision_config": {"num_heads": 16}}, r"a multiple of 4 \* num_heads"),
        ({"num_key_value_heads": 3}, "a multiple of num_key_value_heads"),
        ({"vision_config": {"window_size": 100}}, "window_size is a multiple"),
        ({"vision_config": {"fullatt_block_indexes": [1, 3]}}, "lie within depth"),
    ],
)
def test_what_cannot_run_is_refused(change: Raw, message: str) -> None:
    raw = released_config(tied=True)
    vision = raw["vision_config"] | change.get("vision_config", {})
    with pytest.raises(ModelConfigError, match=message):
        ModelConfig.from_dict(raw | change | {"vision_config": vision})
