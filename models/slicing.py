"""Reading a part of a rearranged tensor without the rest of it.

Legend: an axis of a pattern is one name, or several in brackets that share it: "(N H) D" has two
axes of three names. Where in a name's numbers a part lies is a range; a range per name is a box.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence

import numpy as np
from einops import rearrange

Read = Callable[[tuple[slice, ...]], np.ndarray]


def read_part(
    read: Read,
    shape: Sequence[int],
    pattern: str,
    sizes: Mapping[str, int],
    index: Sequence[slice],
) -> np.ndarray:
    """`rearrange(stored, pattern, **sizes)[index]`, by reading only the slices that this needs.

    One worked example: of six rows (3 x A=2) with the pattern "(QKV A) D -> D QKV A", the index
    [:, :, 1:2] (the second head) reads the rows 1:2, 3:4 and 5:6, all columns; the index
    [:, 1:3, :] reads the rows 2:6 at once.

    Where a bracket of the result is cut across its names, the smallest box around the part is read.

    Args:
      read: slices of the stored axes (start and stop given, step 1) -> their values.
      shape: of the stored tensor.
      pattern: einops, stored axes -> axes of the result.
      sizes: the lengths of the names in brackets.
      index: one slice for each axis of the result, not empty, step 1.

    Returns:
      The part, often a view of what was read.
    """
    stored, result = (_axes(side) for side in pattern.split("->"))
    sizes = dict(sizes) | {
        names[0]: length for names, length in zip(stored, shape, strict=True) if len(names) == 1
    }
    box: dict[str, range] = {}
    trim: list[slice] = []  # the part in the box
    for names, part in zip(result, index, strict=True):
        lengths = [sizes[name] for name in names]
        start, stop, _ = part.indices(math.prod(lengths))
        ranges = _smallest_box(start, stop, lengths)
        box |= zip(names, ranges, strict=True)
        before = start - _runs(ranges, lengths)[0].start
        trim.append(slice(before, before + stop - start))
    runs = [
        _runs([box[name] for name in names], [sizes[name] for name in names]) for names in stored
    ]
    values = _read_runs(read, runs, ())
    return rearrange(values, pattern, **{name: len(r) for name, r in box.items()})[tuple(trim)]


def _axes(side: str) -> list[list[str]]:
    """The names of each axis of one side of a pattern."""
    return [axis.strip("()").split() for axis in re.findall(r"\([^)]*\)|\w+", side)]


def _smallest_box(start: int, stop: int, lengths: Sequence[int]) -> list[range]:
    """The ranges of names of these lengths that hold start:stop of the axis they share.

    Example: 5:7 of lengths (3, 4) is in row 1, columns 1 to 2; 3:5 is in rows 0 to 1, all columns.
    The box is itself one run of the axis.
    """
    first, last = (np.unravel_index(number, lengths) for number in (start, stop - 1))
    box: list[range] = []
    one = True  # the names before are at one number each
    for low, high, length in zip(first, last, lengths, strict=True):
        box.append(range(int(low), int(high) + 1) if one else range(length))
        one = one and low == high
    return box


def _runs(box: Sequence[range], lengths: Sequence[int]) -> list[slice]:
    """The runs that a box is in the axis that its names share, in order.

    Example: of lengths (2, 4), the box (0:2, 1:3) is 1:3 and 5:7, and (1:2, 0:4) is 4:8.
    """
    starts, run, stride = [0], 1, 1
    for part, length in zip(reversed(box), reversed(lengths), strict=True):
        if run == stride:  # all inner names are whole
            starts, run = [part.start * stride], len(part) * stride
        else:
            starts = [number * stride + start for number in part for start in starts]
        stride *= length
    return [slice(start, start + run) for start in starts]


def _read_runs(
    read: Read, runs: Sequence[Sequence[slice]], chosen: tuple[slice, ...]
) -> np.ndarray:
    """Every combination of one run per axis, put together; the first axes are `chosen` already."""
    axis = len(chosen)
    if axis == len(runs):
        return read(chosen)
    pieces = [_read_runs(read, runs, (*chosen, run)) for run in runs[axis]]
    return pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis)
