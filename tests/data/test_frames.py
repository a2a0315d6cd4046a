"""The frame store: what it gives is what was decoded, or nothing, whatever happened to the disk."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from data.frames import FrameStore, Served, open_store
from data.storage import Identity, StorageError
from data.video import Frames

ONE = Identity(1000, "1")
TWO = Identity(1000, "2")  # the same file, written anew
MIB = 1 / 1024  # GiB


def frames_of(number: int, count: int = 4) -> Frames:
    pixels = np.random.default_rng(number).integers(0, 256, (count, 28, 56, 3), np.uint8)
    return Frames(pixels, np.linspace(0, 1.7, count), 1.3 / 3, (480 + number, 640))


@pytest.fixture
def store(tmp_path: Path) -> FrameStore:
    return open_store(str(tmp_path / "store"), MIB)


def assert_same(found: Frames | None, expected: Frames) -> None:
    assert found is not None
    np.testing.assert_array_equal(found.frames, expected.frames)
    np.testing.assert_array_equal(found.timestamps, expected.timestamps)
    assert found.frames.dtype == np.uint8 and found.timestamps.dtype == np.float64
    assert found[2:] == expected[2:]


def files(store: FrameStore) -> list[Path]:
    return sorted((store.folder / "frames").glob("*/*"))


def test_what_was_put_is_given_back_bit_for_bit(store: FrameStore) -> None:
    assert store.get("a.mp4", ("2 fps", None), ONE) is None
    assert store.put("a.mp4", ("2 fps", None), ONE, frames_of(1))
    assert_same(store.get("a.mp4", ("2 fps", None), ONE), frames_of(1))
    assert store.served() == Served(hits=1, misses=1)


def test_another_video_and_other_settings_are_told_apart(store: FrameStore) -> None:
    for number, (video, how) in enumerate(
        [("a.mp4", (2.0, None)), ("b.mp4", (2.0, None)), ("a.mp4", (2.0, (0.0, 3.0)))]
    ):
        assert store.get(video, how, ONE) is None
        store.put(video, how, ONE, frames_of(number))
    assert_same(store.get("a.mp4", (2.0, None), ONE), frames_of(0))
    assert_same(store.get("a.mp4", (2.0, (0.0, 3.0)), ONE), frames_of(2))


def test_a_video_that_changed_takes_the_place_of_the_old_one(store: FrameStore) -> None:
    store.put("a.mp4", 1, ONE, frames_of(1))
    assert store.get("a.mp4", 1, TWO) is None
    store.put("a.mp4", 1, TWO, frames_of(2))
    assert store.get("a.mp4", 1, ONE) is None
    assert_same(store.get("a.mp4", 1, TWO), frames_of(2))
    assert len(files(store)) == 1


def test_the_bound_holds_and_what_was_admitted_stays(store: FrameStore) -> None:
    """1 MiB, and 20 videos of 95 kB: an epoch twice as large as the store. In a least-recently-used
    one not one of them would be found in the second epoch."""
    videos = [f"{number}.mp4" for number in range(20)]
    for epoch in range(3):
        for number, video in enumerate(videos):
            if store.get(video, 1, ONE) is None:
                store.put(video, 1, ONE, frames_of(number, 20))
        held = sum(path.stat().st_size for path in files(store))
        assert 0.8 * (1 << 20) < held <= 1 << 20
        assert store.served() == Served(epoch * 11, 20 + epoch * 9)
    for number in range(11):
        assert_same(store.get(videos[number], 1, ONE), frames_of(number, 20))


@pytest.mark.parametrize("damage", [b"", b"short", b"\x00" * 100_000])
def test_a_damaged_file_is_made_again(store: FrameStore, damage: bytes) -> None:
    store.put("a.mp4", 1, ONE, frames_of(1))
    [path] = files(store)
    path.write_bytes(damage or path.read_bytes()[:-1] + b"?")
    assert store.get("a.mp4", 1, ONE) is None
    assert files(store) == []
    store.put("a.mp4", 1, ONE, frames_of(1))
    assert_same(store.get("a.mp4", 1, ONE), frames_of(1))


def test_a_folder_that_cannot_be_written_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "taken").touch()
    with pytest.raises(StorageError, match=r"data.frame_store: .*taken"):
        open_store(str(tmp_path / "taken"), 1.0)


def test_another_run_finds_what_this_one_left(store: FrameStore) -> None:
    store.put("a.mp4", 1, ONE, frames_of(1))
    other = open_store(str(store.folder), MIB)
    assert_same(other.get("a.mp4", 1, ONE), frames_of(1))
    assert (store.served(), other.served()) == (Served(0, 0), Served(1, 0))


# Several processes put the same and other videos; each checks all that it is given.
WORK = """
import pickle, sys
from tests.data.test_frames import ONE, assert_same, frames_of
store = pickle.loads(bytes.fromhex(sys.argv[1]))
for _ in range(3):
    for number in range(15):
        found = store.get(f"{number}.mp4", 1, ONE)
        if found is None:
            store.put(f"{number}.mp4", 1, ONE, frames_of(number, 20))
        else:
            assert_same(found, frames_of(number, 20))
"""


def test_processes_share_a_store_and_its_bound(store: FrameStore) -> None:
    root = Path(__file__).parents[2]
    told = pickle.dumps(store).hex()
    processes = [subprocess.Popen([sys.executable, "-c", WORK, told], cwd=root) for _ in range(3)]
    assert [process.wait(120) for process in processes] == [0, 0, 0]
    held = sum(path.stat().st_size for path in files(store))
    assert held <= 1 << 20 and len(files(store)) == 11
    assert sum(store.served()) == 3 * 3 * 15 and store.served().hits >= 2 * 11
