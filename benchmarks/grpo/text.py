"""What libraries that train models of text get: the text part of the model, words for its ids."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from benchmarks.grpo.workload import Workload, raw_config

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

# Of config.json: what a Qwen2 has no use for.
ONLY_VL = ("architectures", "vision_config", "rope_scaling", "bos_token_id", "eos_token_id")


def write_text_part(name: str, dtype: str, directory: Path, target: Path) -> None:
    """Writes the text weights of a Qwen2.5-VL of random weights as a Qwen2, which it is.

    M-RoPE turns text as plain RoPE does, so that both compute the same.
    """
    from safetensors.torch import load_file, save_file

    weights = load_file(directory / "model.safetensors")
    text = {key: value for key, value in weights.items() if not key.startswith("visual.")}
    raw = {
        key: value
        for key, value in raw_config(name).items()
        if key not in ONLY_VL and not key.endswith("_token_id")
    }
    raw |= {"model_type": "qwen2", "architectures": ["Qwen2ForCausalLM"], "torch_dtype": dtype}
    target.mkdir()
    save_file(text, target / "model.safetensors", {"format": "pt"})
    (target / "config.json").write_text(json.dumps(raw))


def written(tokens: Sequence[int] | np.ndarray) -> str:
    """A word for each id."""
    return " ".join(f"w{token}" for token in tokens)


def tokenizer(vocab: int) -> PreTrainedTokenizerFast:
    """Reads such words.

    Padding and the end are ids behind the model's own: never drawn, so that completions have
    their full length.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {f"w{token}": token for token in range(vocab)} | {"<pad>": vocab, "<end>": vocab + 1}
    reader = Tokenizer(models.WordLevel(words, unk_token="w0"))
    reader.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=reader, pad_token="<pad>", eos_token="<end>", padding_side="left"
    )


def half_right(completions: Sequence[object]) -> list[float]:
    """A reward that costs nothing: every other completion is right."""
    return [float(number % 2) for number in range(len(completions))]


def prompts(workload: Workload, count: int) -> list[str]:
    """Those that every side gets, in words."""
    return [written(workload.prompt(seed).tokens) for seed in range(count)]
