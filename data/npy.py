"""Arrays from `.npy` files, read by many threads at once."""

from __future__ import annotations

import io
import threading
from pathlib import Path

import numpy as np

_PARSING = threading.Lock()


def load_array(source: Path | io.BytesIO) -> np.ndarray:
    """The array in a file, or the next one in a buffer.

    One at a time: NumPy parses the header with `ast`, which in CPython 3.11 raises SystemError when
    threads do so at once (gh-106905).

    Raises:
      ValueError: it holds no array, or objects, which would have to be unpickled.
    """
    with _PARSING:
        found: np.ndarray = np.load(source, allow_pickle=False)
    return found
