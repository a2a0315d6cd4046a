"""Sources: the same records, findings and frames from files, a bucket and a packed dataset."""

from __future__ import annotations

import functools
import json
from pathlib import Path

import numpy as np
import pytest

from data import storage
from data.packing import pack
from data.pipeline import Batch, batches
from data.probe import Clips, Encoded, Probe, VideoError, probe
from data.records import ManifestError, Record, write_manifest
from data.sampling import StepPlan
from data.sources import RECORDS, PackedClips, Source, open_source
from data.staging import Stage
from data.storage import StorageError
from data.video import FrameSampling, decode
from tests.data import clips

VIDEOS = ["a.mp4", "sub/b é#1.mp4", "c.mp4", "d.mp4"]


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("JAXGRPO_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(storage, "PAUSES", ())
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    for number, video in enumerate(VIDEOS):
        clips.write_clip(root / video, 20 + 10 * number)
    (root / "bad.mp4").write_text("no video")
    span = ((0.1, 0.5),)
    records = [
        Record(f"{i}", video, "tvg", "When?", (), None, span, None)
        for i, video in enumerate([*VIDEOS, VIDEOS[0], "bad.mp4"])
    ]
    write_manifest(root / "train.jsonl", records)
    return root


def opened(manifest: str, root: str, stage: Stage | None = None) -> Source:
    return open_source(manifest, root, stage, 2, print)


def plain(root: Path) -> Source:
    return opened(str(root / "train.jsonl"), str(root))


@pytest.fixture
def packed(root: Path, tmp_path: Path) -> Path:
    out = tmp_path / "packed" / "train"
    done = pack(plain(root), out, "train", 8_000, 2)
    assert done.clips == 4 and list(done.rejected) == ["5"] and done.shards > 1
    return out


def load(item: int, records: list[Record], clips: Clips) -> np.ndarray:
    return decode(clips.fetch(records[item].video), FrameSampling()).frames


def collate(examples: list[np.ndarray], bucket: int) -> list[np.ndarray]:
    return examples


def steps(source: Source, **how: int) -> list[Batch]:
    loader = functools.partial(load, records=source.records, clips=source.clips)
    plan = StepPlan([range(6)], 2, 0)
    with batches(plan, loader, collate, start_step=0, num_steps=4, **how) as found:
        return list(found)


def test_a_video_in_memory_probes_and_decodes_as_its_file(tmp_path: Path) -> None:
    for path in (
        clips.write_clip(tmp_path / "a.mp4"),
        clips.write_clip(tmp_path / "b.mkv", b_frames=0),
        clips.write_mp4v(tmp_path / "c.avi", 30),
        clips.write_rotated(tmp_path / "d.mp4", 90),
    ):
        video = Encoded("memory", path.read_bytes())
        assert probe(video) == probe(path)
        np.testing.assert_array_equal(
            decode(video, FrameSampling()).frames, decode(path, FrameSampling()).frames
        )


@pytest.mark.parametrize("how", [{"threads": 2}, {"threads": 1, "workers": 1}])
def test_every_source_trains_alike(
    root: Path, packed: Path, tmp_path: Path, how: dict[str, int]
) -> None:
    reference = plain(root)
    expected = steps(reference, threads=0, prefetch=0)
    stage = Stage(tmp_path / "stage", 1 << 30)
    for source in (
        opened(str(packed), "."),
        opened(packed.as_uri(), ".", stage),
        opened((root / "train.jsonl").as_uri(), root.as_uri(), stage),
    ):
        assert source.records == reference.records
        findings = source.clips.probe(source.records, 2)
        for name, found in reference.clips.probe(reference.records, 2).items():
            other = findings[name]
            if isinstance(found, Probe):
                assert other == found
            else:
                assert isinstance(other, VideoError) and other.kind == found.kind == "unreadable"
        if isinstance(source.clips, PackedClips) and how.get("workers"):
            assert {video for video in source.clips.places} == set(VIDEOS)
        for batch, wanted in zip(steps(source, **how), expected, strict=True):
            assert batch.items == wanted.items
            assert [f.item for f in batch.failures] == [f.item for f in wanted.failures]
            for a, b in zip(batch.prompts, wanted.prompts, strict=True):
                np.testing.assert_array_equal(a, b)


def test_packed_clips_are_the_files_byte_for_byte(root: Path, packed: Path) -> None:
    source = opened(str(packed), ".")
    for video in VIDEOS:
        found = source.clips.fetch(video)
        assert isinstance(found, Encoded) and found.data == (root / video).read_bytes()


def test_a_staged_clip_needs_the_bucket_no_more_and_a_changed_one_is_read_again(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = Stage(tmp_path / "stage", 1 << 30)
    manifest = str(root / "train.jsonl")
    source = opened(manifest, root.as_uri(), stage)
    source.clips.probe(source.records, 2)
    with monkeypatch.context() as patch:
        patch.setattr("data.sources.read", lambda *_: pytest.fail("read from the bucket"))
        again = opened(manifest, root.as_uri(), stage)
        again.clips.probe(again.records, 2)  # a resumed run
        assert isinstance(again.clips.fetch("a.mp4"), Encoded)
    clips.write_clip(root / "a.mp4", 44)
    found = opened(manifest, root.as_uri(), stage).clips.fetch("a.mp4")
    assert isinstance(found, Encoded) and found.data == (root / "a.mp4").read_bytes()
    (root / "a.mp4").unlink()
    with pytest.raises(VideoError, match="no such object"):
        opened(manifest, root.as_uri(), stage).clips.fetch("a.mp4")


def test_a_staged_shard_that_is_damaged_is_fetched_again(packed: Path, tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", 1 << 30)
    source = opened(packed.as_uri(), ".", stage)
    assert isinstance(source.clips, PackedClips)
    place = source.clips.places["a.mp4"]
    copy = source.clips.folder / place.shard
    damaged = bytearray(copy.read_bytes())
    damaged[100] ^= 1
    copy.write_bytes(damaged)
    found = source.clips.fetch("a.mp4")
    assert isinstance(found, Encoded) and len(found.data) == place.bytes
    assert copy.read_bytes() == (packed / place.shard).read_bytes()


def test_a_damaged_shard_of_a_folder_is_a_bad_video(packed: Path) -> None:
    source = opened(str(packed), ".")
    assert isinstance(source.clips, PackedClips)
    shard = packed / source.clips.places["a.mp4"].shard
    damaged = bytearray(shard.read_bytes())
    damaged[100] ^= 1
    shard.write_bytes(damaged)
    with pytest.raises(VideoError, match="is damaged"):
        source.clips.fetch("a.mp4")


@pytest.mark.parametrize("name", ["dataset_info.json", "features.json"])
@pytest.mark.parametrize("content", [None, "{", "[]", "{}"])
def test_a_packed_dataset_that_tfds_cannot_open_is_refused_at_the_start(
    packed: Path, name: str, content: str | None
) -> None:
    (packed / name).unlink()
    if content is not None:
        (packed / name).write_text(content)
    with pytest.raises(ManifestError, match="dataset_info.json.*copy the folder again"):
        opened(str(packed), ".")


@pytest.mark.parametrize(("key", "value"), [("clip", "0"), ("shard", None), ("bytes", 1.5)])
def test_a_place_that_is_none_is_refused_at_the_start(
    packed: Path, key: str, value: object
) -> None:
    rows = [json.loads(line) for line in (packed / RECORDS).read_text().splitlines()]
    for row in rows:
        row["packed"] |= {key: value}
    (packed / RECORDS).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ManifestError, match="record '0' has no valid field 'packed'"):
        opened(str(packed), ".")


def test_what_is_wrong_with_a_packed_dataset_is_said(packed: Path, tmp_path: Path) -> None:
    url = packed.as_uri()
    with pytest.raises(StorageError, match="set data.stage to a local folder"):
        opened(url, ".")
    with pytest.raises(StorageError, match="needs 0.00 GiB in data.stage .* raise data.stage_gib"):
        opened(url, ".", Stage(tmp_path / "stage", 1000))
    with pytest.raises(StorageError, match="found no files; check the bucket"):
        opened(f"{url}/none", ".", Stage(tmp_path / "stage", 1000))
    with pytest.raises(ManifestError, match="folder without records.jsonl"):
        opened(str(tmp_path), ".")
    next(packed.glob("*array_record*")).unlink()
    with pytest.raises(ManifestError, match="the shard .* is missing"):
        opened(str(packed), ".")
    rows = [json.loads(line) for line in (packed / RECORDS).read_text().splitlines()]
    del rows[1]["packed"]
    (packed / RECORDS).write_text("\n".join(map(json.dumps, rows)))
    with pytest.raises(ManifestError, match="record '1' has no valid field 'packed'"):
        opened(str(packed), ".")
