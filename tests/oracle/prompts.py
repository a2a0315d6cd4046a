"""Prompts without a tokenizer: random ids, random pixels, any grids."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from models.qwen2_5_vl.positions import Grid, VisionSpan, index_tables, mrope_positions
from models.qwen2_5_vl.processor import Prompt
from tests.oracle.hf_model import IMAGE, VIDEO, VISION_END, VISION_START

FIRST_TEXT_ID = 7


def random_prompt(
    rng: np.random.Generator,
    layout: Sequence[int | Grid],
    *,
    vocab: int = 320,
    seconds_per_grid: float = 1.0,
) -> Prompt:
    """A prompt of text runs and media in the order of `layout`.

    Args:
      layout: a number n stands for n random text tokens, a Grid for an image (t = 1) or a video.
    """
    tokens: list[int] = []
    spans: list[VisionSpan] = []
    for part in layout:
        if isinstance(part, Grid):
            units = part.t * part.h * part.w // 4
            pad = IMAGE if part.t == 1 else VIDEO
            spans.append(VisionSpan(len(tokens) + 1, part, seconds_per_grid if part.t > 1 else 0.0))
            tokens += [VISION_START, *[pad] * units, VISION_END]
        else:
            tokens += rng.integers(FIRST_TEXT_ID, vocab, part).tolist()
    tables = index_tables(len(tokens), spans, 2, 4)
    patches = sum(span.grid.patches for span in spans)
    return Prompt(
        tokens=np.array(tokens, np.int32),
        positions=mrope_positions(len(tokens), spans, 2, 2),
        vision_index=tables.vision_index,
        length=np.array(len(tokens), np.int32),
        patches=rng.integers(0, 256, (patches, 1176), np.uint8),
        patch_hw=tables.patch_hw,
        window_index=tables.window_index,
        frame_index=tables.frame_index,
    )


def grids(layout: Sequence[int | Grid]) -> tuple[np.ndarray, np.ndarray]:
    """(image grids, video grids), each int64[_, 3], of a layout."""
    media = [part for part in layout if isinstance(part, Grid)]
    images = [tuple(part) for part in media if part.t == 1]
    videos = [tuple(part) for part in media if part.t > 1]
    return np.array(images, np.int64).reshape(-1, 3), np.array(videos, np.int64).reshape(-1, 3)
