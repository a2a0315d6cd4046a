"""How large media become and what a prompt of them needs, before anything is decoded.

The released model was trained with the `qwen_vl_utils` package in front of transformers' processor:
sizes follow it.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.positions import Grid, frame_layout, frame_rows

MAX_ASPECT_RATIO = 200


class ProcessorError(ValueError):
    """Messages, media or a model directory that cannot be turned into a prompt."""


class Size(NamedTuple):
    """What one prompt needs, or what a bucket offers to each of its prompts."""

    tokens: int
    patches: int
    windows: int
    frames: int  # temporal grids; of a bucket: rows that whole frames are packed into
    frame_patches: int  # patches of the largest frame; of a bucket: slots of a row

    def rows(self, slots: int) -> int:
        """How many rows of `slots` patches are sure to hold this prompt's frames."""
        return frame_rows(self.frames, self.patches, self.frame_patches, slots)

    def fits(self, bucket: Size) -> bool:
        rest = all(need <= offer for need, offer in zip(self[:3], bucket[:3], strict=True))
        slots = bucket.frame_patches
        return rest and self.frame_patches <= slots and self.rows(slots) <= bucket.frames


@dataclasses.dataclass(frozen=True)
class PixelLimits:
    """How far media are resized, as in qwen_vl_utils; the defaults are its defaults for video.

    `total_pixels` bounds a whole video: its tokens are at most total_pixels / 28^2.
    """

    min_pixels: int = 128 * 28**2  # of an image or a frame
    max_pixels: int = 768 * 28**2  # of an image or a frame
    total_pixels: int = 128_000 * 28**2 * 9 // 10  # of all frame pairs of a video

    def __post_init__(self) -> None:
        if not 0 < self.min_pixels <= self.max_pixels or self.total_pixels <= 0:
            raise ProcessorError(
                f"pixel limits must satisfy 0 < min_pixels <= max_pixels and 0 < total_pixels, "
                f"found {self}"
            )

    def frame_maximum(self, frames: int, temporal_patch_size: int) -> float:
        """The most pixels that each of `frames` frames of a video may have."""
        share = self.total_pixels / frames * temporal_patch_size
        return max(min(self.max_pixels, share), int(self.min_pixels * 1.05))


def media_grid(
    media_hw: tuple[int, int], frames: int | None, limits: PixelLimits, vision: VisionConfig
) -> Grid:
    """See `Processor.grid`."""
    if frames is None:
        grids, maximum = 1, float(limits.max_pixels)
    else:
        if frames < 1:
            raise ProcessorError(f"a video has {frames} frames, expected at least 1")
        grids = -(-frames // vision.temporal_patch_size)
        maximum = limits.frame_maximum(
            grids * vision.temporal_patch_size, vision.temporal_patch_size
        )
    height, width = smart_resize(
        *media_hw, vision.patch_size * vision.merge_size, limits.min_pixels, maximum
    )
    return Grid(grids, height // vision.patch_size, width // vision.patch_size)


def media_size(grids: Sequence[Grid], text_tokens: int, vision: VisionConfig) -> Size:
    """What a prompt of some images and videos and of `text_tokens` other tokens needs."""
    layouts = [frame_layout(g.h, g.w, vision.merge_size, vision.window_side) for g in grids]
    windows = [
        grid.t * len(layout.window_index) for grid, layout in zip(grids, layouts, strict=True)
    ]
    return Size(
        tokens=text_tokens + sum(grid.patches // vision.merge_area for grid in grids),
        patches=sum(grid.patches for grid in grids),
        windows=sum(windows),
        frames=sum(grid.t for grid in grids),
        frame_patches=max((grid.frame_patches for grid in grids), default=0),
    )


def smart_resize(
    height: int, width: int, factor: int, min_pixels: int, max_pixels: float
) -> tuple[int, int]:
    """The size to which an image or frame is resized, as in qwen_vl_utils.

    Sides are multiples of `factor` (rounding half to even), the aspect ratio is nearly kept, and
    the area lies within the limits, unless one side is already down to one factor.

    Raises:
      ProcessorError: no pixels, or an aspect ratio above 200.
    """
    if min(height, width) < 1:
        raise ProcessorError(f"media of {height} x {width} pixels have no pixels")
    if max(height, width) / min(height, width) > MAX_ASPECT_RATIO:
        raise ProcessorError(
            f"media of {height} x {width} pixels have an aspect ratio above {MAX_ASPECT_RATIO}: "
            "crop or drop them"
        )
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        scale = math.sqrt(height * width / max_pixels)
        rows = max(factor, math.floor(height / scale / factor) * factor)
        columns = max(factor, math.floor(width / scale / factor) * factor)
    elif rows * columns < min_pixels:
        scale = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * scale / factor) * factor
        columns = math.ceil(width * scale / factor) * factor
    return rows, columns
