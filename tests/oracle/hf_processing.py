"""The other side of the processor's tests: transformers and qwen_vl_utils on the same inputs.

Neither package's video code imports without torchvision, which has no build for a CPU-only torch.
What stands in for it here is as thin as possible, and says so where it stands.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import itertools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLModel
from transformers.models.qwen2_5_vl.processing_qwen2_5_vl import Qwen2_5_VLProcessor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.vision_utils import get_vision_window_index

from data.video import FrameSampling
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.processor import Image, Video
from models.qwen2_5_vl.sizes import PixelLimits

SPECIAL_TOKENS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type in ('image', 'video') %}"
    "<|vision_start|><|{{ part.type }}_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def write_model_directory(directory: Path) -> Path:
    """A model directory in the release's layout: a byte-level BPE, a chat template, a config."""
    directory.mkdir(parents=True, exist_ok=True)
    tokenizer = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r"\s?\w+|\s?[^\s\w]+|\s+"), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(["system user assistant", "what happens in the video"], trainer)
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    ids = {token: tokenizer.token_to_id(token) for token in SPECIAL_TOKENS}
    config = {
        "model_type": "qwen2_5_vl",
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "num_hidden_layers": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [2, 3, 3]},
        "tie_word_embeddings": True,
        "vocab_size": 320,
        "vision_config": {
            "depth": 2,
            "hidden_size": 16,
            "intermediate_size": 32,
            "num_heads": 2,
            "out_hidden_size": 32,
            "patch_size": 14,
            "spatial_merge_size": 2,
            "temporal_patch_size": 2,
            "window_size": 112,
            "fullatt_block_indexes": [1],
            "tokens_per_second": 2,
        },
    }
    files = {
        "config.json": config,
        "generation_config.json": {"eos_token_id": [ids["<|im_end|>"], ids["<|endoftext|>"]]},
        "tokenizer_config.json": {
            "tokenizer_class": "Qwen2Tokenizer",
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "chat_template": CHAT_TEMPLATE,
        },
    }
    tokenizer.save(str(directory / "tokenizer.json"))
    for name, content in files.items():
        (directory / name).write_text(json.dumps(content), encoding="utf-8")
    return directory


def noise(*shape: int) -> np.ndarray:
    return np.random.default_rng(sum(shape)).integers(0, 256, (*shape, 3), np.uint8)


def video(frames: int, height: int, width: int, seconds_per_grid: float = 1.0) -> Video:
    return Video(noise(frames, height, width), seconds_per_grid / 2)


def image(height: int, width: int) -> Image:
    return Image(noise(height, width))


def messages(*parts: str) -> list[dict[str, Any]]:
    """One turn of the user's; "video" and "image" are media, anything else is text."""
    content = [
        {"type": part} if part in ("video", "image") else {"type": "text", "text": part}
        for part in parts
    ]
    return [{"role": "system", "content": "Be brief."}, {"role": "user", "content": content}]


Case = tuple[list[dict[str, Any]], list[Video | Image]]
CASES: dict[str, Case] = {
    "text only": (messages("What is 2 + 2?"), []),
    "a video of whole windows": (messages("video", "What happens?"), [video(4, 112, 224)]),
    "a video of ragged windows": (messages("video", "When?"), [video(6, 140, 196)]),
    "one window, narrower than a window": (messages("video", "When?"), [video(4, 84, 28)]),
    "an odd number of frames": (messages("video", "Why?"), [video(5, 84, 140, 1.3)]),
    "one frame": (messages("video", "Why?"), [video(1, 56, 56)]),
    "half a second per frame pair": (messages("video", "Where?"), [video(8, 56, 84, 0.5)]),
    "1.3 seconds per frame pair": (messages("video", "Where?"), [video(40, 28, 56, 1.3)]),
    "two videos of different sizes": (
        messages("First:", "video", "then", "video", "Which is longer?"),
        [video(6, 140, 84, 0.5), video(3, 56, 252, 1.3)],
    ),
    "two videos side by side": (messages("video", "video"), [video(2, 56, 56), video(4, 28, 28)]),
    "image and video": (
        messages("image", "Is this in", "video", "?"),
        [image(140, 168), video(4, 84, 112, 0.5)],
    ),
    "video, image, video": (
        messages("video", "image", "video", "Compare."),
        [video(2, 112, 112, 1.3), image(28, 140), video(12, 28, 84)],
    ),
    "a conversation": (
        [
            *messages("image", "What is it?"),
            {"role": "assistant", "content": "A dog."},
            {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": "Here?"}]},
        ],
        [image(56, 84), video(4, 56, 56)],
    ),
}


class _FramewiseVideoProcessor:
    """Stands in for Qwen2VLVideoProcessor: transformers' own PIL image processor on each frame.

    An image's patch holds its pixels twice, as if it were two equal frames. So the patches of a
    frame pair take their first frame from one image's patches and their second from the other's.
    """

    temporal_patch_size = 2
    merge_size = 2
    model_input_names = ("pixel_values_videos", "video_grid_thw")

    def __init__(self, image_processor: Qwen2VLImageProcessorPil):
        self.image_processor = image_processor

    def __call__(
        self, videos: list[np.ndarray], video_metadata: list[Any], **_: Any
    ) -> dict[str, Any]:
        values, grids = [], []
        for video in videos:
            frames = list(video) + [video[-1]] * (len(video) % 2)
            out = self.image_processor(frames, return_tensors="np")
            _, h, w = out["image_grid_thw"][0]
            rows = out["pixel_values"].reshape(len(frames) // 2, 2, h * w, 3, 2, 14 * 14)
            pairs = np.stack([rows[:, 0, :, :, 0], rows[:, 1, :, :, 1]], axis=3)
            values.append(pairs.reshape(-1, 3 * 2 * 14 * 14))
            grids.append([len(frames) // 2, h, w])
        return {
            "pixel_values_videos": np.concatenate(values),
            "video_grid_thw": np.array(grids),
            "video_metadata": video_metadata,
        }


class _Processor(Qwen2_5_VLProcessor):
    """transformers' processor, without its type check on the parts (see above)."""

    def check_argument_for_proper_class(self, argument_name: str, argument: Any) -> type:
        return type(argument)


def transformers_inputs(
    directory: Path,
    limits: PixelLimits,
    messages: list[dict[str, Any]],
    media: list[Video | Image],
) -> dict[str, np.ndarray]:
    """What transformers' Qwen2_5_VLProcessor makes of the same messages and media."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(str(directory))
    images = Qwen2VLImageProcessorPil(
        size={"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}
    )
    processor = _Processor(
        image_processor=images,
        tokenizer=tokenizer,
        video_processor=_FramewiseVideoProcessor(images),
        chat_template=tokenizer.chat_template,
    )
    pictures = [item.pixels for item in media if isinstance(item, Image)]
    videos = [item for item in media if isinstance(item, Video)]
    metadata = [SimpleNamespace(sampled_fps=1 / video.seconds_per_frame) for video in videos]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    out = processor(
        text=[text],
        images=pictures or None,
        videos=[video.frames for video in videos] or None,
        video_metadata=metadata,
        return_metadata=True,
    )
    return {key: np.asarray(value) for key, value in out.items() if key != "video_metadata"}


def transformers_rope_index(config: ModelConfig, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """int[S, 3]: the M-RoPE positions of transformers 5, see `released_positions`."""
    model = SimpleNamespace(
        config=SimpleNamespace(
            vision_config=SimpleNamespace(
                spatial_merge_size=config.vision.merge_size,
                tokens_per_second=config.vision.tokens_per_second,
            )
        ),
        get_vision_position_ids=lambda *args, **kwargs: Qwen2_5_VLModel.get_vision_position_ids(
            model, *args, **kwargs
        ),
    )
    tensors = {
        key: torch.tensor(inputs[key])
        for key in ("input_ids", "mm_token_type_ids", "image_grid_thw", "video_grid_thw")
        if key in inputs
    }
    seconds = torch.tensor(inputs.get("second_per_grid_ts", []), dtype=torch.float32)
    positions, _ = Qwen2_5_VLModel.get_rope_index(model, **tensors, second_per_grid_ts=seconds)
    return positions[:, 0].T.numpy()


def released_positions(config: ModelConfig, inputs: dict[str, np.ndarray]) -> np.ndarray:
    """int[S, 3]: M-RoPE positions as released, from transformers 5's.

    transformers 5 and the release (4.49, vLLM) agree on the shape of every run of text or vision,
    but not on where the run after a video starts. So each run is taken from transformers, moved to
    the largest position so far + 1, which is the released rule (facts: M-RoPE).
    """
    positions = transformers_rope_index(config, inputs)
    kinds = inputs["mm_token_type_ids"][0]
    starts = [0, *(np.flatnonzero(np.diff(kinds)) + 1), len(kinds)]
    moved, position = [], 0
    for start, stop in itertools.pairwise(starts):
        run = positions[start:stop] - positions[start] + position
        moved.append(run)
        position = run.max() + 1
    return np.concatenate(moved)


def window_order(config: ModelConfig, grids: list[tuple[int, int, int]]) -> tuple[np.ndarray, ...]:
    """transformers' window order of merged units, and the first patch of each window."""
    vision = config.vision
    index, bounds = get_vision_window_index(
        torch.tensor(grids), vision.merge_size, vision.window_size, vision.patch_size
    )
    return index.numpy(), bounds.numpy()


def raster_patches(
    config: ModelConfig, grids: list[tuple[int, int, int]], patches: np.ndarray
) -> np.ndarray:
    """Patches in window order, moved to the order in which transformers' processor emits them."""
    order, _ = window_order(config, grids)
    units = patches.reshape(len(order), config.vision.merge_area, -1)
    raster = np.empty_like(units)
    raster[order] = units
    return raster.reshape(patches.shape)


def pixels(values: np.ndarray) -> np.ndarray:
    """float[N, 1176] normalised pixel_values back to 0..255."""
    processor = Qwen2VLImageProcessorPil()
    mean = np.repeat(np.array(processor.image_mean), values.shape[1] // 3)
    std = np.repeat(np.array(processor.image_std), values.shape[1] // 3)
    return (values * std + mean) * 255


@functools.cache
def qwen_vl_utils() -> ModuleType:
    """The qwen_vl_utils.vision_process module.

    Of torchvision it only calls `transforms.functional.resize`, which for a uint8 tensor is torch's
    antialiased bicubic interpolation in float32, clamped and rounded: that is what it gets here.
    """
    torchvision = mock.MagicMock(__version__="0.28.0")
    torchvision.transforms.functional.resize = _torch_resize
    stand_ins = {"torchvision": torchvision, "torchvision.transforms": torchvision.transforms}
    with mock.patch.dict(sys.modules, stand_ins):
        return importlib.import_module("qwen_vl_utils.vision_process")


def frame_indices(
    frames: int, fps: float, sampling: FrameSampling, clip: tuple[float, float] | None
) -> np.ndarray:
    """int[T]: the frames of a file that qwen_vl_utils takes, as its readers call its functions."""
    module = qwen_vl_utils()
    element = dataclasses.asdict(sampling)
    uniform = element.pop("frames")
    element = element if uniform is None else {"nframes": uniform}
    if clip is not None:
        element |= {"video_start": clip[0], "video_end": clip[1]}
    start, end, total = module.calculate_video_frame_range(element, frames, fps)
    count = module.smart_nframes(element, total, fps)
    return torch.linspace(start, end, count).round().long().numpy()


def _torch_resize(video: torch.Tensor, size: list[int], **_: Any) -> torch.Tensor:
    wide = torch.nn.functional.interpolate(
        video.float(), size=size, mode="bicubic", antialias=True, align_corners=False
    )
    return wide.clamp(0, 255).round().to(torch.uint8)


def fetch_video(
    frames: torch.Tensor,
    limits: PixelLimits,
    resize: Callable[..., torch.Tensor] = _torch_resize,
) -> torch.Tensor:
    """float[T, 3, h, w]: qwen_vl_utils' video, as if its reader had decoded and chosen `frames`.

    Args:
      frames: u8[T, 3, H, W].
      limits: min_pixels and total_pixels are handed on; qwen_vl_utils' own max_pixels holds.
      resize: called with the frames and [h, w].
    """
    module = qwen_vl_utils()
    readers = {"torchvision": lambda _: (frames, {}, 2.0)}
    with (
        mock.patch.dict(module.VIDEO_READER_BACKENDS, readers),
        mock.patch.object(module, "get_video_reader_backend", lambda: "torchvision"),
        mock.patch.object(module.transforms.functional, "resize", resize),
    ):
        return module.fetch_video(
            {
                "video": "clip.mp4",
                "min_pixels": limits.min_pixels,
                "total_pixels": limits.total_pixels,
            }
        )
