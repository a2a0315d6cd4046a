"""The architecture of a Qwen2.5-VL checkpoint, read from its `config.json`.

There are no preset tables: a model's sizes come from its directory. Both layouts found in the wild
are read: the flat one of the released checkpoints (text fields at the top level) and the nested one
that transformers 5 writes (`text_config`, `rope_parameters`).
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any


class ModelConfigError(ValueError):
    """A `config.json` that does not describe a Qwen2.5-VL model this code can run."""


@dataclasses.dataclass(frozen=True)
class VisionConfig:
    """The vision tower (`vision_config` in config.json)."""

    depth: int
    width: int  # hidden_size
    heads: int
    mlp_width: int  # intermediate_size
    out_width: int  # out_hidden_size, the text model's width
    full_attention_blocks: tuple[int, ...]  # the other blocks attend within windows
    window_size: int  # pixels
    patch_size: int  # pixels
    temporal_patch_size: int  # frames
    merge_size: int  # spatial_merge_size: patches per side of a merged unit
    tokens_per_second: float  # M-RoPE time steps per second

    @property
    def head_dim(self) -> int:
        return self.width // self.heads

    @property
    def patch_dim(self) -> int:
        """Values of one patch row: (channels, frames, rows, columns)."""
        return 3 * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_area(self) -> int:
        """Patches of one merged unit, which becomes one token of the text model."""
        return self.merge_size**2

    @property
    def window_side(self) -> int:
        """Merged units per side of an attention window."""
        return self.window_size // self.merge_size // self.patch_size

    @property
    def window_patches(self) -> int:
        """Patches of a whole (not ragged) attention window."""
        return (self.window_side * self.merge_size) ** 2


@dataclasses.dataclass(frozen=True)
class TextConfig:
    """The decoder."""

    layers: int
    width: int  # hidden_size
    heads: int
    kv_heads: int
    head_dim: int
    mlp_width: int  # intermediate_size
    vocab: int  # rows of the embedding; the tokenizer may know fewer
    rope_theta: float
    mrope_section: tuple[int, int, int]  # frequencies turned by t, h, w
    norm_eps: float
    tied: bool  # tie_word_embeddings: the embedding is also the output head


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """One Qwen2.5-VL checkpoint's architecture and the ids of its vision tokens."""

    vision: VisionConfig
    text: TextConfig
    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int

    @classmethod
    def load(cls, directory: str | Path) -> ModelConfig:
        """Reads `directory/config.json`.

        Raises:
          FileNotFoundError: there is no such file.
          ModelConfigError: it is not a Qwen2.5-VL config, or a field is missing or unsupported.
        """
        path = Path(directory) / "config.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: a model directory holds config.json, the tokenizer's "
                "files and *.safetensors, as downloaded from Hugging Face"
            )
        try:
            raw = json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:  # JSON's and UTF-8's
            raise ModelConfigError(f"{path} is not valid JSON: {error}") from error
        if not isinstance(raw, dict):
            raise ModelConfigError(f"{path}: expected a JSON object, found {repr(raw)[:80]}")
        try:
            return cls.from_dict(raw, source=str(path))
        except (TypeError, AttributeError, ZeroDivisionError) as error:
            raise ModelConfigError(
                f"{path}: a field has a value of another kind than in the releases: {error}"
            ) from error

    @classmethod
    def from_dict(cls, raw: dict[str, Any], source: str = "config.json") -> ModelConfig:
        """Builds the config from the parsed JSON; `source` names it in errors."""
        if raw.get("model_type") != "qwen2_5_vl":
            raise ModelConfigError(
                f"{source}: model_type is {raw.get('model_type')!r}, expected 'qwen2_5_vl'"
            )
        text = _Fields(raw.get("text_config", raw), f"{source}: text_config")
        vision = _Fields(raw.get("vision_config"), f"{source}: vision_config")
        top = _Fields(raw, source)
        if text.get("use_sliding_window", False):
            raise ModelConfigError(f"{source}: use_sliding_window is true; no release uses it")
        for fields in (text, vision):
            if fields.get("hidden_act", "silu") != "silu":
                raise ModelConfigError(f"{fields.source}: hidden_act must be 'silu'")
        rope = text.get("rope_parameters") or text.get("rope_scaling") or {}
        section = tuple(rope.get("mrope_section", ()))
        heads = text["num_attention_heads"]
        head_dim = text["hidden_size"] // heads
        if len(section) != 3 or sum(section) * 2 != head_dim:
            raise ModelConfigError(
                f"{source}: mrope_section is {list(section)}, expected three numbers that sum to "
                f"half the head dimension ({head_dim} / 2)"
            )
        theta: Any = rope.get("rope_theta", text.get("rope_theta", 1_000_000.0))
        config = cls(
            vision=VisionConfig(
                depth=vision["depth"],
                width=vision["hidden_size"],
                heads=vision["num_heads"],
                mlp_width=vision["intermediate_size"],
                out_width=vision["out_hidden_size"],
                full_attention_blocks=tuple(vision["fullatt_block_indexes"]),
                window_size=vision["window_size"],
                patch_size=vision["patch_size"],
                temporal_patch_size=vision["temporal_patch_size"],
                merge_size=vision["spatial_merge_size"],
                tokens_per_second=vision["tokens_per_second"],
            ),
            text=TextConfig(
                layers=text["num_hidden_layers"],
                width=text["hidden_size"],
                heads=heads,
                kv_heads=text["num_key_value_heads"],
                head_dim=head_dim,
                mlp_width=text["intermediate_size"],
                vocab=text["vocab_size"],
                rope_theta=float(theta),
                mrope_section=section,
                norm_eps=float(text["rms_norm_eps"]),
                tied=bool(raw.get("tie_word_embeddings", text.get("tie_word_embeddings", False))),
            ),
            image_token_id=top["image_token_id"],
            video_token_id=top["video_token_id"],
            vision_start_token_id=top["vision_start_token_id"],
            vision_end_token_id=top["vision_end_token_id"],
        )
        config._check(source)
        return config

    def _check(self, source: str) -> None:
        vision, text = self.vision, self.text
        checks = {
            "vision out_hidden_size equals the text hidden_size": vision.out_width == text.width,
            "vision hidden_size is a multiple of 4 * num_heads": vision.width % (4 * vision.heads)
            == 0,
            "num_attention_heads is a multiple of num_key_value_heads": text.heads % text.kv_heads
            == 0,
            "window_size is a multiple of patch_size * spatial_merge_size": vision.window_size
            % (vision.patch_size * vision.merge_size)
            == 0,
            "fullatt_block_indexes lie within depth": all(
                0 <= block < vision.depth for block in vision.full_attention_blocks
            ),
        }
        for rule, holds in checks.items():
            if not holds:
                raise ModelConfigError(f"{source}: it must hold that {rule}")


class _Fields:
    """A dict whose missing keys are errors that name the file and the key."""

    def __init__(self, values: dict[str, Any] | None, source: str):
        if not isinstance(values, dict):
            raise ModelConfigError(f"{source} is missing")
        self.values = values
        self.source = source
        self.get = values.get

    def __getitem__(self, key: str) -> Any:
        if key not in self.values:
            raise ModelConfigError(f"{self.source}: field {key!r} is missing")
        return self.values[key]
