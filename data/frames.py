"""The frame store: a local folder that keeps decoded frames, so that all epochs decode once.

Frames are kept as the model sees them: chosen, resized, uint8. A file is found by what decides its
pixels, and is made again where the video has changed or the disk has damaged it. What is admitted
stays (see `data.staging`): with room for a third of the videos, a third of them is not decoded
again.

    FOLDER/frames/3f/KEY-VERSION-CRC   times, pixels; digests of what decides them and of the video
"""

from __future__ import annotations

import atexit
import io
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final, NamedTuple

import numpy as np

from data.npy import load_array
from data.staging import Pins
from data.storage import Identity, digest
from data.video import Frames

# Raised when the same video and settings give other pixels, or the files another content.
_FORMAT: Final = 1


class Served(NamedTuple):
    """How many videos were found in the store, and how many were not."""

    hits: int
    misses: int


@dataclass(frozen=True)
class FrameStore(Pins):
    """The folder, its bound in bytes, and where the store counts.

    Attributes:
      tally: a folder of this run's, for two files whose lengths are the counts: an append of one
        byte needs no lock between threads and processes.
    """

    tally: Path

    setting = "data.frame_store"
    files = "frames"
    otherwise = "videos are decoded each time"

    def get(self, video: str, how: object, identity: Identity) -> Frames | None:
        """The frames of a video, if they are here and undamaged.

        Args:
          video: its path or address.
          how: all else that decides its frames; told apart by its repr.
          identity: of the file as it is now.
        """
        data = self.read(_key(video, how), _version(identity))
        self._count_one("misses" if data is None else "hits")
        return None if data is None else _unpack(data)

    def put(self, video: str, how: object, identity: Identity, frames: Frames) -> bool:
        """Keeps frames, in the place of those of an older file; False where there is no room."""
        return self.write(_key(video, how), _version(identity), _pack(frames))

    def served(self) -> Served:
        """The counts of all threads and processes since the run started."""
        return Served(*(_length(self.tally / name) for name in Served._fields))

    def _count_one(self, name: str) -> None:
        with open(self.tally / name, "ab") as file:
            file.write(b".")


def open_store(folder: str, gib: float) -> FrameStore:
    """The store of a folder that may hold so many GiB, with what it holds counted.

    Raises:
      StorageError: it cannot be written.
    """
    tally = Path(tempfile.mkdtemp(prefix="jaxgrpo-frames-"))
    atexit.register(shutil.rmtree, tally, ignore_errors=True)
    store = FrameStore(Path(folder).expanduser(), int(gib * (1 << 30)), tally)
    store.recount()
    return store


def _key(video: str, how: object) -> str:
    name = video if "://" in video else os.path.abspath(video)
    return digest(name, repr(how), _FORMAT)


def _version(identity: Identity) -> str:
    return digest(*identity)


def _length(path: Path) -> int:
    return path.stat().st_size if path.exists() else 0


def _pack(frames: Frames) -> bytes:
    packed = io.BytesIO()
    for part in frames:
        np.save(packed, np.asarray(part), allow_pickle=False)
    return packed.getvalue()


def _unpack(data: bytes) -> Frames:
    packed = io.BytesIO(data)
    frames, times, seconds_per_frame, decoded_hw = (load_array(packed) for _ in Frames._fields)
    height, width = decoded_hw.tolist()
    return Frames(frames, times, float(seconds_per_frame), (height, width))
