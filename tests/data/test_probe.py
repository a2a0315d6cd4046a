"""Probing: cheap, by kind of fault, and remembered."""

from __future__ import annotations

import dataclasses
import os
import threading
from pathlib import Path

import pytest

import data.probe
from data.probe import Probe, VideoError, probe, probe_all
from data.records import Record
from data.sources import FolderClips
from tests.data import clips


def record(name: str, video: str) -> Record:
    return Record(name, video, "tvg", "A door opens", (), None, ((0.0, 1.0),), None, None)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the files that were really looked at."""
    names: list[str] = []

    def counting(path: Path, timeout: float) -> Probe:
        names.append(Path(path).name)
        return probe(path, timeout)

    monkeypatch.setattr(data.probe, "probe", counting)
    return names


@pytest.mark.parametrize("codec", ["mp4v", "h264"])
def test_a_probe_is_what_the_file_claims(tmp_path: Path, codec: str) -> None:
    path = tmp_path / "clip.mp4"
    if codec == "mp4v":
        clips.write_mp4v(path, 30)
    else:
        clips.write_clip(path, 30)
    assert probe(path) == Probe(30, 25.0, clips.WIDTH, clips.HEIGHT, 1.2)


def test_a_rotated_file_is_probed_upright(tmp_path: Path) -> None:
    claims = probe(clips.write_rotated(tmp_path / "clip.mp4", 90))
    assert (claims.width, claims.height) == (clips.HEIGHT, clips.WIDTH)


def test_a_file_whose_end_is_missing_probes_well(tmp_path: Path) -> None:
    assert probe(clips.write_cut(tmp_path / "clip.mp4")).frames == 250


def test_a_file_whose_frames_are_all_missing_is_refused(tmp_path: Path) -> None:
    path = clips.write_cut(tmp_path / "clip.mp4")
    data = path.read_bytes()
    path.write_bytes(data[: data.find(b"mdat") + 10])
    with pytest.raises(VideoError) as caught:
        probe(path)
    assert caught.value.kind in ("first_frame", "unreadable")


def test_faults_are_told_apart(tmp_path: Path) -> None:
    (tmp_path / "empty.mp4").touch()
    (tmp_path / "text.mp4").write_text("not a video\n" * 100)
    clips.write_png(tmp_path / "picture.mp4")
    clips.write_audio(tmp_path / "sound.mp4")
    videos = ["none.mp4", "empty.mp4", "text.mp4", "picture.mp4", "sound.mp4"]
    found = probe_all([record(v, v) for v in videos], FolderClips(str(tmp_path)), 2, None)
    kinds = ["missing", "empty", "unreadable", "frame_count", "unreadable"]
    for video, kind in zip(videos, kinds, strict=True):
        error = found[video]
        assert isinstance(error, VideoError)
        assert error.kind == kind and str(tmp_path / video) in error.message


def test_records_that_share_a_video_share_its_probe(tmp_path: Path, opened: list[str]) -> None:
    clips.write_mp4v(tmp_path / "a.mp4", 10)
    found = probe_all(
        [record(str(i), "a.mp4") for i in range(5)], FolderClips(str(tmp_path)), 4, None
    )
    assert [found[str(i)] for i in range(5)] == [probe(tmp_path / "a.mp4")] * 5
    assert opened == ["a.mp4"]


def test_a_second_run_opens_nothing_and_finds_the_same(tmp_path: Path, opened: list[str]) -> None:
    clips.write_mp4v(tmp_path / "good.mp4", 10)
    (tmp_path / "bad.mp4").write_text("no video")
    records = [record("1", "good.mp4"), record("2", "bad.mp4")]
    cache = tmp_path / "cache" / "probes.json"
    first = probe_all(records, FolderClips(str(tmp_path)), 2, cache)
    del opened[:]
    second = probe_all(records, FolderClips(str(tmp_path)), 2, cache)
    assert opened == []
    assert second["1"] == first["1"]
    for found in (first["2"], second["2"]):
        assert isinstance(found, VideoError)
        assert found.kind == "unreadable"
        assert found.message == f"{tmp_path / 'bad.mp4'}: OpenCV finds no video stream in it"


def test_a_changed_file_is_looked_at_again(tmp_path: Path, opened: list[str]) -> None:
    path = clips.write_mp4v(tmp_path / "a.mp4", 10)
    records, cache = [record("1", "a.mp4")], tmp_path / "probes.json"
    probe_all(records, FolderClips(str(tmp_path)), 1, cache)
    clips.write_mp4v(path, 20)
    found = probe_all(records, FolderClips(str(tmp_path)), 1, cache)["1"]
    assert isinstance(found, Probe) and found.frames == 20
    os.utime(path, ns=(1, 1))  # same size, another time
    probe_all(records, FolderClips(str(tmp_path)), 1, cache)
    assert opened == ["a.mp4"] * 3


def test_a_missing_file_is_looked_for_again(tmp_path: Path) -> None:
    records, cache = [record("1", "a.mp4")], tmp_path / "probes.json"
    assert isinstance(probe_all(records, FolderClips(str(tmp_path)), 1, cache)["1"], VideoError)
    clips.write_mp4v(tmp_path / "a.mp4", 10)
    assert isinstance(probe_all(records, FolderClips(str(tmp_path)), 1, cache)["1"], Probe)


def test_a_probe_that_hung_is_made_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clips.write_mp4v(tmp_path / "a.mp4", 10)
    release = threading.Event()

    def hang(video: Path) -> Probe:
        release.wait(30)
        raise AssertionError("nobody waits for this")

    records, cache = [record("1", "a.mp4")], tmp_path / "probes.json"
    with monkeypatch.context() as patch:
        patch.setattr(data.probe, "_probe", hang)
        error = probe_all(records, FolderClips(str(tmp_path)), 1, cache, timeout=0.2)["1"]
    release.set()
    assert isinstance(error, VideoError) and error.kind == "timeout"
    assert "data.timeout sets the limit" in error.message
    assert isinstance(probe_all(records, FolderClips(str(tmp_path)), 1, cache)["1"], Probe)


def test_two_manifests_may_share_a_cache(tmp_path: Path, opened: list[str]) -> None:
    cache = tmp_path / "probes.json"
    for name in ("a.mp4", "b.mp4", "a.mp4", "b.mp4"):
        if not (tmp_path / name).exists():
            clips.write_mp4v(tmp_path / name, 10)
        probe_all([record(name, name)], FolderClips(str(tmp_path)), 1, cache)
    assert opened == ["a.mp4", "b.mp4"]


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"version": 0, "files": {}}', '{"version": 2, "files": {"a": 3}}']
)
def test_a_damaged_cache_is_rebuilt_with_a_warning(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture, opened: list[str]
) -> None:
    clips.write_mp4v(tmp_path / "a.mp4", 10)
    cache = tmp_path / "probes.json"
    cache.write_text(content)
    for _ in range(2):
        found = probe_all([record("1", "a.mp4")], FolderClips(str(tmp_path)), 1, cache)["1"]
        assert found == Probe(10, 25.0, clips.WIDTH, clips.HEIGHT, 0.4)
    assert "probing all videos again" in caplog.text
    assert opened == ["a.mp4"]


def test_a_cache_that_cannot_be_written_is_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As in a read-only data root. (Tests may run as root, who may write anywhere: a file is there
    where the cache's folder would be.)"""
    clips.write_mp4v(tmp_path / "a.mp4", 10)
    (tmp_path / "taken").touch()
    cache = tmp_path / "taken" / "probes.json"
    found = probe_all([record("1", "a.mp4")], FolderClips(str(tmp_path)), 1, cache)["1"]
    assert isinstance(found, Probe)
    assert f"{cache}: the next run probes all videos again" in caplog.text


def test_every_fact_of_a_probe_is_cached(tmp_path: Path) -> None:
    clips.write_mp4v(tmp_path / "a.mp4", 10, fps=24000 / 1001)
    records, cache = [record("1", "a.mp4")], tmp_path / "probes.json"
    first = probe_all(records, FolderClips(str(tmp_path)), 1, cache)["1"]
    second = probe_all(records, FolderClips(str(tmp_path)), 1, cache)["1"]
    assert isinstance(first, Probe) and isinstance(second, Probe)
    assert dataclasses.asdict(first) == dataclasses.asdict(second)
