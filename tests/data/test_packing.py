"""Packing: elements in the manifest's order, shards of a size, clips left out by name."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path

import grain
import pytest
import tensorflow_datasets as tfds

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
        empty = VideoError("empty", "here/a.mp4: has no bytes")
        return {record.id: PROBE if BYTES[record.video] else empty for record in records}


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


# Without clips


def test_without_clips_the_rows_are_packed_with_what_probing_found(tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = pack(Source(RECORDS, FakeClips()), out, "train", 100, threads=2, clips=False)
    assert (done.records, done.clips, done.rejected) == (4, 2, {"1": "1: here/a.mp4: has no bytes"})
    root = tmp_path / "videos"
    root.mkdir()
    for video, data in BYTES.items():
        (root / video).write_bytes(data)
    source = open_source(str(out), str(root), None, 1, print)
    assert source.records == RECORDS
    findings = source.clips.probe(source.records, 1)
    assert findings["0"] == findings["2"] == PROBE  # though no video is in these files
    assert isinstance(findings["1"], VideoError)
    assert source.clips.fetch("c.mp4") == root / "c.mp4"
    assert source.clips.name("c.mp4") == str(root / "c.mp4")


def test_a_file_that_has_changed_since_is_probed_again(tmp_path: Path) -> None:
    out, root = tmp_path / "out", tmp_path / "videos"
    pack(Source(RECORDS, FakeClips()), out, "train", 100, threads=1, clips=False)
    root.mkdir()
    (root / "b.mp4").write_bytes(b"no longer ten bytes")
    (root / "c.mp4").write_bytes(BYTES["c.mp4"])
    source = open_source(str(out), str(root), None, 1, print)
    findings = source.clips.probe(source.records, 1)
    assert findings["2"] == PROBE
    assert isinstance(findings["0"], VideoError) and findings["0"].kind == "unreadable"


ANSWERS = {"number": "3", "regression": "-2.50", "ocr": "STOP", "text": "He opens the door."}


@pytest.mark.parametrize("clips", [True, False])
def test_elements_reach_grain_through_tfds_without_tensorflow(clips: bool, tmp_path: Path) -> None:
    asked = [
        Record(task, "b.mp4", task, "What?", (), answer, (), None)
        for task, answer in ANSWERS.items()
    ]
    records = [*RECORDS, *asked]
    done = pack(Source(records, FakeClips()), tmp_path / "out", "train", 10, 1, clips=clips)
    assert opened(tmp_path / "out").records == records

    builder = tfds.builder_from_directory(tmp_path / "out")
    elements = grain.MapDataset.source(builder.as_data_source(split="train"))
    assert len(elements) == done.clips == 2
    rows = elements.map(lambda element: [json.loads(row) for row in element["records"]])
    by_video = {found[0]["video"]: [row["id"] for row in found] for found in rows}
    assert by_video == {"b.mp4": ["0", "3", *ANSWERS], "c.mp4": ["2"]}
    assert [row.get("answer") for row in rows[0][2:]] == list(ANSWERS.values())
    stored = {element["video"].decode(): element["data"] for element in elements}
    assert stored == {video: BYTES[video] if clips else b"" for video in ("b.mp4", "c.mp4")}
    assert "tensorflow" not in sys.modules
