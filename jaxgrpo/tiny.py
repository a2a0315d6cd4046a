"""The tiny Qwen2.5-VL of the quickstart and the tests: `python -m jaxgrpo.tiny OUT SCRATCH`.

It has the released models' architecture and files, so everything that reads it (this project,
`transformers`, vLLM) runs the code that it runs on a real checkpoint. Its tokenizer is byte-level
BPE with Qwen's normalisation, split and special tokens, trained on the synthetic questions
(`data.synthetic`): each of their words is one token, and the 256 bytes cover all other text.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)

from data.prompts import question_text, target_text
from data.synthetic import questions, scene
from jaxgrpo import config, export, fingerprint, sft
from jaxgrpo.config import Config

COLD_START = Path(__file__).parent.parent / "configs" / "cold_start.yaml"
WEIGHTS = "model.safetensors"
SYSTEM = "You are a helpful assistant."

# Qwen's split: contractions, words with one leading mark, single digits, marks, line ends, blanks.
SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|object_ref_start|>",
    "<|object_ref_end|>",
    "<|box_start|>",
    "<|box_end|>",
    "<|quad_start|>",
    "<|quad_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
# Always one token, but text: decoding that skips special tokens keeps them.
MARKUP_TOKENS = (
    "<tool_call>",
    "</tool_call>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|repo_name|>",
    "<|file_sep|>",
)
MAX_BPE_VOCAB = 600
VOCAB_MULTIPLE = 64  # the embedding has more rows than the tokenizer has ids, as the releases do

# Renders what the released models' template renders, `add_vision_id` included. Every tag trims the
# blanks around it, so the result does not depend on the Jinja environment's trim settings.
CHAT_TEMPLATE = """\
{%- set seen = namespace(image=0, video=0) -%}
{%- for message in messages -%}
  {%- if loop.first and message['role'] != 'system' -%}
    {{- '<|im_start|>system\\nSYSTEM<|im_end|>\\n' -}}
  {%- endif -%}
  {{- '<|im_start|>' ~ message['role'] ~ '\\n' -}}
  {%- if message['content'] is string -%}
    {{- message['content'] -}}
  {%- else -%}
    {%- for part in message['content'] -%}
      {%- if part['type'] == 'image' or 'image' in part or 'image_url' in part -%}
        {%- set seen.image = seen.image + 1 -%}
        {{- 'Picture ' ~ seen.image ~ ': ' if add_vision_id -}}
        {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
      {%- elif part['type'] == 'video' or 'video' in part -%}
        {%- set seen.video = seen.video + 1 -%}
        {{- 'Video ' ~ seen.video ~ ': ' if add_vision_id -}}
        {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
      {%- elif 'text' in part -%}
        {{- part['text'] -}}
      {%- endif -%}
    {%- endfor -%}
  {%- endif -%}
  {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
""".replace("SYSTEM", SYSTEM)


def make_model_directory(out: str | os.PathLike[str]) -> Path:
    """Writes every file of the tiny model but its weights; files that are there are replaced.

    Writes config.json, generation_config.json, preprocessor_config.json, tokenizer.json,
    tokenizer_config.json and chat_template.json, in the released models' layout. The result is
    the same on every call.

    Returns:
      The directory.
    """
    directory = Path(out)
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = train_tokenizer()
    (directory / "tokenizer.json").write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
    files = {
        "config.json": _config(tokenizer),
        "generation_config.json": _generation_config(tokenizer),
        "preprocessor_config.json": _preprocessor_config(),
        "tokenizer_config.json": _tokenizer_config(tokenizer),
        "chat_template.json": {"chat_template": CHAT_TEMPLATE},
    }
    for name, content in files.items():
        text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
        (directory / name).write_text(text, encoding="utf-8")
    return directory


def train_tokenizer() -> Tokenizer:
    """Trains the byte-level BPE on the synthetic prompts and targets and adds Qwen's tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    trainer = trainers.BpeTrainer(
        vocab_size=MAX_BPE_VOCAB,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_corpus(), trainer)
    tokenizer.add_special_tokens([_added(token, special=True) for token in SPECIAL_TOKENS])
    tokenizer.add_tokens([_added(token, special=False) for token in MARKUP_TOKENS])
    return tokenizer


def _added(token: str, special: bool) -> AddedToken:
    return AddedToken(token, special=special, normalized=False)


def _corpus(scenes: int = 300) -> Iterator[str]:
    """Prompts and targets, cut after every ">" that a letter follows.

    Qwen's split joins a mark to the word behind it. The cut keeps ">B" from becoming one token:
    the letter of an answer is then the token that stands before its option.
    """
    yield from (SYSTEM, "system\n", "user\n", "assistant\n")
    for number in range(scenes):
        for record in questions(scene((0, 2, number), events=(1, 3)), "", "clip.mp4"):
            for thinking in (True, False):
                for text in (question_text(record, thinking), target_text(record, thinking)):
                    yield from re.split(r"(?<=>)(?=[A-Za-z])", text)


def _config(tokenizer: Tokenizer) -> dict[str, Any]:
    """config.json in the flat layout of Qwen2.5-VL-3B-Instruct."""
    width = 128
    return {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "attention_dropout": 0.0,
        "bos_token_id": tokenizer.token_to_id("<|endoftext|>"),
        "eos_token_id": tokenizer.token_to_id("<|im_end|>"),
        "vision_start_token_id": tokenizer.token_to_id("<|vision_start|>"),
        "vision_end_token_id": tokenizer.token_to_id("<|vision_end|>"),
        "vision_token_id": tokenizer.token_to_id("<|vision_pad|>"),
        "image_token_id": tokenizer.token_to_id("<|image_pad|>"),
        "video_token_id": tokenizer.token_to_id("<|video_pad|>"),
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.02,
        "intermediate_size": 384,
        "max_position_embeddings": 32768,
        "max_window_layers": 4,
        "model_type": "qwen2_5_vl",
        "num_attention_heads": 4,
        "num_hidden_layers": 4,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-06,
        "rope_theta": 10000.0,
        "sliding_window": 32768,
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "use_sliding_window": False,
        "vision_config": {
            "depth": 2,
            "hidden_act": "silu",
            "hidden_size": 64,
            "intermediate_size": 128,
            "num_heads": 2,
            "in_chans": 3,
            "out_hidden_size": width,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "spatial_patch_size": 14,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
            "temporal_patch_size": 2,
        },
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "vocab_size": (tokenizer.get_vocab_size() // VOCAB_MULTIPLE + 1) * VOCAB_MULTIPLE,
    }


def _generation_config(tokenizer: Tokenizer) -> dict[str, Any]:
    end_of_text, end_of_turn = map(tokenizer.token_to_id, ("<|endoftext|>", "<|im_end|>"))
    return {
        "bos_token_id": end_of_text,
        "pad_token_id": end_of_text,
        "eos_token_id": [end_of_turn, end_of_text],
        "do_sample": False,
    }


def _preprocessor_config() -> dict[str, Any]:
    return {
        "min_pixels": 56 * 56,
        "max_pixels": 16384 * 28 * 28,
        "patch_size": 14,
        "temporal_patch_size": 2,
        "merge_size": 2,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def _tokenizer_config(tokenizer: Tokenizer) -> dict[str, Any]:
    added = {
        str(tokenizer.token_to_id(token)): {
            "content": token,
            "lstrip": False,
            "normalized": False,
            "rstrip": False,
            "single_word": False,
            "special": token in SPECIAL_TOKENS,
        }
        for token in SPECIAL_TOKENS + MARKUP_TOKENS
    }
    return {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": added,
        "additional_special_tokens": list(SPECIAL_TOKENS[1:]),
        "bos_token": None,
        "chat_template": CHAT_TEMPLATE,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|im_end|>",
        "errors": "replace",
        "model_max_length": 32768,
        "pad_token": "<|endoftext|>",
        "split_special_tokens": False,
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None,
    }


def stages(directory: Path, scratch: Path) -> tuple[Config, Config]:
    """The two runs of the cold start: from nothing on clips with one event, then with several.

    One event first: there a few hundred steps teach to see and to tell the time, of which clips
    with several events alone teach nothing for thousands.
    """
    first, last = scratch / "one-event", scratch / "several-events"
    one = [
        f"model.path={directory}",
        f"run_dir={first}",
        f"data.root={scratch / 'one-event-clips'}",
        "data.synthetic.events=[1, 1]",
        "data.synthetic.seconds=[4.0, 8.0]",
        "sft.steps=800",
    ]
    several = [
        f"model.path={first}",
        "model.init=checkpoint",
        f"run_dir={last}",
        f"data.root={scratch / 'several-events-clips'}",
    ]
    return config.load(COLD_START, one), config.load(COLD_START, several)


def train_weights(directory: Path, scratch: Path) -> None:
    """Trains the weights; puts them, rounded to bfloat16, and a fingerprint into the directory."""
    for stage in stages(directory, scratch):
        sft.main(stage)
    export.main(stage.run_dir, str(scratch / "exported"), "bfloat16")
    shutil.copyfile(scratch / "exported" / WEIGHTS, directory / WEIGHTS)
    fingerprint.write(directory)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jaxgrpo.tiny", description=__doc__)
    parser.add_argument("out", type=Path, help="the model directory, for example models/tiny")
    parser.add_argument("scratch", type=Path, help="where clips and training runs go; resumable")
    options = parser.parse_args()
    directory = make_model_directory(options.out)
    train_weights(directory, options.scratch)
    print(f"wrote {directory}")


if __name__ == "__main__":
    main()
