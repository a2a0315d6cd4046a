"""config.json and the processor's files: whether we read in them what transformers reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Final

import numpy as np
from transformers import AutoConfig

from jaxgrpo.verification.checks import Check, OtherSideError, Status, ask, read_json, verdict_on
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.vision import PIXEL_MEAN, PIXEL_STD

CONFIG: Final = "config.json"
PROCESSOR: Final = "processor config"
_PROCESSOR_FILES: Final = (
    "preprocessor_config.json",
    "video_preprocessor_config.json",
    "processor_config.json",
)
_RELEASES: Final = Path(__file__).parents[2] / "configs" / "models"

# Fields that are read, that decide nothing about a forward pass, or that must have one value.
_KNOWN: Final = frozenset((
    "_attn_implementation", "_name_or_path", "architectures", "attention_dropout",
    "attn_implementation", "bos_token_id", "depth", "dtype", "eos_token_id",
    "fullatt_block_indexes", "hidden_act", "hidden_size", "image_token_id", "in_channels",
    "in_chans", "initializer_range", "intermediate_size", "layer_types",
    "max_position_embeddings", "max_window_layers", "model_type", "num_attention_heads",
    "num_heads", "num_hidden_layers", "num_key_value_heads", "out_hidden_size",
    "pad_token_id", "patch_size", "rms_norm_eps", "rope_parameters", "rope_scaling",
    "rope_theta", "sliding_window", "spatial_merge_size", "spatial_patch_size",
    "temporal_patch_size", "text_config", "tie_word_embeddings", "tokens_per_second",
    "torch_dtype", "transformers_version", "use_cache", "use_sliding_window",
    "video_token_id", "vision_config", "vision_end_token_id", "vision_start_token_id",
    "vision_token_id", "vocab_size", "window_size",
))  # fmt: skip
# A weight's shape depends on them: equal ones mean that it may be the same model.
_TEXT_SIZES: Final = ("layers", "width", "heads", "kv_heads", "mlp_width", "vocab", "tied")
_VISION_SIZES: Final = ("depth", "width", "heads", "mlp_width", "out_width")


def config_json(directory: Path, config: ModelConfig) -> Check:
    """Our reading against transformers' config object, field by field, and fields unknown to us.

    Raises:
      OtherSideError: transformers cannot read the file.
    """
    raw = read_json(directory / CONFIG)
    theirs = _theirs(directory)
    ours = flat(config)
    problems = [
        f"{key}: ours {ours[key]!r}, transformers {theirs[key]!r}"
        for key in ours
        if ours[key] != theirs[key]
    ]
    problems += _not_supported(raw)
    if problems:
        return Check(CONFIG, Status.FAIL, "read otherwise than by transformers", tuple(problems))
    warnings = _unknown(raw) + [
        f"unlike {name}, whose weights have the same shapes: {difference}"
        for name, difference in _unlike_release(config)
    ]
    summary = f"{len(ours)} values are those that transformers reads"
    return Check(CONFIG, Status.WARN if warnings else Status.PASS, summary, tuple(warnings))


def flat(config: ModelConfig) -> dict[str, Any]:
    """The values of a config by dotted names, lists as tuples."""
    values: dict[str, Any] = {}
    for name, value in dataclasses.asdict(config).items():
        if isinstance(value, dict):
            values |= {f"{name}.{key}": part for key, part in value.items()}
        else:
            values[name] = value
    return values


def _theirs(directory: Path) -> dict[str, Any]:
    """What transformers reads, by the names of `flat`."""

    def read() -> dict[str, Any]:
        top = AutoConfig.from_pretrained(str(directory), local_files_only=True)
        vision, text = top.vision_config, top.text_config
        rope: Any = text.rope_parameters
        return {
            "vision.depth": vision.depth,
            "vision.width": vision.hidden_size,
            "vision.heads": vision.num_heads,
            "vision.mlp_width": vision.intermediate_size,
            "vision.out_width": vision.out_hidden_size,
            "vision.full_attention_blocks": tuple(vision.fullatt_block_indexes),
            "vision.window_size": vision.window_size,
            "vision.patch_size": vision.patch_size,
            "vision.temporal_patch_size": vision.temporal_patch_size,
            "vision.merge_size": vision.spatial_merge_size,
            "vision.tokens_per_second": vision.tokens_per_second,
            "text.layers": text.num_hidden_layers,
            "text.width": text.hidden_size,
            "text.heads": text.num_attention_heads,
            "text.kv_heads": text.num_key_value_heads,
            "text.head_dim": text.hidden_size // text.num_attention_heads,
            "text.mlp_width": text.intermediate_size,
            "text.vocab": text.vocab_size,
            "text.rope_theta": float(rope["rope_theta"]),
            "text.mrope_section": tuple(rope.get("mrope_section", (16, 24, 24))),
            "text.norm_eps": float(text.rms_norm_eps),
            "text.tied": bool(top.tie_word_embeddings),
            "image_token_id": top.image_token_id,
            "video_token_id": top.video_token_id,
            "vision_start_token_id": top.vision_start_token_id,
            "vision_end_token_id": top.vision_end_token_id,
        }

    return ask("transformers cannot read config.json", read)


def _parts(raw: Mapping[str, Any]) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(prefix, fields) of the file's sections; the flat layout has no text_config."""
    yield "", raw
    for name in ("text_config", "vision_config"):
        if isinstance(raw.get(name), dict):
            yield f"{name}.", raw[name]


def _not_supported(raw: Mapping[str, Any]) -> list[str]:
    """Values that would change what transformers computes and that we do not implement."""
    problems = []
    for prefix, fields in _parts(raw):
        for key in ("rope_scaling", "rope_parameters"):
            rope = fields.get(key) or {}
            for name in ("type", "rope_type"):
                if rope.get(name, "mrope") not in ("mrope", "default", "axial"):
                    problems.append(
                        f"{prefix}{key}.{name} is {rope[name]!r}, expected 'mrope' or 'default': "
                        "other rotary embeddings are not implemented"
                    )
        for key in ("in_chans", "in_channels"):
            if fields.get(key, 3) != 3:
                problems.append(f"{prefix}{key} is {fields[key]!r}, expected 3: pixels are RGB")
        if fields.get("attention_dropout"):
            problems.append(f"{prefix}attention_dropout is {fields['attention_dropout']}, not 0")
        if set(fields.get("layer_types") or ()) - {"full_attention"}:
            problems.append(f"{prefix}layer_types holds others than 'full_attention'")
    return problems


def _unknown(raw: Mapping[str, Any]) -> list[str]:
    return [
        f"{prefix}{key} is {value!r}: jaxgrpo does not know this field and ignores it"
        for prefix, fields in _parts(raw)
        for key, value in fields.items()
        if key not in _KNOWN
    ]


def _unlike_release(config: ModelConfig) -> Iterator[tuple[str, str]]:
    """What differs from the release whose weights have these shapes, if there is one."""

    def sizes(config: ModelConfig) -> list[Any]:
        text, vision = (dataclasses.asdict(part) for part in (config.text, config.vision))
        return [text[key] for key in _TEXT_SIZES] + [vision[key] for key in _VISION_SIZES]

    for folder in sorted(_RELEASES.iterdir()):
        release = ModelConfig.load(folder)
        if sizes(release) == sizes(config):
            expected = flat(release)
            for key, value in flat(config).items():
                if value != expected[key]:
                    yield folder.name, f"{key} is {value!r}, there {expected[key]!r}"


def processor_files(directory: Path, config: ModelConfig) -> Check:
    """The image processor's settings against config.json and against the constants of our code.

    Raises:
      OtherSideError: there are none, or a file is not JSON.
    """
    vision = config.vision
    expected: dict[str, tuple[Any, str]] = {
        "patch_size": (vision.patch_size, "config.json's vision_config.patch_size"),
        "temporal_patch_size": (
            vision.temporal_patch_size,
            "config.json's vision_config.temporal_patch_size",
        ),
        "merge_size": (vision.merge_size, "config.json's vision_config.spatial_merge_size"),
        "image_mean": (PIXEL_MEAN / 255, "jaxgrpo's"),
        "image_std": (PIXEL_STD / 255, "jaxgrpo's"),
        "rescale_factor": (1 / 255, "jaxgrpo's"),
        "resample": (3, "jaxgrpo's (bicubic)"),
        "do_resize": (True, "jaxgrpo's"),
        "do_rescale": (True, "jaxgrpo's"),
        "do_normalize": (True, "jaxgrpo's"),
    }
    problems: list[str] = []
    limits: list[str] = []
    count = 0
    for source, settings in _processor_settings(directory):
        for key, (value, whose) in expected.items():
            if key not in settings:
                continue
            count += 1
            if not _equal(settings[key], value):
                problems.append(f"{source}: {key} is {settings[key]}, {whose} is {_plain(value)}")
        size = settings.get("size") or {}
        low = settings.get("min_pixels", size.get("shortest_edge"))
        high = settings.get("max_pixels", size.get("longest_edge"))
        if low is not None and high is not None:
            limits.append(f"{source}: {low} to {high} pixels")
            if not 0 < low <= high:
                problems.append(f"{source}: min_pixels {low}, max_pixels {high}: not a range")
    if not count:
        raise OtherSideError(
            f"{directory} has none of {', '.join(_PROCESSOR_FILES)}: transformers needs one; "
            "download it too"
        )
    good = f"{count} settings agree with config.json and with jaxgrpo"
    if limits:
        good += f" ({'; '.join(limits)}; training takes data.min_pixels and data.max_pixels)"
    return verdict_on(PROCESSOR, problems, good, "these are not of one model")


def _processor_settings(directory: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """(where it stands, the settings) of each image or video processor of a directory."""
    for name in _PROCESSOR_FILES:
        path = directory / name
        if not path.is_file():
            continue
        content = read_json(path)
        if name == "processor_config.json":
            for part in ("image_processor", "video_processor"):
                if isinstance(content.get(part), dict):
                    yield f"{name}, {part}", content[part]
        else:
            yield name, content


def _equal(found: Any, expected: Any) -> bool:
    if isinstance(expected, bool | int):
        return bool(found == expected)
    found = np.asarray(found, np.float64)
    return found.shape == np.shape(expected) and np.allclose(found, expected, rtol=1e-6, atol=0)


def _plain(value: Any) -> Any:
    return [round(float(x), 6) for x in value] if isinstance(value, np.ndarray) else value
