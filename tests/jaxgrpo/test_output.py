"""Folders that commands make appear whole or not at all, and take nobody's place."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxgrpo.output import OutputError, check_free, new_directory


def test_a_directory_appears_at_the_end_of_the_block(tmp_path: Path) -> None:
    out = tmp_path / "a" / "b" / "out"
    with new_directory(out, "export") as folder:
        (folder / "file").write_text("whole")
        assert not out.exists()
    assert (out / "file").read_text() == "whole"
    assert [path.name for path in out.parent.iterdir()] == ["out"]


def test_an_empty_directory_is_taken_also_behind_a_link(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to("empty")
    with new_directory(tmp_path / "link", "export") as folder:
        (folder / "file").write_text("")
    assert (tmp_path / "empty" / "file").exists() and (tmp_path / "link").is_symlink()


def test_nothing_is_left_of_what_fails(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), new_directory(tmp_path / "out", "export") as folder:
        (folder / "half").write_text("")
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("taken", "found"),
    [("out/mine.txt", "exists and is not an empty directory"), ("out", "exists")],
)
def test_what_is_there_is_not_touched(tmp_path: Path, taken: str, found: str) -> None:
    (tmp_path / taken).parent.mkdir(exist_ok=True)
    (tmp_path / taken).write_text("mine")
    out = tmp_path / "out"
    with (
        pytest.raises(OutputError, match=f"{out} {found}: remove it"),
        new_directory(out, "export"),
    ):
        pytest.fail("the block was entered")
    assert (tmp_path / taken).read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_a_killed_command_left_is_named_and_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "out.partial").mkdir()
    (tmp_path / "out.partial" / "half").write_text("")
    message = "out.partial exists: another pack to .*out is running, or one was killed"
    with pytest.raises(OutputError, match=message), new_directory(tmp_path / "out", "pack"):
        pytest.fail("the block was entered")
    assert (tmp_path / "out.partial" / "half").exists()
    assert not (tmp_path / "out").exists()


def test_a_bucket_is_refused() -> None:
    with pytest.raises(OutputError, match="gs://bucket/out: write to a local folder, then copy"):
        check_free("gs://bucket/out")
