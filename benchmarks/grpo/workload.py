"""What is computed: models, prompts and completions that both sides get alike."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.positions import Grid
from models.qwen2_5_vl.processor import Prompt
from tests.oracle.hf_model import released_config
from tests.oracle.prompts import FIRST_TEXT_ID, random_prompt

SECONDS_PER_GRID = 1.0
PAD = 0
ROOT = Path(__file__).resolve().parents[2]


class Workload(NamedTuple):
    """One video and one question, or text alone, G completions of C tokens."""

    model: str  # "3b", "32m", or "100k" for tests
    video: Grid | None  # patches: t grids of h x w; four make a token
    text: int  # tokens of the prompt beside the video's
    group: int  # G
    length: int  # C
    dtype: str  # that products are computed in
    remat: bool  # recompute layers in the backward pass, on all sides; no products if not
    # Completions that PyTorch learns from at a time, gradients summed; 0: all. Ours takes all.
    micro: int = 0

    @property
    def layout(self) -> list[int | Grid]:
        """For `random_prompt`, which puts a token in front of the video and one behind it."""
        if self.video is None:
            return [self.text]
        before = self.text // 4
        return [before, self.video, self.text - before - 2]

    def prompt(self, seed: int) -> Prompt:
        """The prompt; every seed makes another."""
        rng = np.random.default_rng(seed)
        return random_prompt(rng, self.layout, vocab=self.vocab, seconds_per_grid=SECONDS_PER_GRID)

    def completions(self, seed: int) -> np.ndarray:
        """int32[G, C] of random text."""
        rng = np.random.default_rng([seed, 1])
        shape = (self.group, self.length)
        return rng.integers(FIRST_TEXT_ID, self.vocab, shape).astype(np.int32)

    def advantages(self) -> np.ndarray:
        """f32[G], as of a group of which half is right."""
        return np.where(np.arange(self.group) % 2, 1.0, -1.0).astype(np.float32)

    @property
    def unusable(self) -> int:
        """So many ids, the first ones, are never drawn; libraries for text can draw all."""
        return 0 if self.video is None else FIRST_TEXT_ID

    @property
    def vocab(self) -> int:
        return int(raw_config(self.model)["vocab_size"])


WORKLOADS = {
    "cpu-1024": Workload("32m", Grid(16, 16, 16), 76, 8, 64, "float32", remat=False),
    # All 16 at once take PyTorch more than 23 GiB.
    "cpu-2048": Workload("32m", Grid(16, 16, 32), 102, 16, 64, "float32", remat=False, micro=4),
    "text-512": Workload("32m", None, 512, 8, 64, "float32", remat=False),
    "gpu-3b-2048": Workload("3b", Grid(16, 16, 32), 102, 8, 256, "bfloat16", remat=True),
    "gpu-3b-8192": Workload("3b", Grid(32, 32, 32), 102, 8, 256, "bfloat16", remat=True),
}


def raw_config(model: str) -> dict[str, Any]:
    """A config.json: the release's of 3B, or of a model of so many weights."""
    if model == "3b":
        path = ROOT / "configs" / "models" / "Qwen2.5-VL-3B-Instruct" / "config.json"
        raw: dict[str, Any] = json.loads(path.read_text())
        small = released_config(tied=True)
        return raw | {name: small[name] for name in small if name.endswith("_token_id")}
    if model == "100k":
        return released_config(tied=True)
    raw = released_config(
        tied=False,
        vocab=2048,
        hidden_size=512,
        intermediate_size=1408,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=2,
        rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
    )
    raw["vision_config"] |= {
        "depth": 8,
        "hidden_size": 256,
        "intermediate_size": 704,
        "num_heads": 4,
        "out_hidden_size": 512,
        "fullatt_block_indexes": [3, 7],
    }
    return raw


def write_model(model: str, dtype: str, directory: Path) -> ModelConfig:
    """Writes a Hugging Face directory of random weights, stored in `dtype`."""
    import torch
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    from tests.oracle.hf_model import save_released

    raw = raw_config(model) | {"torch_dtype": dtype}
    plain = {k: v for k, v in raw.items() if k not in ("architectures", "torch_dtype")}
    with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
        torch.manual_seed(0)
        config = Qwen2_5_VLConfig.from_dict(plain)
        original = Qwen2_5_VLForConditionalGeneration(config)
        with torch.no_grad():
            for name, weight in original.named_parameters():
                if weight.ndim > 1:
                    weight.normal_(0, weight[0].numel() ** -0.5)
                else:
                    weight.fill_(float("norm" in name or "ln_q" in name))
        save_released(original.to(getattr(torch, dtype)), raw, directory)
    return ModelConfig.load(directory)
