"""The stage: keeps what it admits, under its bound, and serves nothing that is stale or damaged."""

from __future__ import annotations

import logging
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from data import staging
from data.staging import Stage
from data.storage import Identity, StorageError, list_files

OLD, NEW = Identity(4, "1"), Identity(4, "2")


@pytest.fixture
def stage(tmp_path: Path) -> Stage:
    staging._warn_once.cache_clear()
    stage = Stage(tmp_path / "stage", limit=10)
    stage.recount()
    return stage


def clip_files(stage: Stage) -> list[Path]:
    return sorted((stage.folder / "clips").glob("*/*"))


def test_a_clip_is_served_as_it_was_put(stage: Stage) -> None:
    assert stage.get("gs://b/a", OLD) is None
    assert stage.put("gs://b/a", OLD, b"0123")
    assert stage.get("gs://b/a", OLD) == b"0123"
    assert stage.get("gs://b/other", OLD) is None


def test_when_it_is_full_what_is_there_stays(
    stage: Stage, caplog: pytest.LogCaptureFixture
) -> None:
    assert stage.put("a", OLD, b"0123") and stage.put("b", OLD, b"0123")
    with caplog.at_level(logging.WARNING):
        assert not stage.put("c", OLD, b"0123")
        assert not stage.put("d", OLD, b"0123")
    (record,) = caplog.records  # said once
    assert f"{stage.folder} is full" in record.getMessage()
    assert "further clips are streamed; raise data.stage_gib" in record.getMessage()
    assert stage.get("a", OLD) == stage.get("b", OLD) == b"0123"
    assert stage.get("c", OLD) is None
    assert stage.put("e", Identity(2, "1"), b"01")  # for which there is room


def test_an_older_version_is_not_served_and_makes_room_for_the_new(stage: Stage) -> None:
    stage.put("a", OLD, b"0123")
    assert stage.get("a", NEW) is None
    stage.put("a", NEW, b"4567")
    assert stage.get("a", NEW) == b"4567" and stage.get("a", OLD) is None
    assert len(clip_files(stage)) == 1
    assert stage.put("b", Identity(6, "1"), b"012345")  # 4 + 6 are 10


def test_a_new_version_without_room_leaves_the_room_of_the_old(stage: Stage) -> None:
    stage.put("a", OLD, b"0123") and stage.put("b", OLD, b"0123")
    assert not stage.put("a", Identity(9, "2"), b"012345678")
    assert stage.put("c", Identity(6, "1"), b"012345")  # 4 + 6 are 10


@pytest.mark.parametrize("damaged", [b"0124", b"012", b""])
def test_a_damaged_clip_is_removed_and_its_room_is_free_again(stage: Stage, damaged: bytes) -> None:
    stage.put("a", OLD, b"0123")
    clip_files(stage)[0].write_bytes(damaged)
    assert stage.get("a", OLD) is None
    assert clip_files(stage) == []
    assert stage.put("a", OLD, b"0123") and stage.get("a", OLD) == b"0123"


def test_what_a_kill_left_behind_is_never_served(stage: Stage) -> None:
    """Killed while it wrote: half a clip under the one name for all, and room counted for it."""
    (stage.folder / ".incoming").write_bytes(b"01")
    stage._set_used(10)
    assert stage.get("a", OLD) is None and not stage.put("a", OLD, b"0123")
    stage.recount()
    assert stage.put("a", OLD, b"0123") and stage.get("a", OLD) == b"0123"


def test_threads_that_put_at_once_keep_the_bound(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", limit=40)
    stage.recount()
    kept: list[bool] = []

    def put(number: int) -> None:
        kept.append(stage.put(f"clip {number}", OLD, b"0123"))

    threads = [threading.Thread(target=put, args=(number,)) for number in range(20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum(kept) == 10
    assert sum(path.stat().st_size for path in clip_files(stage)) == 40


def test_a_folder_that_cannot_be_made_is_an_error_at_the_start(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match=r"data.stage: .*file"):
        Stage(tmp_path / "file" / "stage", 10).recount()


def test_a_disk_that_fills_up_streams_with_one_warning(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(self: Path, data: bytes) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with caplog.at_level(logging.WARNING):
        assert not stage.put("a", OLD, b"0123") and not stage.put("b", OLD, b"0123")
    assert len(caplog.records) == 1 and "clips are streamed: No space left" in caplog.text


def test_a_disk_that_had_no_room_for_a_moment_costs_no_room(
    stage: Stage, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(self: Path, data: bytes) -> int:
        with open(self, "wb") as file:
            file.write(data[:2])
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "write_bytes", full)
        assert not stage.put("a", Identity(10, "1"), b"0123456789")
    assert not (stage.folder / ".incoming").exists()
    assert stage.put("a", Identity(10, "1"), b"0123456789")


def test_a_disk_that_cannot_be_read_streams_with_a_warning(
    stage: Stage, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(self: Path) -> bytes:
        raise OSError(5, "Input/output error")

    stage.put("gs://b/a", OLD, b"0123")
    monkeypatch.setattr(Path, "read_bytes", broken)
    with caplog.at_level(logging.WARNING):
        assert stage.get("gs://b/a", OLD) is None
    assert "clips are streamed: Input/output error" in caplog.text


# ---- processes ----

PUT = """
import sys
from pathlib import Path
from data.staging import Stage
from data.storage import Identity
stage = Stage(Path(sys.argv[1]), 40)
"""


def process(stage: Stage, code: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-c", PUT + code, str(stage.folder)]
    return subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_processes_that_put_the_same_clips_keep_them_once_and_the_bound(tmp_path: Path) -> None:
    stage = Stage(tmp_path / "stage", limit=40)
    stage.recount()
    code = """
for number in range(20):
    stage.put(f"clip {number}", Identity(4, "1"), b"%04d" % number)
"""
    both = [process(stage, code) for _ in range(2)]
    for each in both:
        each.communicate(timeout=300)
    assert [each.returncode for each in both] == [0, 0]
    assert len(clip_files(stage)) == 10
    served = [stage.get(f"clip {number}", Identity(4, "1")) for number in range(20)]
    assert len([data for data in served if data]) == 10
    assert all(data == b"%04d" % number for number, data in enumerate(served) if data)
    assert not stage.put("another", OLD, b"0123")


def test_a_process_killed_in_the_middle_of_a_write_serves_nothing_and_holds_no_lock(
    tmp_path: Path,
) -> None:
    stage = Stage(tmp_path / "stage", limit=40)
    stage.recount()
    code = """
def half(path, data):
    with open(path, "wb") as file:
        file.write(data[:2])
    print("half", flush=True)
    sys.stdin.read()
Path.write_bytes = half
stage.put("a", Identity(4, "1"), b"0123")
"""
    with process(stage, code) as writing:
        assert writing.stdout is not None and writing.stdout.readline() == "half\n"
        writing.kill()
    assert (stage.folder / ".incoming").read_bytes() == b"01"
    assert stage.get("a", OLD) is None and clip_files(stage) == []
    assert stage.put("a", OLD, b"0123") and stage.get("a", OLD) == b"0123"


# ---- packed datasets ----


@pytest.fixture
def packed(tmp_path: Path) -> str:
    folder = tmp_path / "data"
    folder.mkdir()
    (folder / "records.jsonl").write_bytes(b"{}\n")
    (folder / "a.array_record-0").write_bytes(b"012345")
    return folder.as_uri()


def test_a_packed_dataset_is_fetched_whole_and_once(stage: Stage, packed: str) -> None:
    said: list[str] = []
    files = list_files(packed)
    folder = stage.packed(packed, "data", files, 1, said.append)
    assert (folder / "a.array_record-0").read_bytes() == b"012345"
    assert stage.packed(packed, "data", files, 1, said.append) == folder and len(said) == 1
    assert not stage.put("a", OLD, b"0123")  # 9 of 10 bytes are taken
    stage.recount()
    assert not stage.put("a", OLD, b"0123")
    assert {path.name for path in folder.iterdir()} == {
        "records.jsonl",
        "a.array_record-0",
        ".bytes",
    }


def test_too_small_a_bound_says_what_is_needed(tmp_path: Path, packed: str) -> None:
    stage = Stage(tmp_path / "stage", limit=8)
    stage.recount()
    with pytest.raises(StorageError, match=r"file:.*/data needs .*: raise data.stage_gib"):
        stage.packed(packed, "data", list_files(packed), 1, print)
