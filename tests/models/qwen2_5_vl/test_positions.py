"""M-RoPE positions, and patches in window order."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.vision_utils import get_vision_position_ids, get_vision_window_index

from models.qwen2_5_vl.positions import (
    Grid,
    VisionSpan,
    fill_patches,
    frame_layout,
    frame_rows,
    index_tables,
    mrope_positions,
    pack_frames,
)

SIDES = st.integers(1, 11).map(lambda units: 2 * units)
GRIDS = st.builds(Grid, st.integers(1, 4), SIDES, SIDES)


def spans_of(grids: list[Grid]) -> tuple[int, list[VisionSpan]]:
    """Media with one text token before each and after the last; returns the length too."""
    spans, index = [], 1
    for grid in grids:
        spans.append(VisionSpan(index, grid, 1.0))
        index += grid.patches // 4 + 1
    return index, spans


# --- M-RoPE ------------------------------------------------------------------------------------


def test_text_counts_up_in_all_three_components():
    np.testing.assert_array_equal(
        mrope_positions(4, [], merge_size=2, tokens_per_second=2), [[i] * 3 for i in range(4)]
    )


def test_the_example_of_the_docstring_holds():
    positions = mrope_positions(7, [VisionSpan(2, Grid(2, 2, 4), 1.5)], 2, 2)
    np.testing.assert_array_equal(
        positions.T, [[0, 1, 2, 2, 5, 5, 6], [0, 1, 2, 2, 2, 2, 6], [0, 1, 2, 3, 2, 3, 6]]
    )


def test_a_prompt_of_two_videos_and_an_image_has_the_released_positions():
    # Recorded from get_rope_index of transformers 4.49, the release's: 2 text tokens, a video at
    # 0.5 s a frame pair, 2 text, an image, 2 text, a video at 1.3 s, 3 text.
    recorded = """
      0 1 2 2 2 2 3 3 3 3 4 4 4 4 5 6 7 7 7 7 7 7 7 7 11 12 13 13 15 15 18 18 20 20 23 23 24 25 26
      0 1 2 2 3 3 2 2 3 3 2 2 3 3 5 6 7 7 7 7 8 8 8 8 11 12 13 14 13 14 13 14 13 14 13 14 24 25 26
      0 1 2 3 2 3 2 3 2 3 2 3 2 3 5 6 7 8 9 10 7 8 9 10 11 12 13 13 13 13 13 13 13 13 13 13 24 25 26
    """
    spans = [
        VisionSpan(2, Grid(3, 4, 4), 0.5),
        VisionSpan(16, Grid(1, 4, 8), 0.0),
        VisionSpan(26, Grid(5, 4, 2), 1.3),
    ]
    expected = [row.split() for row in recorded.strip().splitlines()]
    np.testing.assert_array_equal(
        mrope_positions(39, spans, 2, 2.0), np.array(expected, np.int64).T
    )


def test_time_is_computed_in_float32_as_in_the_release():
    # Recorded from transformers 4.49. In float64, frame pair 25 at float32(1.3) s is 64, not 65.
    recorded = [0, 2, 5, 7, 10, 13, 15, 18, 20, 23, 26, 28, 31, 33, 36, 39, 41, 44, 46, 49, 52, 54]
    positions = mrope_positions(26, [VisionSpan(0, Grid(26, 2, 2), 1.3)], 2, 2)
    np.testing.assert_array_equal(positions[:22, 0], recorded)
    assert positions[25, 0] == 65
    assert int(25 * float(np.float32(1.3)) * 2) == 64


def test_an_image_has_one_time_and_text_goes_on_after_its_longer_side():
    positions = mrope_positions(9, [VisionSpan(1, Grid(1, 4, 6), 0.0)], 2, 2)
    assert (positions[1:7, 0] == 1).all()
    np.testing.assert_array_equal(positions[7:], [[4] * 3, [5] * 3])


# --- Window order -------------------------------------------------------------------------------


def test_the_example_of_the_layout_docstring_holds():
    layout = frame_layout(4, 6, merge_size=2, window_side=2)
    np.testing.assert_array_equal(layout.unit_rank, [0, 1, 4, 2, 3, 5])
    np.testing.assert_array_equal(
        layout.window_index, [list(range(16)), [*range(16, 24), *[-1] * 8]]
    )


@settings(max_examples=60, deadline=None)
@given(st.lists(GRIDS, min_size=1, max_size=3), st.sampled_from([1, 2, 4]))
def test_windows_are_those_of_transformers(grids: list[Grid], window_side: int):
    length, spans = spans_of(grids)
    tables = index_tables(length, spans, merge_size=2, window_side=window_side)
    order, bounds = get_vision_window_index(
        torch.tensor(grids), spatial_merge_size=2, window_size=window_side * 28, patch_size=14
    )
    # transformers: order[i] is the raster unit in place i; ours: the place of each raster unit.
    vision = tables.vision_index[tables.vision_index >= 0]
    np.testing.assert_array_equal(vision, np.argsort(order.numpy()))
    edges = bounds.tolist()
    for window, start, stop in zip(tables.window_index, edges[:-1], edges[1:], strict=True):
        np.testing.assert_array_equal(window[window >= 0], np.arange(start, stop))


@settings(max_examples=60, deadline=None)
@given(st.lists(GRIDS, min_size=1, max_size=3))
def test_rows_and_columns_are_those_of_transformers_in_window_order(grids: list[Grid]):
    length, spans = spans_of(grids)
    tables = index_tables(length, spans, merge_size=2, window_side=4)
    order, _ = get_vision_window_index(torch.tensor(grids), 2, 112, 14)
    raster = get_vision_position_ids(torch.tensor(grids), spatial_merge_size=2)
    expected = raster.reshape(-1, 4, 2)[order].reshape(-1, 2)
    np.testing.assert_array_equal(tables.patch_hw, expected)


@settings(max_examples=60, deadline=None)
@given(st.lists(GRIDS, max_size=3))
def test_every_patch_is_in_one_window_and_in_one_frame(grids: list[Grid]):
    length, spans = spans_of(grids)
    tables = index_tables(length, spans, merge_size=2, window_side=4)
    count = sum(grid.patches for grid in grids)
    for table in (tables.window_index, tables.frame_index):
        np.testing.assert_array_equal(np.sort(table[table >= 0]), np.arange(count))
        assert table.dtype == np.int32
    assert len(tables.frame_index) == sum(grid.t for grid in grids)
    frame_of = np.empty(count, np.int64)
    for number, frame in enumerate(tables.frame_index):
        frame_of[frame[frame >= 0]] = number
    for window in tables.window_index:
        assert len(set(frame_of[window[window >= 0]])) == 1


@settings(max_examples=60, deadline=None)
@given(st.lists(GRIDS, max_size=3))
def test_a_frame_begins_at_its_row_0_and_column_0(grids: list[Grid]):
    """The model numbers the frames by this."""
    length, spans = spans_of(grids)
    tables = index_tables(length, spans, merge_size=2, window_side=4)
    number = np.cumsum(np.all(tables.patch_hw == 0, axis=1))
    for expected, frame in enumerate(tables.frame_index, start=1):
        assert set(number[frame[frame >= 0]]) == {expected}


def test_the_example_of_packing_holds():
    frames = np.array([[0, 1, 2], [3, 4, -1], [5, 6, -1]], np.int32)
    np.testing.assert_array_equal(pack_frames(frames, 4), [[0, 1, 2, -1], [3, 4, 5, 6]])
    np.testing.assert_array_equal(pack_frames(frames, 3), frames)


@settings(max_examples=100, deadline=None)
@given(st.lists(GRIDS, max_size=3), st.integers(0, 600))
def test_frames_are_packed_whole_in_order_and_in_the_fewest_rows(grids: list[Grid], more: int):
    length, spans = spans_of(grids)
    frames = index_tables(length, spans, merge_size=2, window_side=4).frame_index
    slots = frames.shape[1] + more
    packed = pack_frames(frames, slots)
    assert packed.dtype == np.int32 and packed.shape[1] == slots
    filled = (packed >= 0).sum(axis=1)
    assert all((row[:count] >= 0).all() for row, count in zip(packed, filled, strict=True))
    np.testing.assert_array_equal(packed[packed >= 0], frames[frames >= 0])
    row_of = {int(patch): row for row, line in enumerate(packed) for patch in line}
    first = [{row_of[int(patch)] for patch in frame[frame >= 0]} for frame in frames]
    assert all(len(rows) == 1 for rows in first)
    sizes = (frames >= 0).sum(axis=1).tolist()
    assert len(packed) == fewest_rows(sizes, slots)
    bound = frame_rows(len(sizes), sum(sizes), max(sizes, default=0), slots)
    assert len(packed) <= bound <= len(sizes)
    assert bound * slots <= 2 * sum(sizes) + slots
    if len(set(sizes)) <= 1:
        assert len(packed) == bound


def fewest_rows(sizes: list[int], slots: int) -> int:
    """By trying every place at which the last row could begin."""
    best = [0]
    for stop in range(1, len(sizes) + 1):
        starts = [start for start in range(stop) if sum(sizes[start:stop]) <= slots]
        best.append(1 + min(best[start] for start in starts))
    return best[-1]


def test_text_tokens_have_no_vision_index():
    tables = index_tables(6, [VisionSpan(1, Grid(1, 2, 4), 0.0)], 2, 4)
    np.testing.assert_array_equal(tables.vision_index, [-1, 0, 1, -1, -1, -1])


def test_a_cached_layout_cannot_be_changed():
    layout = frame_layout(4, 4, 2, 4)
    with pytest.raises(ValueError, match="read-only"):
        layout.patch_hw[0] = 7


@settings(max_examples=30, deadline=None)
@given(GRIDS, st.integers(0, 2**32 - 1))
def test_a_patch_holds_the_pixels_at_its_row_and_column(grid: Grid, seed: int):
    rng = np.random.default_rng(seed)
    frames = rng.integers(0, 256, (2 * grid.t, grid.h * 14, grid.w * 14, 3), np.uint8)
    out = np.zeros((grid.patches, 1176), np.uint8)
    fill_patches(frames, 14, 2, merge_size=2, window_side=4, out=out)
    place = frame_layout(grid.h, grid.w, 2, 4).patch_hw
    for number in rng.integers(0, grid.patches, 20):
        frame, (row, column) = 2 * (number // grid.frame_patches), place[number % len(place)]
        square = frames[frame : frame + 2, row * 14 : row * 14 + 14, column * 14 : column * 14 + 14]
        np.testing.assert_array_equal(
            out[number].reshape(3, 2, 14, 14), square.transpose(3, 0, 1, 2)
        )
