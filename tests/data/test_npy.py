"""Arrays come back from files and buffers, in many threads at once, and pickles never do."""

from __future__ import annotations

import io
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

from data.npy import load_array


def test_arrays_of_one_buffer_come_one_after_the_other() -> None:
    packed = io.BytesIO()
    arrays = [np.arange(6, dtype=np.uint8).reshape(2, 3), np.array(0.25), np.zeros((0, 4))]
    for array in arrays:
        np.save(packed, array)
    packed.seek(0)
    for array in arrays:
        found = load_array(packed)
        np.testing.assert_array_equal(found, array, strict=True)


def test_threads_may_load_at_once(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.arange(10))
    with ThreadPoolExecutor(16) as pool:
        for found in pool.map(load_array, [path] * 3000):
            assert found[-1] == 9


def test_what_would_have_to_be_unpickled_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.npy"
    np.save(path, np.array([{}], object), allow_pickle=True)
    with pytest.raises(ValueError, match="allow_pickle"):
        load_array(path)
