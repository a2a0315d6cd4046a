"""The PyTorch original: small Qwen2.5-VL models of transformers, random in every weight."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

from models.qwen2_5_vl.processor import Prompt

IMAGE, VIDEO, VISION_START, VISION_END = 1, 2, 3, 4  # ids of the small models' vision tokens
NO_TOKENS = np.zeros(0, np.int32)
PATCH_MEAN = np.repeat([0.48145466, 0.4578275, 0.40821073], 2 * 14 * 14)
PATCH_STD = np.repeat([0.26862954, 0.26130258, 0.27577711], 2 * 14 * 14)


def released_config(*, tied: bool, vocab: int = 320, **text: Any) -> dict[str, Any]:
    """A config.json in the flat layout of the released checkpoints, of a model of 100k weights."""
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_act": "silu",
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_attention_heads": 4,
        "num_hidden_layers": 3,
        "num_key_value_heads": 2,
        "max_position_embeddings": 32768,
        "max_window_layers": 3,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000.0,
        "sliding_window": 32768,
        "use_sliding_window": False,
        "tie_word_embeddings": tied,
        "torch_dtype": "float32",
        "vocab_size": vocab,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "image_token_id": IMAGE,
        "video_token_id": VIDEO,
        "vision_start_token_id": VISION_START,
        "vision_end_token_id": VISION_END,
        "bos_token_id": 5,
        "eos_token_id": 6,
        "vision_config": {
            "depth": 3,
            "hidden_act": "silu",
            "hidden_size": 32,
            "intermediate_size": 40,
            "num_heads": 2,
            "in_chans": 3,
            "out_hidden_size": 64,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
        **text,
    }


def random_model(config: dict[str, Any], seed: int) -> Qwen2_5_VLForConditionalGeneration:
    """The original with every weight, norm and bias random, so that logits spread."""
    plain = {k: v for k, v in config.items() if k not in ("architectures", "torch_dtype")}
    hf_config = Qwen2_5_VLConfig.from_dict(plain)
    hf_config._attn_implementation = "eager"
    model = Qwen2_5_VLForConditionalGeneration(hf_config).float().eval()
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            noise = torch.randn(weight.shape, generator=generator)
            if "norm" in name or "ln_q" in name:
                weight.copy_(1.0 + 0.2 * noise)
            elif weight.ndim == 1:
                weight.copy_(0.2 * noise)
            elif "embed_tokens" in name or "lm_head" in name:
                weight.copy_(0.4 * noise)
            else:
                weight.copy_(noise * 1.3 / weight[0].numel() ** 0.5)
    return model


def save_released(
    model: Qwen2_5_VLForConditionalGeneration,
    config: dict[str, Any],
    directory: Path,
    shards: int = 1,
) -> None:
    """Writes config.json and safetensors under the released names, in `shards` files."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(config))
    tensors = {released(k): v.contiguous() for k, v in model.state_dict().items()}
    if config["tie_word_embeddings"]:
        tensors.pop("lm_head.weight", None)
    names = sorted(tensors)
    if shards == 1:
        save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
        return
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        part = {name: tensors[name] for name in names[i::shards]}
        save_file(part, directory / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def released(name: str) -> str:
    """transformers 5's name of a weight -> the released one."""
    return name.replace("model.language_model.", "model.").replace("model.visual.", "visual.")


def natural_order(prompt: Prompt) -> np.ndarray:
    """For each patch of one unpadded prompt, in window order, its place in the original's order.

    The original's order is frame by frame, merged units row by row, 2 x 2 patches in a unit; ours
    has the same frames, so sorting by (frame, unit row, unit column) inside each frame restores it.
    """
    order = np.empty(len(prompt.patches), np.int64)
    start = 0
    for frame in prompt.frame_index:
        rows = frame[frame >= 0]
        row, column = prompt.patch_hw[rows, 0], prompt.patch_hw[rows, 1]
        key = np.lexsort((column % 2, row % 2, column // 2, row // 2))
        order[rows[key]] = start + np.arange(len(rows))
        start += len(rows)
    return order


def pixel_values(prompt: Prompt) -> torch.Tensor:
    """The normalised patches of one unpadded prompt in the original's order, float32."""
    values = (prompt.patches / 255.0 - PATCH_MEAN) / PATCH_STD
    natural = np.empty_like(values)
    natural[natural_order(prompt)] = values
    return torch.tensor(natural, dtype=torch.float32)


def logits(
    model: Qwen2_5_VLForConditionalGeneration,
    prompt: Prompt,
    image_grids: np.ndarray,
    video_grids: np.ndarray,
    completion: np.ndarray = NO_TOKENS,
) -> torch.Tensor:
    """float32[S + C, V]: the original's logits on one unpadded prompt and a completion.

    `prompt` must hold its images before its videos (the original takes them apart). Positions are
    handed over: the release and transformers 5 disagree on them.
    """
    patches = pixel_values(prompt)
    in_images = int(np.prod(image_grids, axis=1).sum()) if len(image_grids) else 0
    tokens = np.concatenate([prompt.tokens, completion])[None]
    after = prompt.positions.max() + 1 + np.arange(len(completion))
    positions = np.concatenate([prompt.positions, np.repeat(after[:, None], 3, axis=1)])
    media: dict[str, torch.Tensor] = {}
    if len(image_grids):
        media |= {"pixel_values": patches[:in_images], "image_grid_thw": torch.tensor(image_grids)}
    if len(video_grids):
        media |= {
            "pixel_values_videos": patches[in_images:],
            "video_grid_thw": torch.tensor(video_grids),
        }
    out = model(
        input_ids=torch.tensor(tokens, dtype=torch.long),
        attention_mask=torch.ones(tokens.shape, dtype=torch.long),
        position_ids=torch.tensor(positions.T[:, None], dtype=torch.long),
        use_cache=False,
        **media,
    )
    return out.logits[0]
