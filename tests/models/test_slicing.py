"""Parts of rearranged tensors: the same values as slicing the whole, and no more read than that."""

from __future__ import annotations

import math
import re

import numpy as np
import pytest
from einops import rearrange
from hypothesis import given, settings
from hypothesis import strategies as st

from models.qwen2_5_vl.weights import TABLE
from models.slicing import read_part

# Those of the weights, and some that no weight needs.
PATTERNS = sorted({row.pattern for row in TABLE}) + [
    "(A B C) D -> (D C) B A",
    "A B -> (B A)",
    "A (B C) -> (C A) B",
    "(A B) (C D) -> B D A C",
]


class Stored:
    """A tensor that notes which of its slices are read."""

    def __init__(self, shape: list[int]) -> None:
        self.values = np.arange(math.prod(shape)).reshape(shape)
        self.slices: list[tuple[slice, ...]] = []
        self.count = 0

    def read(self, part: tuple[slice, ...]) -> np.ndarray:
        for cut, length in zip(part, self.values.shape, strict=True):
            assert 0 <= cut.start < cut.stop <= length and cut.step is None
        self.slices.append(part)
        self.count += self.values[part].size
        return self.values[part]


@st.composite
def cases(draw: st.DrawFn) -> tuple[str, dict[str, int], tuple[slice, ...]]:
    """(pattern, length of every name, index on the rearranged axes)."""
    pattern = draw(st.sampled_from(PATTERNS))
    lengths = {name: draw(st.integers(1, 5)) for name in sorted(set(re.findall(r"\w+", pattern)))}
    index = []
    for axis in axes(pattern.split(" -> ")[1]):
        length = math.prod(lengths[name] for name in axis)
        start = draw(st.integers(0, length - 1))
        index.append(slice(start, draw(st.integers(start + 1, length))))
    if draw(st.booleans()):
        index[draw(st.integers(0, len(index) - 1))] = slice(None)  # as jax says "all of it"
    return pattern, lengths, tuple(index)


def axes(side: str) -> list[list[str]]:
    return [re.findall(r"\w+", axis) for axis in re.findall(r"\([^)]*\)|\w+", side)]


def stored(pattern: str, lengths: dict[str, int]) -> Stored:
    left = axes(pattern.split(" -> ")[0])
    return Stored([math.prod(lengths[name] for name in axis) for axis in left])


@given(cases())
@settings(max_examples=300, deadline=None)
def test_a_part_is_the_slice_of_the_whole(
    case: tuple[str, dict[str, int], tuple[slice, ...]],
) -> None:
    pattern, lengths, index = case
    tensor = stored(pattern, lengths)
    bracketed = {
        n: lengths[n] for axis in re.findall(r"\([^)]*\)", pattern) for n in axis[1:-1].split()
    }
    part = read_part(tensor.read, tensor.values.shape, pattern, bracketed, index)
    expected = rearrange(tensor.values, pattern, **lengths)[index]
    np.testing.assert_array_equal(part, expected, strict=True)
    if "(" not in pattern.split(" -> ")[1]:
        assert tensor.count == expected.size, "nothing else is read"


HEADS, ALL = "(QKV A H) D -> D QKV A H", slice(None)
QKV = {"QKV": 3, "A": 4, "H": 2, "D": 5}


@pytest.mark.parametrize(
    ("index", "rows", "columns"),
    [
        ((ALL, ALL, ALL, ALL), [(0, 24)], (0, 5)),
        ((slice(1, 3), ALL, ALL, ALL), [(0, 24)], (1, 3)),  # fsdp
        ((ALL, ALL, slice(1, 3), ALL), [(2, 6), (10, 14), (18, 22)], (0, 5)),  # tensor
        ((ALL, slice(1, 3), ALL, ALL), [(8, 24)], (0, 5)),
        ((ALL, slice(2, 3), slice(0, 2), slice(1, 2)), [(17, 18), (19, 20)], (0, 5)),
    ],
    ids=["all", "columns", "heads", "keys and values", "one of each head"],
)
def test_a_cut_of_heads_is_few_runs_of_rows(
    index: tuple[slice, ...], rows: list[tuple[int, int]], columns: tuple[int, int]
) -> None:
    tensor = stored(HEADS, QKV)
    read_part(tensor.read, tensor.values.shape, HEADS, QKV, index)
    assert tensor.slices == [(slice(*run), slice(*columns)) for run in rows]


def test_the_example_of_the_docstring_holds() -> None:
    tensor = Stored([6, 2])
    index = (ALL, ALL, slice(1, 2))
    read_part(tensor.read, (6, 2), "(QKV A) D -> D QKV A", {"QKV": 3, "A": 2}, index)
    assert [rows for rows, _ in tensor.slices] == [slice(1, 2), slice(3, 4), slice(5, 6)]
    tensor.slices.clear()
    index = (ALL, slice(1, 3), ALL)
    read_part(tensor.read, (6, 2), "(QKV A) D -> D QKV A", {"QKV": 3, "A": 2}, index)
    assert [rows for rows, _ in tensor.slices] == [slice(2, 6)]


def test_a_cut_across_the_names_of_a_bracket_reads_the_smallest_box() -> None:
    """Of 2 x 3 x 4 numbers, 13:19 is in the second block, rows 0 and 1: eight are read for six."""
    pattern, sizes = "D A B C -> (A B C) D", {"A": 2, "B": 3, "C": 4}
    tensor = Stored([1, 2, 3, 4])
    part = read_part(tensor.read, (1, 2, 3, 4), pattern, sizes, (slice(13, 19), ALL))
    np.testing.assert_array_equal(part[:, 0], range(13, 19))
    assert tensor.slices == [(slice(0, 1), slice(1, 2), slice(0, 2), slice(0, 4))]
