"""Our tokenizer, chat template and processor against transformers', without torch.

transformers' video processor needs torchvision. In its place stands transformers' own image
processor on each frame: an image's patch holds its pixels once for each frame of a patch, as if
the image were a film at rest, so the patches of a frame pair take each frame from its own image.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Final, NamedTuple

import numpy as np
from transformers import AutoTokenizer
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from data.synthetic import SyntheticSpec, write_dataset
from data.video import FrameSampling, decode
from jaxgrpo.verification.checks import Check, ask, difference, read_json, verdict_on
from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.positions import Grid
from models.qwen2_5_vl.processor import Processor, Prompt, Video
from models.qwen2_5_vl.resize import pillow
from models.qwen2_5_vl.sizes import PixelLimits
from models.qwen2_5_vl.vision import PIXEL_MEAN, PIXEL_STD

TOKENIZER: Final = "tokenizer"
PROCESSOR: Final = "processor"

# Few pixels and frames: what is compared does not depend on how many there are. 112 x 112 pixels
# become 140 x 140, which no window of 112 divides.
LIMITS: Final = PixelLimits(min_pixels=140 * 140, max_pixels=252 * 252)
SAMPLING: Final = FrameSampling(fps=2.0, min_frames=4, max_frames=8)
_PIXEL_TOLERANCE: Final = 1e-4  # normalised; a grey level is 0.0146, float32 rounds at 1e-6

MESSAGES: Final[list[dict[str, Any]]] = [
    {"role": "system", "content": "You are a helpful assistant."},
    {
        "role": "user",
        "content": [
            {"type": "video"},
            {"type": "text", "text": "When does the door open? Élan, 東京, 12.5 s\n\n👍🏽"},
        ],
    },
]
_CHATS: Final[tuple[list[dict[str, Any]], ...]] = (
    [{"role": "user", "content": "What is 2 + 2?"}],
    [
        {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        {"role": "assistant", "content": "Hi."},
        {"role": "user", "content": [{"type": "text", "text": "<answer>A</answer>?"}]},
    ],
)
_TEXTS: Final = (
    "The cat sat on the mat.",
    "  two blanks, a tab\t, ends of line\r\n\n\n and blanks at the end   ",
    '<think>It starts at 3.5 s.</think><answer>{"start_time": "3.5", "end_time": "12.25"}</answer>',
    "I'll we've THEY'RE can't",
    "Élan café naïve e\u0301lan",  # composed and decomposed
    "東京タワー 서울 Привет مرحبا नमस्ते",
    "👩‍👩‍👧‍👦 🇫🇷 👍🏽 \u200b\ufeff",
    "١٢٣ ４５ 1234567890 1e309 -0.5",
    "def f(x):\n    return {'a': [x**2, None]}  # x²",
    "<|im_start|>user\n<|vision_start|><|video_pad|><|vision_end|>now<|im_end|>\n",
    "<|im_end|>x<|endoftext|><|image_pad|> <|vision_pad|>",
    "<tool_call>\n{}\n</tool_call><|fim_prefix|><|not_special|>",
)


class Clip(NamedTuple):
    """The frames that both sides get, as decoded, and where they are from."""

    name: str
    video: Video


def open_clip(path: str | None) -> Clip:
    """Decodes a few frames of a video, or of a synthetic one.

    Raises:
      VideoError: it cannot be used.
    """
    if path is not None:
        return Clip(path, _decode(path))
    with tempfile.TemporaryDirectory() as folder:
        write_dataset(folder, SyntheticSpec(train_clips=1, eval_clips=1))
        return Clip("a synthetic clip", _decode(str(Path(folder, "eval", "clip_00001.mp4"))))


def _decode(path: str) -> Video:
    seen = decode(path, SAMPLING)
    return Video(seen.frames, seen.seconds_per_frame)


def tokenizer(directory: Path, ours: Processor) -> Check:
    """Ids of texts, of every special token and of chats; ids that config.json names.

    Raises:
      OtherSideError: transformers cannot read the tokenizer.
    """
    theirs = _their_tokenizer(directory)
    problems = []
    for text in _TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        problems.append(_ids(f"{text!r}: id", ours.encode(text), expected))
        decoded = theirs.decode(expected, skip_special_tokens=False)
        if ours.tokenizer.backend_tokenizer.decode(expected, skip_special_tokens=False) != decoded:
            problems.append(f"{text!r}: its ids are decoded otherwise than by transformers")
    added = ours.tokenizer.added_tokens_decoder
    for number, token in added.items():
        found = theirs.convert_tokens_to_ids(token.content)
        if found != number:
            problems.append(f"{token.content}: our id is {number}, theirs {found}")
    template = _their_template(directory, theirs)
    for chat in _CHATS:
        expected = _their_chat(theirs, chat, template)
        problems.append(_ids(f"chat {json.dumps(chat)}: id", ours(chat, []).tokens, expected))
    problems += _named_ids(directory, ours)
    found_problems = [problem for problem in problems if problem]
    good = f"{len(_TEXTS)} texts, {len(_CHATS)} chats and {len(added)} special tokens have the "
    good += f"ids that transformers ({type(theirs).__name__}) gives them"
    return verdict_on(TOKENIZER, found_problems, good, "other ids than transformers'")


def _named_ids(directory: Path, ours: Processor) -> list[str]:
    """config.json's ids against the tokenizer's; those of vision were checked when it was read."""
    raw = read_json(directory / "config.json")
    vocabulary = ours.tokenizer.get_vocab()
    named = {"bos_token_id": "<|endoftext|>", "vision_token_id": "<|vision_pad|>"}
    problems = [
        f"config.json: {key} is {raw[key]}, but {token} has id {vocabulary.get(token)}"
        for key, token in named.items()
        if raw.get(key) is not None and raw[key] != vocabulary.get(token)
    ]
    ends = raw.get("eos_token_id")
    for end in ends if isinstance(ends, list) else [] if ends is None else [ends]:
        if end not in ours.eos_ids:
            problems.append(
                f"config.json: eos_token_id {end} is not among the stop ids {list(ours.eos_ids)}"
            )
    return problems


def _their_tokenizer(directory: Path) -> Any:
    return ask(
        "transformers cannot read the tokenizer",
        lambda: AutoTokenizer.from_pretrained(str(directory), local_files_only=True),
    )


def _their_template(directory: Path, theirs: Any) -> str:
    """The chat template that transformers' processor would take."""

    def read() -> str:
        settings, _ = Qwen2_5_VLProcessor.get_processor_dict(str(directory), local_files_only=True)
        return str(settings.get("chat_template") or theirs.chat_template)

    return ask("transformers cannot read the chat template", read)


def _their_chat(theirs: Any, chat: Any, template: str) -> list[int]:
    text = ask(
        "transformers cannot apply the chat template",
        lambda: theirs.apply_chat_template(
            chat, chat_template=template, tokenize=False, add_generation_prompt=True
        ),
    )
    return list(theirs(text, add_special_tokens=False)["input_ids"])


def _ids(name: str, ours: np.ndarray, theirs: Any) -> str | None:
    return difference(name, ours, np.asarray(theirs, ours.dtype), 0)


class Inputs(NamedTuple):
    """What the model gets: our prompt, and its patches in transformers' order."""

    prompt: Prompt
    grid: Grid
    seconds_per_grid: float
    pixel_values: np.ndarray  # f32[N, 1176], normalised


def inputs(ours: Processor, clip: Clip) -> Inputs:
    """The prompt that both models are compared on, its frames resized as transformers does."""
    like_theirs = dataclasses.replace(ours, resize=pillow)
    prompt = like_theirs(MESSAGES, [clip.video])
    vision = ours.config.vision
    grid = like_theirs.grid(clip.video.frames.shape[1:3], len(clip.video.frames))
    channels = vision.patch_dim // 3
    mean, std = (np.repeat(part, channels) for part in (PIXEL_MEAN, PIXEL_STD))
    values = (prompt.patches.astype(np.float32) - mean) / std
    natural = np.empty_like(values)
    natural[natural_order(prompt, grid, vision)] = values
    seconds = clip.video.seconds_per_frame * vision.temporal_patch_size
    return Inputs(prompt, grid, seconds, natural)


def natural_order(prompt: Prompt, grid: Grid, vision: VisionConfig) -> np.ndarray:
    """i64[N]: for each patch of a video, which we keep in window order, its place in transformers'.

    There frames follow each other, in a frame merged units row by row, in a unit patches so.
    """
    merge = vision.merge_size
    row, column = prompt.patch_hw[:, 0].astype(np.int64), prompt.patch_hw[:, 1]
    unit = row // merge * (grid.w // merge) + column // merge
    frame = np.arange(grid.patches) // grid.frame_patches
    inside = row % merge * merge + column % merge
    return frame * grid.frame_patches + unit * merge**2 + inside


def processor(directory: Path, ours: Processor, clip: Clip, given: Inputs) -> Check:
    """Ids, grid, time and pixels of a prompt with a clip, against transformers' processor.

    Raises:
      OtherSideError: transformers cannot process it.
    """
    theirs = ask("transformers' processor", lambda: _their_inputs(directory, ours.limits, clip))
    problems = [
        difference("video_grid_thw", np.array([given.grid]), theirs["video_grid_thw"], 0),
        _ids("input_ids", given.prompt.tokens, theirs["input_ids"][0]),
        difference(
            "second_per_grid_ts",
            np.array([given.seconds_per_grid]),
            np.asarray(theirs["second_per_grid_ts"], np.float64),
            1e-9,
        ),
        difference(
            "pixel_values_videos",
            given.pixel_values,
            theirs["pixel_values_videos"],
            _PIXEL_TOLERANCE,
        ),
    ]
    exact = ours(MESSAGES, [clip.video]).patches.astype(np.int32)
    rounding = np.abs(exact - given.prompt.patches.astype(np.int32))
    good = (
        f"{clip.name}, {len(clip.video.frames)} frames: {len(given.prompt.tokens)} ids, grid "
        f"{list(given.grid)} and all pixels are those of transformers (data.resize=exact differs "
        f"from Pillow by {rounding.mean():.2f} grey levels, at most {rounding.max()})"
    )
    return verdict_on(
        PROCESSOR, [text for text in problems if text], good, "other inputs than transformers'"
    )


class _FramewiseVideos:
    """Stands in for transformers' video processor; see the top of this file."""

    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, images: Any) -> None:
        self.images = images
        self.temporal_patch_size = images.temporal_patch_size
        self.merge_size = images.merge_size

    def __call__(self, videos: Any, video_metadata: Any, **others: Any) -> dict[str, Any]:
        values: list[np.ndarray] = []
        grids: list[list[int]] = []
        depth = self.temporal_patch_size
        for video in videos:
            frames = [*video, *[video[-1]] * (-len(video) % depth)]
            out = self.images(frames, return_tensors="np")
            _, h, w = (int(n) for n in out["image_grid_thw"][0])
            rows = out["pixel_values"].reshape(len(frames) // depth, depth, h * w, 3, depth, -1)
            pairs = np.stack([rows[:, i, :, :, i] for i in range(depth)], axis=3)
            values.append(pairs.reshape(len(frames) // depth * h * w, -1))
            grids.append([len(frames) // depth, h, w])
        return {
            "pixel_values_videos": np.concatenate(values),
            "video_grid_thw": np.array(grids),
            "video_metadata": video_metadata,
        }


class _Processor(Qwen2_5_VLProcessor):
    """transformers' processor, without its check of the parts' classes."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def _their_inputs(directory: Path, limits: PixelLimits, clip: Clip) -> dict[str, Any]:
    """What transformers' processor, as the directory sets it up, makes of the same frames."""
    theirs = _their_tokenizer(directory)
    template = _their_template(directory, theirs)
    images = Qwen2VLImageProcessorPil.from_pretrained(
        str(directory),
        local_files_only=True,
        min_pixels=limits.min_pixels,
        max_pixels=limits.max_pixels,
    )
    processor = _Processor(
        image_processor=images,
        tokenizer=theirs,
        video_processor=_FramewiseVideos(images),
        chat_template=template,
    )
    text = theirs.apply_chat_template(
        MESSAGES, chat_template=template, tokenize=False, add_generation_prompt=True
    )
    out = processor(
        text=[text],
        videos=[clip.video.frames],
        video_metadata=[SimpleNamespace(sampled_fps=1 / clip.video.seconds_per_frame)],
        return_metadata=True,
    )
    return {key: np.asarray(value) for key, value in out.items() if key != "video_metadata"}
