"""jaxgrpo/tiny.py: the tiny model directory is read like a released one, and its tokenizer fits."""

from __future__ import annotations

import json
import subprocess
import sys
import unicodedata
from pathlib import Path
from typing import Any

import jinja2
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoConfig, AutoTokenizer, GenerationConfig, PreTrainedTokenizerFast
from transformers.models.qwen2.tokenization_qwen2 import Qwen2Tokenizer

from data.prompts import question_text, target_text
from data.records import LETTERS, Record
from data.synthetic import COLORS, SHAPES, questions, scene
from jaxgrpo import config, fingerprint
from jaxgrpo.tiny import (
    CHAT_TEMPLATE,
    COLD_START,
    MARKUP_TOKENS,
    SPECIAL_TOKENS,
    make_model_directory,
    stages,
)
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.weights import model_tensors

SHIPPED = Path(__file__).parents[2] / "models" / "tiny"
FILES = (
    "chat_template.json",
    "config.json",
    "generation_config.json",
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(SHIPPED)


def load_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def records(count: int = 50) -> list[Record]:
    return [r for i in range(count) for r in questions(scene((9, 1, i)), f"eval-{i:05d}", "x.mp4")]


# The directory


def test_the_shipped_files_are_what_the_command_writes(tmp_path: Path) -> None:
    directory = make_model_directory(tmp_path / "new" / "tiny")
    assert sorted(path.name for path in directory.iterdir()) == sorted(FILES)
    for name in FILES:
        assert load_json(directory / name) == load_json(SHIPPED / name), (
            "models/tiny is stale: run `python -m jaxgrpo.tiny models/tiny` and train it again"
        )


def test_making_the_directory_keeps_other_files(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    make_model_directory(tmp_path)
    assert (tmp_path / "model.safetensors").read_bytes() == b"weights"
    assert {path.name for path in tmp_path.iterdir()} == {*FILES, "model.safetensors"}


def test_the_shipped_weights_are_those_of_the_config() -> None:
    tensors = model_tensors(SHIPPED, ModelConfig.load(SHIPPED))
    assert {str(tensor.dtype) for tensor in tensors.values()} == {"bfloat16"}


def test_the_shipped_fingerprint_is_that_of_the_shipped_files() -> None:
    assert fingerprint.read(SHIPPED) == fingerprint.take(SHIPPED)


def test_the_recipe_of_the_weights_is_a_valid_config(tmp_path: Path) -> None:
    recipe = config.load(COLD_START, [f"run_dir={tmp_path}"])
    assert recipe.model.init == "random"


def test_the_config_is_read_by_this_project_and_by_transformers() -> None:
    ours = ModelConfig.load(SHIPPED)
    theirs = AutoConfig.from_pretrained(SHIPPED)
    assert theirs.model_type == "qwen2_5_vl"
    assert theirs.text_config.hidden_size == ours.text.width == ours.vision.out_width
    assert theirs.text_config.num_hidden_layers == ours.text.layers
    assert theirs.text_config.vocab_size == ours.text.vocab
    assert theirs.text_config.rope_parameters["rope_theta"] == ours.text.rope_theta
    assert theirs.text_config.rope_parameters["mrope_section"] == list(ours.text.mrope_section)
    assert theirs.vision_config.fullatt_block_indexes == list(ours.vision.full_attention_blocks)
    assert theirs.tie_word_embeddings
    assert ours.text.tied


def test_transformers_builds_the_model() -> None:
    torch = pytest.importorskip("torch")
    from transformers import Qwen2_5_VLForConditionalGeneration

    with torch.device("meta"):
        model = Qwen2_5_VLForConditionalGeneration._from_config(AutoConfig.from_pretrained(SHIPPED))
    assert sum(parameter.numel() for parameter in model.parameters()) < 2_000_000


def test_generation_stops_at_the_end_of_a_turn_and_of_the_text(tokenizer: Any) -> None:
    generation = GenerationConfig.from_pretrained(SHIPPED)
    stops = tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"])
    assert generation.eos_token_id == stops
    assert tokenizer.eos_token_id == stops[0]
    assert tokenizer.pad_token_id == generation.pad_token_id == stops[1]


# Special tokens


def test_qwens_added_tokens_follow_the_bpe_vocabulary_in_qwens_order(tokenizer: Any) -> None:
    ids = tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, *MARKUP_TOKENS])
    assert ids == list(range(tokenizer.vocab_size, len(tokenizer)))
    # Offsets of the released tokenizer: 151643 for <|endoftext|> to 151664 for <|file_sep|>.
    for token, released in (
        ("<|endoftext|>", 151643),
        ("<|im_end|>", 151645),
        ("<|vision_start|>", 151652),
        ("<|video_pad|>", 151656),
        ("<tool_call>", 151657),
        ("<|file_sep|>", 151664),
    ):
        assert tokenizer.convert_tokens_to_ids(token) - ids[0] == released - 151643


def test_the_config_names_the_special_ids(tokenizer: Any) -> None:
    config = ModelConfig.load(SHIPPED)
    assert tokenizer.convert_ids_to_tokens(
        [
            config.vision_start_token_id,
            config.vision_end_token_id,
            config.image_token_id,
            config.video_token_id,
        ]
    ) == ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"]


def test_the_embedding_has_rows_that_no_token_uses(tokenizer: Any) -> None:
    vocab = ModelConfig.load(SHIPPED).text.vocab
    assert len(tokenizer) < vocab <= 640
    assert vocab % 64 == 0


def test_decoding_drops_special_tokens_but_keeps_markup(tokenizer: Any) -> None:
    ids = tokenizer("<tool_call>red<|im_end|>").input_ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool_call>red"


# Text


TEXTS = (
    "When is the red circle visible?\nA. red\nB. blue",
    "It's 12.5 seconds;  two blanks,\ttab\r\n\r\nnew",
    " leading, trailing ",
    "naïve café, 视频里发生了什么？ 🎬👩‍🚀",
    '<answer>{"start_time": "3.5", "end_time": "12.0"}</answer>',
    "we'll THEY'RE x²⅓٣",
)


@pytest.mark.parametrize("text", TEXTS)
def test_the_split_is_the_one_of_transformers_qwen2_tokenizer(tokenizer: Any, text: str) -> None:
    bpe = load_json(SHIPPED / "tokenizer.json")["model"]
    merges: Any = [tuple(pair) for pair in bpe["merges"]]
    oracle = Qwen2Tokenizer(vocab=bpe["vocab"], merges=merges)
    assert tokenizer(text).input_ids == oracle(text).input_ids


@pytest.mark.parametrize("text", TEXTS)
def test_the_file_alone_gives_the_same_ids(tokenizer: Any, text: str) -> None:
    alone = PreTrainedTokenizerFast(tokenizer_file=str(SHIPPED / "tokenizer.json"))
    assert alone(text).input_ids == tokenizer(text).input_ids


def test_all_256_bytes_are_tokens(tokenizer: Any) -> None:
    assert set(ByteLevel.alphabet()) <= set(tokenizer.get_vocab())


def test_any_text_comes_back_in_nfc() -> None:
    tokenizer = Tokenizer.from_file(str(SHIPPED / "tokenizer.json"))

    @given(st.text())
    def comes_back(text: str) -> None:
        decoded = tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False)
        assert decoded == unicodedata.normalize("NFC", text)

    comes_back()


@pytest.mark.parametrize(
    "word",
    [f" {word}" for word in (*COLORS, *SHAPES, "first", "then", "last", "only", "yes", "no")],
)
def test_a_word_of_the_questions_is_one_token(tokenizer: Any, word: str) -> None:
    assert len(tokenizer(word).input_ids) == 1


@pytest.mark.parametrize("letter", LETTERS[: len(COLORS)])
def test_an_answers_letter_is_the_token_before_its_option(tokenizer: Any, letter: str) -> None:
    token = tokenizer.convert_tokens_to_ids(letter)
    for text in (
        f"visible?\n{letter}. red\n",
        f"<answer>{letter}</answer>",
        f'<answer>{{"option": "{letter}", ',
    ):
        assert tokenizer(text).input_ids.count(token) == 1


def test_the_tokenizer_and_its_template_need_no_torch() -> None:
    code = (
        "import sys; sys.modules['torch'] = None; from transformers import AutoTokenizer; "
        "tokenizer = AutoTokenizer.from_pretrained(sys.argv[1]); "
        "print(tokenizer.apply_chat_template([{'role': 'user', 'content': 'x'}], tokenize=False))"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(SHIPPED)], capture_output=True, text=True, check=True
    )
    assert run.stdout == f"{SYSTEM_TURN}<|im_start|>user\nx<|im_end|>\n\n"


def test_digits_are_single_tokens(tokenizer: Any) -> None:
    assert tokenizer.tokenize("12.5") == ["1", "2", ".", "5"]


def test_prompts_and_targets_are_short(tokenizer: Any) -> None:
    prompts: dict[str, int] = {}
    completions: dict[str, int] = {}
    for record in records():
        content = [{"type": "video"}, {"type": "text", "text": question_text(record, True)}]
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        target = target_text(record, True) + "<|im_end|>"
        for counts, text in ((prompts, prompt), (completions, target)):
            length = len(tokenizer(text).input_ids)
            counts[record.task] = max(length, counts.get(record.task, 0))
    assert max(prompts.values()) <= 104
    assert max(completions.values()) <= 64


# Cold start


def test_the_second_stage_of_the_cold_start_goes_on_from_the_first(tmp_path: Path) -> None:
    one, two = stages(SHIPPED, tmp_path)
    assert (one.model.path, one.model.init) == (str(SHIPPED), "random")
    assert (two.model.path, two.model.init) == (one.run_dir, "checkpoint")
    assert one.data.root != two.data.root and one.run_dir != two.run_dir
    assert one.data.synthetic is not None and two.data.synthetic is not None
    assert one.data.synthetic.events == (1, 1) and two.data.synthetic.events == (2, 3)


# Chat template


USER = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "What happens?"}]}
SYSTEM_TURN = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"


def test_a_video_question_is_rendered_as_the_release_does(tokenizer: Any) -> None:
    assert tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What happens?<|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_a_given_system_message_replaces_the_default(tokenizer: Any) -> None:
    messages = [{"role": "system", "content": "Be brief."}, USER]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>What happens?<|im_end|>\n"
    )


def test_several_turns_with_images_and_blanks(tokenizer: Any) -> None:
    messages = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": " Two:\n"},
                {"type": "image"},
                {"type": "image_url", "image_url": {"url": "x"}},
                {"type": "text", "text": " \nalike? "},
            ],
        },
        {"role": "assistant", "content": "No.\n"},
        {"role": "user", "content": "  Why?  "},
    ]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False) == (
        f"{SYSTEM_TURN}<|im_start|>user\n Two:\n{image}{image} \nalike? <|im_end|>\n"
        "<|im_start|>assistant\nNo.\n<|im_end|>\n"
        "<|im_start|>user\n  Why?  <|im_end|>\n"
    )


def test_pictures_and_videos_are_numbered_apart_on_request(tokenizer: Any) -> None:
    content = [{"type": kind} for kind in ("image", "video", "image")]
    messages = [{"role": "user", "content": content}, {"role": "user", "content": content[:2]}]
    image = "<|vision_start|><|image_pad|><|vision_end|>"
    video = "<|vision_start|><|video_pad|><|vision_end|>"
    assert tokenizer.apply_chat_template(messages, tokenize=False, add_vision_id=True) == (
        f"{SYSTEM_TURN}<|im_start|>user\n"
        f"Picture 1: {image}Video 1: {video}Picture 2: {image}<|im_end|>\n"
        f"<|im_start|>user\nPicture 3: {image}Video 2: {video}<|im_end|>\n"
    )


@pytest.mark.parametrize("trim", [True, False])
def test_the_template_needs_no_trim_settings(tokenizer: Any, trim: bool) -> None:
    environment = jinja2.Environment(trim_blocks=trim, lstrip_blocks=trim)
    rendered = environment.from_string(CHAT_TEMPLATE).render(
        messages=[USER], add_generation_prompt=True
    )
    expected = tokenizer.apply_chat_template([USER], tokenize=False, add_generation_prompt=True)
    assert rendered == expected
