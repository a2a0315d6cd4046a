"""Bicubic resizing with antialiasing, as qwen_vl_utils does it (torch, in float32): NumPy, OpenCV.

Two matrix products, one per axis, over the few pixels that each result depends on, with nothing
rounded in between. Pillow and torch's uint8 path round after the first axis, which is 0.1 to 0.2
grey levels off on average; and Pillow takes twice as long (benchmarks/video.md).
"""

from __future__ import annotations

import functools
from typing import Final, NamedTuple

import cv2
import numpy as np
import PIL.Image
from numpy.typing import NDArray

UInt8 = NDArray[np.uint8]
Float32 = NDArray[np.float32]

_A: Final = -0.5  # of Keys' cubic kernel, as Pillow's and torch's antialiased bicubic
_REACH: Final = 2.0  # pixels on each side, before it is stretched by the scale

# Results computed by one product, and by one strip of products whose operands stay in the cache.
_BLOCK: Final = 8
_STRIP: Final = 64

# Multiplications up to which OpenBLAS does not wake threads of its own: data threads already use
# the cores.
_PRODUCT: Final = 1 << 18


class _Block(NamedTuple):
    """Results first..stop of an axis: weights f32[stop - first, end - begin] of begin..end."""

    first: int
    stop: int
    begin: int
    end: int
    weights: Float32


def exact(frame: UInt8, height: int, width: int) -> UInt8:
    """u8[H, W, 3] to u8[height, width, 3]; rounds half to even, as torch does."""
    if frame.shape[:2] == (height, width):
        return frame
    rows, columns, channels = frame.shape
    frame = frame.reshape(rows, columns * channels)
    resized = np.empty((height, width, channels), np.uint8)
    down = _blocks(rows, height)
    across = _blocks(columns, width)
    tile = max(1, _PRODUCT // max(block.weights.size for block in down))
    for top in range(0, height, _STRIP):
        strip = down[top // _BLOCK : (top + _STRIP) // _BLOCK]
        begin, bottom = strip[0].begin, strip[-1].stop
        narrow = np.empty((bottom - top, columns * channels), np.float32)
        for left in range(0, columns * channels, tile):
            pixels = frame[begin : strip[-1].end, left : left + tile].astype(np.float32)
            for block in strip:
                np.matmul(
                    block.weights,
                    pixels[block.begin - begin : block.end - begin],
                    out=narrow[block.first - top : block.stop - top, left : left + tile],
                )
        # Columns first, so that the second product, too, reads and writes whole rows.
        turned = cv2.transpose(narrow.reshape(bottom - top, columns, channels))
        turned = turned.reshape(columns, -1)
        short = np.empty((width, turned.shape[1]), np.float32)
        for block in across:
            np.matmul(
                block.weights, turned[block.begin : block.end], out=short[block.first : block.stop]
            )
        # Rounds and clips; OpenCV's stubs know no scalars.
        rounded = cv2.add(short, 0.0, dtype=cv2.CV_8U)  # type: ignore[call-overload]
        cv2.transpose(rounded.reshape(width, bottom - top, channels), resized[top:bottom])
    return resized


def pillow(frame: UInt8, height: int, width: int) -> UInt8:
    """u8[H, W, 3] to u8[height, width, 3] as transformers does it without torch."""
    if frame.shape[:2] == (height, width):
        return frame
    image = PIL.Image.fromarray(frame)
    return np.asarray(image.resize((width, height), PIL.Image.Resampling.BICUBIC))


@functools.lru_cache(maxsize=256)
def _blocks(size: int, resized: int) -> tuple[_Block, ...]:
    """The products that resize one axis."""
    begins, ends, weights = _weights(size, resized)
    blocks = []
    for first in range(0, resized, _BLOCK):
        stop = min(first + _BLOCK, resized)
        begin, end = int(begins[first]), int(ends[stop - 1])
        matrix = np.zeros((stop - first, end - begin), np.float32)
        for row in range(first, stop):
            count = ends[row] - begins[row]
            matrix[row - first, begins[row] - begin : ends[row] - begin] = weights[row, :count]
        blocks.append(_Block(first, stop, begin, end, matrix))
    return tuple(blocks)


def _weights(
    size: int, resized: int
) -> tuple[NDArray[np.int64], NDArray[np.int64], NDArray[np.float64]]:
    """begins i64[resized], ends i64[resized], f64[resized, K]: what each result is a mean of.

    Keys' kernel (IEEE Trans. ASSP 29(6), 1981, eq. 4), stretched by the scale when shrinking, cut
    off at the border and normalised.
    """
    scale = size / resized
    stretch = max(scale, 1.0)
    centres = (np.arange(resized) + 0.5) * scale
    begins = np.maximum((centres - _REACH * stretch + 0.5).astype(np.int64), 0)
    ends = np.minimum((centres + _REACH * stretch + 0.5).astype(np.int64), size)
    offsets = np.arange(int((ends - begins).max()))
    x = np.abs((begins[:, None] + offsets - centres[:, None] + 0.5) / stretch)
    near = ((_A + 2) * x - (_A + 3)) * x**2 + 1
    far = _A * (((x - 5) * x + 8) * x - 4)
    weights = np.where(x < 1, near, np.where(x < 2, far, 0.0))
    weights[offsets >= (ends - begins)[:, None]] = 0.0
    return begins, ends, weights / weights.sum(axis=1, keepdims=True)
