"""How large media become, against qwen_vl_utils."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.positions import Grid
from models.qwen2_5_vl.sizes import (
    PixelLimits,
    ProcessorError,
    media_grid,
    media_size,
    smart_resize,
)
from tests.oracle import hf_processing as hf
from tests.oracle.hf_model import released_config

VISION = ModelConfig.from_dict(released_config(tied=True)).vision

SIDE = st.integers(1, 1500)


@settings(max_examples=300, deadline=None)
@given(SIDE, SIDE, st.integers(1, 400), st.integers(0, 2000))
def test_an_image_is_resized_as_in_qwen_vl_utils(height: int, width: int, low: int, more: int):
    low, high = low * 784, (low + more) * 784
    module = hf.qwen_vl_utils()
    try:
        expected = module.smart_resize(height, width, 28, low, high)
    except ValueError:
        with pytest.raises(ProcessorError, match="aspect ratio above 200"):
            smart_resize(height, width, 28, low, high)
        return
    # qwen_vl_utils can round a side down to nothing; transformers keeps one factor, and so do we.
    assert smart_resize(height, width, 28, low, high) == tuple(max(28, side) for side in expected)


def test_half_way_sides_round_to_even():
    assert smart_resize(70, 98, 28, 784, 10**6) == (56, 112)


@settings(max_examples=100, deadline=None)
@given(
    st.integers(28, 1500), st.integers(28, 1500), st.integers(1, 384), st.integers(1, 200),
    st.integers(1, 60_000),
)  # fmt: skip
def test_a_video_is_limited_as_in_qwen_vl_utils(
    height: int, width: int, pairs: int, low: int, total: int
):
    limits = PixelLimits(min_pixels=low * 784, total_pixels=total * 784)
    recorded = []

    def record(frames: torch.Tensor, size: list[int], **_: Any) -> torch.Tensor:
        recorded.append(tuple(max(28, side) for side in size))
        return torch.empty(0)

    hf.fetch_video(
        torch.zeros(1, dtype=torch.uint8).expand(2 * pairs, 3, height, width), limits, resize=record
    )
    assert _sized(height, width, 2 * pairs, limits) == recorded[0]


def _sized(height: int, width: int, frames: int, limits: PixelLimits) -> tuple[int, int]:
    return smart_resize(height, width, 28, limits.min_pixels, limits.frame_maximum(frames, 2))


def test_the_default_limits_are_those_of_qwen_vl_utils_for_video():
    module = hf.qwen_vl_utils()
    assert PixelLimits() == PixelLimits(
        module.VIDEO_MIN_TOKEN_NUM * 28**2,
        module.VIDEO_MAX_TOKEN_NUM * 28**2,
        round(module.MODEL_SEQ_LEN * 28**2 * 0.9),
    )


def test_a_prompt_of_a_video_and_an_image_needs_the_sum_and_the_largest_frame():
    """Windows are of 8 x 8 patches at most, ragged at the edges."""
    video, image = Grid(3, 8, 12), Grid(1, 4, 4)
    size = media_size([video, image], 10, VISION)
    assert size.tokens == 10 + 3 * 8 * 12 // 4 + 4
    assert size.patches == 3 * 96 + 16
    assert size.windows == 3 * 2 + 1
    assert (size.frames, size.frame_patches) == (4, 96)


def test_an_odd_number_of_frames_is_filled_up_and_an_image_is_one_grid():
    limits = PixelLimits(min_pixels=784, max_pixels=784 * 4, total_pixels=784 * 4 * 100)
    assert media_grid((56, 56), 5, limits, VISION) == Grid(3, 4, 4)
    assert media_grid((56, 56), None, limits, VISION) == Grid(1, 4, 4)
    with pytest.raises(ProcessorError, match="0 frames"):
        media_grid((56, 56), 0, limits, VISION)
