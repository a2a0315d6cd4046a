"""Packing: elements in the manifest's order, shards of a size, clips left out by name."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pytest

from data import packing
from data.packing import PackError, _in_shards, pack
from data.probe import Encoded, Probe, VideoError
from data.records import Record
from data.sources import Source, open_source
from data.storage import Identity

BYTES = {"b.mp4": b"0123456789", "a.mp4": b"", "c.mp4": b"01234"}
PROBE = Probe(frames=10, fps=5.0, width=28, height=28, duration=2.0)


class FakeClips:
    """Clips whose bytes are given; a.mp4 cannot be read."""

    def name(self, video: str) -> str:
        return f"here/{video}"

    def identities(self, videos: Iterable[str], threads: int) -> dict[str, Identity]:
        return {video: Identity(len(BYTES[video]), "1") for video in videos}

    def fetch(self, video: str) -> Encoded:
        if not BYTES[video]:
            raise VideoError("empty", f"here/{video}: has no bytes")
        return Encoded(video, BYTES[video])

    def probe(self, records: Iterable[Record], threads: int) -> dict[str, Probe | VideoError]:
        raise NotImplementedError


def record(name: str, video: str) -> Record:
    return Record(name, video, "tvg", "When?", (), None, ((0.1, 0.5),), None)


RECORDS = [
    record("0", "b.mp4"),
    record("1", "a.mp4"),
    record("2", "c.mp4"),
    record("3", "b.mp4"),
]


@pytest.fixture(autouse=True)
def no_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "probe", lambda file: PROBE)


def opened(folder: Path) -> Source:
    return open_source(str(folder), ".", None, 1, print)


@pytest.mark.parametrize(
    ("most", "groups"),
    [
        (100, [["b", "a", "c", "d"]]),
        (12, [["b", "a"], ["c", "d"]]),
        (10, [["b"], ["a", "c"], ["d"]]),
        (1, [["b"], ["a"], ["c"], ["d"]]),  # a clip that is larger has a shard of its own
    ],
)
def test_a_shard_ends_before_the_clip_that_is_too_much(most: int, groups: list[list[str]]) -> None:
    assert _in_shards({"b": 10, "a": 2, "c": 8, "d": 4}, most) == groups


def test_clips_are_stored_once_in_the_manifests_order_and_read_back(tmp_path: Path) -> None:
    done = pack(Source(RECORDS, FakeClips()), tmp_path / "out", "train", 12, threads=2)
    assert (done.records, done.clips, done.shards) == (4, 2, 2)
    assert done.rejected == {"1": "1: here/a.mp4: has no bytes"}
    source = opened(tmp_path / "out")
    assert source.records == RECORDS
    findings = source.clips.probe(source.records, 1)
    assert findings["0"] == findings["3"] == PROBE
    assert isinstance(findings["1"], VideoError) and findings["1"].kind == "empty"
    for video in ("b.mp4", "c.mp4"):
        found = source.clips.fetch(video)
        assert isinstance(found, Encoded) and found.data == BYTES[video]


def test_a_shard_whose_clips_are_all_bad_does_not_move_the_others(tmp_path: Path) -> None:
    done = pack(Source(RECORDS, FakeClips()), tmp_path / "out", "train", 1, threads=1)
    assert done.clips == 2
    source = opened(tmp_path / "out")
    for video in ("b.mp4", "c.mp4"):
        found = source.clips.fetch(video)
        assert isinstance(found, Encoded) and found.data == BYTES[video]


def test_a_clip_that_no_element_can_hold_is_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "_LARGEST", 9)
    done = pack(Source(RECORDS, FakeClips()), tmp_path / "out", "train", 100, threads=1)
    assert done.clips == 1 and list(done.rejected) == ["0", "1", "3"]
    assert "a packed clip has at most 2 GiB" in done.rejected["0"]


def test_nothing_to_pack_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(PackError, match="none of the 1 clips can be read; the first:\n1: here/a"):
        pack(Source(RECORDS[1:2], FakeClips()), tmp_path / "out", "train", 100, threads=1)


def test_a_disk_that_is_too_small_is_said_before_anything_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    full = type(packing.shutil.disk_usage(tmp_path))(100, 99, 1)
    monkeypatch.setattr(packing.shutil, "disk_usage", lambda path: full)
    with pytest.raises(PackError, match="the clips are 0.00 GiB, but the disk has 0.00 GiB left"):
        pack(Source(RECORDS, FakeClips()), tmp_path / "out", "train", 100, threads=1)
