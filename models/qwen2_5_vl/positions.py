"""Where things are: M-RoPE positions of tokens, and patches in window order.

Dimensions: S prompt tokens, N patches, Q patches of a frame, U merged units of a frame
(U = Q / merge_size^2), W windows, K patches of a whole window, T temporal grids (frame pairs).

A *merged unit* is the square of merge_size x merge_size patches that becomes one token of the text
model. Patches are stored in *window order*: windows outermost inside a frame (row by row), then the
merged units of a window (row by row), then the patches of a unit (row by row). A block that attends
within windows then only reads a batch of windows, and one that attends within frames a batch of
frames; nothing is permuted on the device.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Int32 = NDArray[np.int32]
UInt8 = NDArray[np.uint8]


class Grid(NamedTuple):
    """The patches of one image or video: t temporal grids (frame pairs) of h x w patches each.

    h and w are multiples of the merge size; an image has t = 1.
    """

    t: int
    h: int
    w: int

    @property
    def frame_patches(self) -> int:
        """Patches of one temporal grid."""
        return self.h * self.w

    @property
    def patches(self) -> int:
        return self.t * self.h * self.w


class VisionSpan(NamedTuple):
    """The run of tokens that one image or video occupies in a prompt."""

    start: int  # index of its first token
    grid: Grid
    seconds_per_grid: float  # time between temporal grids; 0 for an image


def mrope_positions(
    length: int, spans: Sequence[VisionSpan], merge_size: int, tokens_per_second: float
) -> Int32:
    """M-RoPE positions (Qwen2-VL, arXiv 2409.12191; Qwen2.5-VL, arXiv 2502.13923).

    Text counts 0, 1, 2... in all three components. A vision token is at (t, h, w) within its grid,
    offset by the position that a text token would have had there; t is the time of its frame pair
    in units of 1 / tokens_per_second, truncated. Text goes on at the largest position so far + 1.

    This is the rule of the released model (transformers 4.49) and of vLLM. Later transformers go on
    after a video at start + max(h, w) instead. The time is computed in float32, as there: float64
    gives other integers (frame pair 25 at 1.3 s is 65 in float32 and 64 in float64 arithmetic on
    the float32 value).

    One worked example, merge_size 2, tokens_per_second 2: two text tokens, a video of 2 temporal
    grids of 2 x 4 patches (1 x 2 units) 1.5 s apart, one text token:

        index   0  1 | 2  3  4  5 | 6
        t       0  1 | 2  2  5  5 | 6
        h       0  1 | 2  2  2  2 | 6
        w       0  1 | 2  3  2  3 | 6

    Args:
      length: tokens of the prompt.
      spans: its images and videos, in order.
      merge_size: patches per side of a merged unit.
      tokens_per_second: time steps per second of video.

    Returns:
      i32[S, 3]: (t, h, w) of every token.
    """
    positions = np.empty((length, 3), np.int32)
    index = 0
    position = 0
    for span in spans:
        position = _count_text(positions[index : span.start], position)
        t, h, w = span.grid.t, span.grid.h // merge_size, span.grid.w // merge_size
        index = span.start + t * h * w
        block = positions[span.start : index].reshape(t, h, w, 3)
        seconds = np.arange(t, dtype=np.float32) * np.float32(span.seconds_per_grid)
        time = (seconds * np.float32(tokens_per_second)).astype(np.int32)
        block[..., 0] = position + time[:, None, None]
        block[..., 1] = position + np.arange(h)[:, None]
        block[..., 2] = position + np.arange(w)
        position += max(int(time[-1]), h - 1, w - 1) + 1
    _count_text(positions[index:], position)
    return positions


def _count_text(positions: Int32, start: int) -> int:
    """Numbers text tokens from `start` on in place; returns the next free position."""
    stop = start + len(positions)
    positions[:] = np.arange(start, stop)[:, None]
    return stop


@dataclasses.dataclass(frozen=True)
class FrameLayout:
    """The window order of one frame. The arrays are shared by all frames of a grid: read-only.

    One worked example, merge_size 2, window_side 2, a frame of 4 x 6 patches (2 x 3 units): the
    left window holds units 0, 1, 3, 4 of the raster, the ragged right one units 2, 5. So
    unit_rank = [0, 1, 4, 2, 3, 5], and window_index = [[0..15], [16..23, -1 x 8]].
    """

    patch_hw: Int32  # [Q, 2] row and column of the patch in its frame
    window_index: Int32  # [W, K] patches of each window, -1 = padding
    unit_rank: Int32  # [U] place in window order of the units in raster order


@functools.lru_cache(maxsize=512)
def frame_layout(h: int, w: int, merge_size: int, window_side: int) -> FrameLayout:
    """The window order of a frame of h x w patches.

    Args:
      h, w: patches, multiples of merge_size.
      merge_size: patches per side of a merged unit.
      window_side: merged units per side of a window; windows at the right and bottom edge may hold
        fewer.
    """
    rows, columns = np.divmod(np.arange(h * w // merge_size**2), w // merge_size)
    windows_across = -(-(w // merge_size) // window_side)
    window = rows // window_side * windows_across + columns // window_side
    order = np.argsort(window, kind="stable")  # raster index of the units in window order

    unit_rank = np.empty(len(order), np.int32)
    unit_rank[order] = np.arange(len(order))

    inside = np.stack(np.divmod(np.arange(merge_size**2), merge_size), axis=-1)
    corner = np.stack([rows[order], columns[order]], axis=-1) * merge_size
    patch_hw = (corner[:, None] + inside).reshape(h * w, 2).astype(np.int32)

    patches = np.bincount(window) * merge_size**2
    first = np.cumsum(patches) - patches
    slot = np.arange((window_side * merge_size) ** 2)
    window_index = np.where(slot < patches[:, None], first[:, None] + slot, -1).astype(np.int32)

    layout = FrameLayout(patch_hw, window_index, unit_rank)
    for array in (layout.patch_hw, layout.window_index, layout.unit_rank):
        array.flags.writeable = False
    return layout


class IndexTables(NamedTuple):
    """What tells the model, for all media of a prompt, which patches and units belong together."""

    vision_index: Int32  # [S] the merged unit (window order) that is embedded here, -1 = text
    patch_hw: Int32  # [N, 2] row and column of the patch in its frame
    window_index: Int32  # [W, K] patches of each window, -1 = padding
    frame_index: Int32  # [T, Q] patches of each frame, -1 = padding (Q: of the largest frame)


def index_tables(
    length: int, spans: Sequence[VisionSpan], merge_size: int, window_side: int
) -> IndexTables:
    """The tables of a prompt of `length` tokens whose media are `spans`, stored one after another.

    In these shapes N, W and T count the patches, windows and temporal grids of all media.
    """
    largest = max((span.grid.frame_patches for span in spans), default=0)
    vision_index = np.full(length, -1, np.int32)
    patch_hw = [np.empty((0, 2), np.int32)]
    window_index = [np.empty((0, (window_side * merge_size) ** 2), np.int32)]
    frame_index = [np.empty((0, largest), np.int32)]
    first = 0  # patch of the medium
    for start, grid, _ in spans:
        layout = frame_layout(grid.h, grid.w, merge_size, window_side)
        offsets = first + np.arange(grid.t, dtype=np.int32)[:, None] * grid.frame_patches
        units = layout.unit_rank + offsets // merge_size**2
        vision_index[start : start + units.size] = units.ravel()
        patch_hw.append(np.tile(layout.patch_hw, (grid.t, 1)))
        windows = np.where(layout.window_index < 0, -1, layout.window_index + offsets[:, :, None])
        window_index.append(windows.reshape(-1, windows.shape[-1]))
        slot = np.arange(largest, dtype=np.int32)
        frame_index.append(np.where(slot < grid.frame_patches, slot + offsets, -1))
        first += grid.patches
    return IndexTables(
        vision_index,
        np.concatenate(patch_hw),
        np.concatenate(window_index).astype(np.int32, copy=False),
        np.concatenate(frame_index).astype(np.int32, copy=False),
    )


def pack_frames(frame_index: Int32, slots: int) -> Int32:
    """Puts whole frames into rows, one after another, each in the row before it if that has room.

    One worked example: the frames [[0 1 2] [3 4 -1] [5 6 -1]] in rows of 4 slots are
    [[0 1 2 -1] [3 4 5 6]]; in rows of 3 slots they are the same as before.

    Args:
      frame_index: i32[T, Q] patches of each frame, padded on the right with -1.
      slots: of a row, at least the patches of the largest frame.

    Returns:
      i32[R, slots], padded on the right with -1: the fewest rows that keep the frames in order.
    """
    frames = [frame[frame >= 0] for frame in frame_index]
    places: list[tuple[int, int]] = []  # row and first slot of each frame
    row, filled = -1, slots
    for frame in frames:
        if filled + len(frame) > slots:
            row, filled = row + 1, 0
        places.append((row, filled))
        filled += len(frame)
    packed = np.full((row + 1, slots), -1, np.int32)
    for frame, (row, first) in zip(frames, places, strict=True):
        packed[row, first : first + len(frame)] = frame
    return packed


def frame_rows(frames: int, patches: int, largest: int, slots: int) -> int:
    """How many rows `pack_frames` needs at most.

    Exact for frames of one size; in any case the rows have less than 2 * patches + slots slots.

    Args:
      frames, patches: how many there are.
      largest: patches of the largest frame.
      slots: of a row, at least `largest`.
    """
    if not frames:
        return 0
    # Two rows that follow each other hold more than one row could, or they would be one.
    return min(-(-frames // (slots // largest)), 2 * -(-patches // slots) - 1)


def fill_patches(
    frames: UInt8,
    patch_size: int,
    temporal_patch_size: int,
    merge_size: int,
    window_side: int,
    out: UInt8,
) -> None:
    """Cuts frames into patches in window order, in one copy.

    Args:
      frames: u8[T * temporal_patch_size, H, W, 3], H and W multiples of patch_size * merge_size.
      patch_size, temporal_patch_size: pixels per side and frames of a patch.
      merge_size: patches per side of a merged unit.
      window_side: merged units per side of a window.
      out: u8[T * Q, 3 * temporal_patch_size * patch_size^2], contiguous; is overwritten.
    """
    count, height, width, _ = frames.shape
    grids = count // temporal_patch_size
    out = out.reshape(grids, -1, out.shape[-1])
    side = window_side * merge_size * patch_size  # pixels
    first = 0
    for top in range(0, height, side):
        for left in range(0, width, side):
            window = frames[:, top : top + side, left : left + side]
            rows = window.shape[1] // (merge_size * patch_size)
            columns = window.shape[2] // (merge_size * patch_size)
            # Splitting axes never copies: this is a view.
            pixels = window.reshape(
                grids, temporal_patch_size,
                rows, merge_size, patch_size,
                columns, merge_size, patch_size,
                3,
            ).transpose(0, 2, 5, 3, 6, 8, 1, 4, 7)  # fmt: skip
            stop = first + rows * columns * merge_size**2
            out[:, first:stop].reshape(pixels.shape)[...] = pixels
            first = stop
