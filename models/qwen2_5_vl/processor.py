"""From chat messages and decoded frames to the arrays that the model reads, without jax.

Dimensions: P prompts, S prompt tokens, N patches, W windows, T temporal grids (frame pairs),
Q patches of a frame, K patches of a whole window. On a Video, T and H x W are frames and pixels.

The released model was trained with the `qwen_vl_utils` package in front of transformers' processor,
so sizes follow qwen_vl_utils; token ids, patches and positions follow transformers. Two things are
done elsewhere: choosing frames (data/video.py) and normalising pixels (on the device, so that
patches travel as uint8).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.positions import (
    Grid,
    Int32,
    UInt8,
    VisionSpan,
    fill_patches,
    index_tables,
    mrope_positions,
    pack_frames,
)
from models.qwen2_5_vl.resize import exact
from models.qwen2_5_vl.sizes import PixelLimits, ProcessorError, Size, media_grid, media_size

Array: TypeAlias = Any

END_OF_TURN = "<|im_end|>"


class Video(NamedTuple):
    """Frames, and the time between them."""

    frames: UInt8  # [T, H, W, 3], RGB
    seconds_per_frame: float  # 1 / sampled fps
    decoded_hw: tuple[int, int] | None = None  # before `Processor.resize_frame`; None: not resized


class Image(NamedTuple):
    pixels: UInt8  # [H, W, 3], RGB


class Prompt(NamedTuple):
    """One prompt. A batch is the same with a leading axis P, padded to its bucket by `collate`.

    The fields are NumPy arrays on the host, JAX arrays on the device.

    Indices (vision_index, window_index, frame_index) count within the prompt, also in a batch.
    """

    tokens: Array  # i32[S]
    positions: Array  # i32[S, 3] M-RoPE (t, h, w); padding 0
    vision_index: Array  # i32[S] the merged unit (window order) that is embedded here, -1 = text
    length: Array  # i32[] valid tokens
    patches: Array  # u8[N, 3 * 2 * 14 * 14] raw pixels (channel, frame, row, column), window order
    patch_hw: Array  # i32[N, 2] row and column of the patch in its frame
    window_index: Array  # i32[W, K] patches of each window, -1 = padding
    frame_index: Array  # i32[T, Q] patches of each frame, -1 = padding; a batch packs its rows

    @property
    def size(self) -> Size:
        """What this prompt (not a batch) needs."""
        return Size(
            tokens=self.tokens.shape[0],
            patches=self.patches.shape[0],
            windows=self.window_index.shape[0],
            frames=self.frame_index.shape[0],
            frame_patches=self.frame_index.shape[1],
        )


@dataclasses.dataclass(frozen=True, eq=False)
class Processor:
    """Builds prompts for one checkpoint. Picklable, safe to call from several threads."""

    tokenizer: PreTrainedTokenizerFast
    config: ModelConfig
    limits: PixelLimits
    chat_template: str
    eos_ids: tuple[int, ...]  # a completion ends at any of these; <|im_end|> is the first
    pad_id: int
    resize: Callable[[UInt8, int, int], UInt8] = exact  # a function of `resize`

    @classmethod
    def load(
        cls,
        directory: str | Path,
        limits: PixelLimits,
        resize: Callable[[UInt8, int, int], UInt8] = exact,
    ) -> Processor:
        """Reads the tokenizer, chat template, stop ids and config of a model directory.

        Raises:
          FileNotFoundError: config.json or tokenizer.json is missing.
          ModelConfigError: config.json is not that of a Qwen2.5-VL model.
          ProcessorError: the files do not belong together.
        """
        directory = Path(directory)
        config = ModelConfig.load(directory)
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise FileNotFoundError(
                f"{path} does not exist: download the tokenizer's files of the released model too"
            )
        try:
            tokenizer = PreTrainedTokenizerFast.from_pretrained(
                str(directory), local_files_only=True
            )
            template = _chat_template(directory, tokenizer)
            greeting = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
            tokenizer.apply_chat_template(greeting, chat_template=template, tokenize=False)
        except ProcessorError:
            raise
        except Exception as error:  # tokenizers raises plain Exceptions
            raise ProcessorError(
                f"{directory}: the tokenizer's files or the chat template cannot be read: {error}"
            ) from error
        _check_tokenizer(tokenizer, config, path)
        pad_id = tokenizer.pad_token_id
        if not isinstance(pad_id, int):
            raise ProcessorError(f"{directory}/tokenizer_config.json: pad_token is missing")
        return cls(
            tokenizer=tokenizer,
            config=config,
            limits=limits,
            chat_template=template,
            eos_ids=_eos_ids(directory, tokenizer),
            pad_id=pad_id,
            resize=resize,
        )

    def grid(self, media_hw: tuple[int, int], frames: int | None) -> Grid:
        """The patches of an image (frames None) or of a video of that many frames.

        Args:
          media_hw: height and width in pixels, as decoded.
          frames: frames sampled from the video; the last is repeated to fill a frame pair.

        Raises:
          ProcessorError: no frames, no pixels, or an aspect ratio above 200.
        """
        return media_grid(media_hw, frames, self.limits, self.config.vision)

    def resize_frame(self, frame: UInt8, frames: int) -> UInt8:
        """A frame of a video as the model sees it, so that a long video need not be held whole.

        Args:
          frame: u8[H, W, 3] as decoded; the order of its channels is kept.
          frames: frames sampled from the video.

        Raises:
          ProcessorError: as `grid`.
        """
        height, width, _ = frame.shape
        return self.resize(frame, *self._pixels(self.grid((height, width), frames)))

    def size(self, messages: Sequence[dict[str, Any]], grids: Sequence[Grid]) -> Size:
        """What a prompt will need, before anything is decoded.

        Raises:
          ProcessorError: the messages do not hold one image or video per grid.
        """
        ids = self._encode_messages(messages)
        placeholders = int(np.count_nonzero(self._is_placeholder(ids)))
        if placeholders != len(grids):
            raise ProcessorError(
                f"the messages hold {placeholders} images and videos, but {len(grids)} grids were "
                "given: give one grid for each, in order"
            )
        return media_size(grids, len(ids) - placeholders, self.config.vision)

    def __call__(
        self, messages: Sequence[dict[str, Any]], media: Sequence[Video | Image]
    ) -> Prompt:
        """One prompt, not padded, up to and including the start of the assistant's turn.

        Args:
          messages: Hugging Face chat format, e.g. [{"role": "user", "content": [{"type": "video"},
            {"type": "text", "text": "What happens?"}]}].
          media: the images and videos of the messages, in order.

        Raises:
          ProcessorError: media and messages do not match, or a medium is not valid.
        """
        vision = self.config.vision
        ids = self._encode_messages(messages)
        places = np.flatnonzero(self._is_placeholder(ids))
        self._check_media(ids[places], media)
        grids = [self._media_grid(item, number) for number, item in enumerate(media)]

        units = np.array([grid.patches // vision.merge_area for grid in grids], np.int64)
        repeats = np.ones(len(ids), np.int64)
        repeats[places] = units
        starts = (np.cumsum(repeats) - repeats)[places]
        tokens = np.repeat(ids, repeats)
        spans = [
            VisionSpan(int(start), grid, self._seconds_per_grid(item))
            for start, grid, item in zip(starts, grids, media, strict=True)
        ]
        patches = np.empty((sum(grid.patches for grid in grids), vision.patch_dim), np.uint8)
        first = 0
        for item, grid in zip(media, grids, strict=True):
            self._fill_patches(item, grid, patches[first : first + grid.patches])
            first += grid.patches
        tables = index_tables(len(tokens), spans, vision.merge_size, vision.window_side)
        return Prompt(
            tokens=tokens,
            positions=mrope_positions(
                len(tokens), spans, vision.merge_size, vision.tokens_per_second
            ),
            vision_index=tables.vision_index,
            length=np.array(len(tokens), np.int32),
            patches=patches,
            patch_hw=tables.patch_hw,
            window_index=tables.window_index,
            frame_index=tables.frame_index,
        )

    def encode_completion(self, text: str) -> Int32:
        """i32[C]: the tokens of an assistant's answer, with the <|im_end|> that closes it.

        Raises:
          ProcessorError: the text itself spells a stop token, which would cut the answer short.
        """
        ids = self.encode(text)
        if np.isin(ids, self.eos_ids).any():
            raise ProcessorError(f"a completion must not spell a stop token: {text!r}")
        return np.append(ids, np.int32(self.eos_ids[0]))

    def decode(self, ids: Iterable[int]) -> str:
        """The text before the first stop id. Other special tokens stay visible."""
        kept: list[int] = []
        for token in ids:
            if int(token) in self.eos_ids:
                break
            kept.append(int(token))
        return self.tokenizer.backend_tokenizer.decode(kept, skip_special_tokens=False)

    def encode(self, text: str) -> Int32:
        """i32[S]: the tokens of a text as it stands, in which special tokens may be spelt."""
        # Not tokenizer(text): that sets truncation on the shared Rust object at each call, which
        # raises "Already borrowed" when several threads do it.
        encoding = self.tokenizer.backend_tokenizer.encode(text, add_special_tokens=False)
        return np.array(encoding.ids, np.int32)

    def _encode_messages(self, messages: Sequence[dict[str, Any]]) -> Int32:
        """The chat template's tokens, one placeholder for each image or video."""
        text = self.tokenizer.apply_chat_template(
            list(messages),
            chat_template=self.chat_template,
            tokenize=False,
            add_generation_prompt=True,
        )
        return self.encode(str(text))

    def _is_placeholder(self, ids: Int32) -> NDArray[np.bool_]:
        return (ids == self.config.image_token_id) | (ids == self.config.video_token_id)

    def _check_media(self, placeholders: Int32, media: Sequence[Video | Image]) -> None:
        wanted = ["image" if i == self.config.image_token_id else "video" for i in placeholders]
        given = ["image" if isinstance(item, Image) else "video" for item in media]
        if wanted != given:
            raise ProcessorError(
                f"the messages hold {wanted or 'no media'}, but {given or 'no media'} were given: "
                'media must match the {"type": "image"} and {"type": "video"} entries in order, '
                "and no text may spell <|image_pad|> or <|video_pad|>"
            )

    def _media_grid(self, item: Video | Image, number: int) -> Grid:
        """The grid of one medium, whose array is checked here."""
        array = item.pixels if isinstance(item, Image) else item.frames
        axes = "[H, W, 3]" if isinstance(item, Image) else "[T, H, W, 3]"
        if array.dtype != np.uint8 or array.ndim != axes.count(",") + 1 or array.shape[-1] != 3:
            raise ProcessorError(
                f"media[{number}] is {array.dtype}{list(array.shape)}, expected uint8{axes}"
            )
        if isinstance(item, Video) and not 0 < item.seconds_per_frame < math.inf:
            raise ProcessorError(
                f"media[{number}] has {item.seconds_per_frame} seconds per frame, "
                "expected a positive number"
            )
        if isinstance(item, Image):
            return self.grid(array.shape[:2], None)
        return self.grid(item.decoded_hw or array.shape[1:3], len(array))

    def _pixels(self, grid: Grid) -> tuple[int, int]:
        """Height and width of a resized frame."""
        side = self.config.vision.patch_size
        return grid.h * side, grid.w * side

    def _seconds_per_grid(self, item: Video | Image) -> float:
        if isinstance(item, Image):
            return 0.0
        return item.seconds_per_frame * self.config.vision.temporal_patch_size

    def _fill_patches(self, item: Video | Image, grid: Grid, out: UInt8) -> None:
        vision = self.config.vision
        frames = item.pixels[None] if isinstance(item, Image) else item.frames
        size = self._pixels(grid)
        if frames.shape[1:3] != size:
            frames = np.stack([self.resize(frame, *size) for frame in frames])
        missing = grid.t * vision.temporal_patch_size - len(frames)
        if missing:
            frames = np.concatenate([frames, np.repeat(frames[-1:], missing, axis=0)])
        fill_patches(
            frames,
            vision.patch_size,
            vision.temporal_patch_size,
            vision.merge_size,
            vision.window_side,
            out,
        )


def collate(prompts: Sequence[Prompt], bucket: Size, pad_id: int) -> Prompt:
    """Stacks prompts into one batch, padded on the right to the bucket's size, frames packed.

    One worked example: prompts of 3 and 2 tokens in a bucket of 4 give tokens
    [[a, b, c, pad], [d, e, pad, pad]], vision_index padded with -1 and length [3, 2].

    Raises:
      ProcessorError: there is no prompt, or one does not fit.
    """
    if not prompts:
        raise ProcessorError("a batch needs at least one prompt, found none")
    for row, prompt in enumerate(prompts):
        if not prompt.size.fits(bucket):
            raise ProcessorError(
                f"prompt {row} of the batch needs {prompt.size}, but its bucket offers {bucket}: "
                "use a larger bucket, or lower the pixel limits or the number of frames"
            )
    tokens, patches, windows, frames, frame_patches = bucket
    patch_dim = prompts[0].patches.shape[1]
    window_patches = prompts[0].window_index.shape[1]
    return Prompt(
        tokens=_stack([p.tokens for p in prompts], pad_id, tokens),
        positions=_stack([p.positions for p in prompts], 0, tokens, 3),
        vision_index=_stack([p.vision_index for p in prompts], -1, tokens),
        length=np.array([p.length for p in prompts], np.int32),
        patches=_stack([p.patches for p in prompts], 0, patches, patch_dim),
        patch_hw=_stack([p.patch_hw for p in prompts], 0, patches, 2),
        window_index=_stack([p.window_index for p in prompts], -1, windows, window_patches),
        frame_index=_stack(
            [pack_frames(p.frame_index, frame_patches) for p in prompts], -1, frames, frame_patches
        ),
    )


def _stack(arrays: Sequence[NDArray[Any]], fill: int, *shape: int) -> NDArray[Any]:
    """[P, *shape]: each array in the leading corner of its row, `fill` elsewhere."""
    stacked = np.full((len(arrays), *shape), fill, arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=True):
        row[tuple(slice(size) for size in array.shape)] = array
    return stacked


def _check_tokenizer(tokenizer: PreTrainedTokenizerFast, config: ModelConfig, path: Path) -> None:
    expected = {
        "<|image_pad|>": config.image_token_id,
        "<|video_pad|>": config.video_token_id,
        "<|vision_start|>": config.vision_start_token_id,
        "<|vision_end|>": config.vision_end_token_id,
    }
    vocabulary = tokenizer.get_vocab()
    for token, id_ in expected.items():
        if vocabulary.get(token) != id_:
            raise ProcessorError(
                f"{path}: {token} has id {vocabulary.get(token)}, but config.json says {id_}: "
                "the two files are not of the same model"
            )
    if END_OF_TURN not in vocabulary:
        raise ProcessorError(f"{path}: {END_OF_TURN} is missing, expected a chat model's tokenizer")
    if max(vocabulary.values()) >= config.text.vocab:
        raise ProcessorError(
            f"{path}: its largest id is {max(vocabulary.values())}, but config.json has a "
            f"vocab_size of {config.text.vocab}: the two files are not of the same model"
        )


def _chat_template(directory: Path, tokenizer: PreTrainedTokenizerFast) -> str:
    """chat_template.jinja, else chat_template.json (the releases), else the tokenizer's own."""
    path = directory / "chat_template.json"
    if path.is_file() and not (directory / "chat_template.jinja").is_file():
        template = json.loads(path.read_text(encoding="utf-8")).get("chat_template")
    else:
        template = tokenizer.chat_template  # transformers has read chat_template.jinja into it
    if not isinstance(template, str):
        raise ProcessorError(
            f"{directory} has no chat template: expected one in chat_template.jinja, "
            "chat_template.json or tokenizer_config.json"
        )
    return template


def _eos_ids(directory: Path, tokenizer: PreTrainedTokenizerFast) -> tuple[int, ...]:
    """<|im_end|>, then the other stop ids of generation_config.json (absent: the tokenizer's)."""
    path = directory / "generation_config.json"
    stops: int | list[int] | None = tokenizer.eos_token_id
    if path.is_file():
        stops = json.loads(path.read_text(encoding="utf-8")).get("eos_token_id", stops)
    if not isinstance(stops, list):
        stops = [] if stops is None else [stops]
    end = tokenizer.get_vocab()[END_OF_TURN]
    return (end, *(stop for stop in stops if stop != end))
