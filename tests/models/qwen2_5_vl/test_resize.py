"""Resizing: the pixels that the released model was trained on, and those of transformers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import PIL.Image
import pytest
import torch

from models.qwen2_5_vl.resize import exact, pillow
from models.qwen2_5_vl.sizes import PixelLimits, smart_resize
from tests.oracle import hf_processing as hf

SIZES = [(360, 480, 112, 168), (272, 640, 280, 644), (100, 90, 392, 364), (1080, 1920, 140, 252)]
every_size = pytest.mark.parametrize(("height", "width", "rows", "columns"), SIZES)


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    """u8[H, W, 3]: smooth content with edges and noise, as in a real frame."""
    y, x = np.mgrid[:height, :width] + 9 * seed
    waves = 127 + 90 * np.sin(y / 23) * np.cos(x / 17) + 60 * (x % 60 > 30)
    return (waves[..., None] + hf.noise(height, width) / 16).clip(0, 255).astype(np.uint8)


def interpolated(frame: np.ndarray, rows: int, columns: int, dtype: torch.dtype) -> np.ndarray:
    """torch's antialiased bicubic resize computed in a type."""
    pixels = torch.from_numpy(frame).permute(2, 0, 1)[None].to(dtype)
    wide = torch.nn.functional.interpolate(
        pixels, size=[rows, columns], mode="bicubic", antialias=True
    )
    return wide[0].permute(1, 2, 0).clamp(0, 255).round().numpy().astype(int)


@every_size
def test_exact_is_what_torch_computes_in_float64(
    height: int, width: int, rows: int, columns: int
) -> None:
    frame = picture(height, width)
    found = exact(frame, rows, columns)
    assert found.dtype == np.uint8 and found.flags.c_contiguous
    difference = np.abs(found - interpolated(frame, rows, columns, torch.float64))
    # A value half-way between two greys may be rounded to either.
    assert difference.max() <= 1 and difference.mean() < 1e-4


@every_size
def test_exact_is_nearer_to_it_than_hugging_faces_own_paths(
    height: int, width: int, rows: int, columns: int
) -> None:
    """Transformers resizes uint8 tensors (with torchvision) or Pillow images (without)."""
    frame = picture(height, width)
    truth = interpolated(frame, rows, columns, torch.float64)
    ours = np.abs(exact(frame, rows, columns) - truth).mean()
    for theirs in (interpolated(frame, rows, columns, torch.uint8), pillow(frame, rows, columns)):
        assert 0.05 < np.abs(theirs - truth).mean() < 0.3
        assert ours < 0.001 * np.abs(theirs - truth).mean()


@pytest.mark.parametrize(("height", "width"), [(360, 480), (270, 640), (100, 90)])
def test_a_video_is_that_of_qwen_vl_utils(height: int, width: int) -> None:
    frames = np.stack([picture(height, width, seed) for seed in range(4)])
    limits = PixelLimits(min_pixels=100 * 784, total_pixels=250 * 784)
    expected = hf.fetch_video(torch.from_numpy(frames).permute(0, 3, 1, 2), limits)
    size = smart_resize(height, width, 28, limits.min_pixels, limits.frame_maximum(4, 2))
    ours = np.stack([exact(frame, *size) for frame in frames])
    difference = np.abs(ours - expected.permute(0, 2, 3, 1).numpy())
    assert difference.max() <= 1 and difference.mean() < 1e-3


def test_pillow_is_pillow() -> None:
    frame = picture(100, 130)
    image = PIL.Image.fromarray(frame).resize((56, 84), PIL.Image.Resampling.BICUBIC)
    np.testing.assert_array_equal(pillow(frame, 84, 56), np.asarray(image))


@pytest.mark.parametrize("resize", [exact, pillow])
def test_a_frame_of_the_right_size_is_not_copied(resize) -> None:
    frame = picture(56, 84)
    assert resize(frame, 56, 84) is frame


def test_a_view_with_reversed_channels_is_resized_like_its_copy() -> None:
    frame = picture(100, 130)
    turned = frame[..., ::-1]
    np.testing.assert_array_equal(exact(turned, 56, 84), exact(frame, 56, 84)[..., ::-1])


def test_threads_get_the_same_pixels() -> None:
    frames = [picture(270, 480, seed) for seed in range(6)]
    alone = [exact(frame, 112, 196) for frame in frames]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda frame: exact(frame, 112, 196), frames))
    np.testing.assert_array_equal(together, alone)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 90), (3000, 2)])
def test_the_smallest_pictures_can_be_resized(height: int, width: int) -> None:
    frame = picture(height, width)
    difference = np.abs(exact(frame, 28, 56) - interpolated(frame, 28, 56, torch.float64))
    assert difference.max() <= 1
