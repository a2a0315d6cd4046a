"""The text part of a model of video is a Qwen2 that computes the same; a word is an id."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
from transformers import AutoModelForCausalLM, Qwen2_5_VLForConditionalGeneration

from benchmarks.grpo.text import half_right, prompts, tokenizer, write_text_part
from benchmarks.grpo.workload import Workload, write_model

SMALL = Workload("100k", None, 12, 4, 3, "float32", remat=False)


def test_the_text_part_computes_the_same(tmp_path: Path) -> None:
    write_model(SMALL.model, SMALL.dtype, tmp_path)
    write_text_part(SMALL.model, SMALL.dtype, tmp_path, tmp_path / "text")
    assert json.loads((tmp_path / "text" / "config.json").read_text())["model_type"] == "qwen2"
    whole = Qwen2_5_VLForConditionalGeneration.from_pretrained(tmp_path)
    part = AutoModelForCausalLM.from_pretrained(tmp_path / "text")
    ids = torch.tensor(SMALL.prompt(0).tokens[None], dtype=torch.long)
    with torch.no_grad():
        torch.testing.assert_close(part(ids).logits, whole(ids).logits, rtol=1e-4, atol=1e-4)


def test_prompts_in_words_are_the_ids_that_ours_gets() -> None:
    reader = tokenizer(SMALL.vocab)
    for seed, text in enumerate(prompts(SMALL, 2)):
        np.testing.assert_array_equal(reader.encode(text), SMALL.prompt(seed).tokens)


def test_no_drawn_id_ends_a_completion() -> None:
    reader = tokenizer(SMALL.vocab)
    assert min(reader.pad_token_id, reader.eos_token_id) >= SMALL.vocab


def test_half_of_a_group_is_right() -> None:
    assert half_right(["a", "b", "c", "d"]) == [0.0, 1.0, 0.0, 1.0]
