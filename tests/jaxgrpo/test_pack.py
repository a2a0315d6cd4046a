"""`jaxgrpo pack`: manifests and clips become a folder that trains the same."""

from __future__ import annotations

from pathlib import Path

import pytest

from data.packing import PackError
from data.sources import open_source
from jaxgrpo import cli, pack
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


def packed(place: Workplace, out: Path | str, *overrides: str) -> int:
    return cli.main(["pack", str(place.config), str(out), "run_dir=unused", *overrides])


def test_both_manifests_are_packed_and_what_is_left_out_is_named(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    assert packed(place, out, *tiny_run.mixed(place)) == 0
    printed = capsys.readouterr().out
    assert f"wrote {out}" in printed
    assert f"data.train={out / 'train'} data.eval={out / 'eval'}" in printed
    assert "1 rows whose clip cannot be read" in printed and tiny_run.NOTES in printed
    for split in ("train", "eval"):
        manifest = place.clips / tiny_run.MIXED[split]
        plain = open_source(str(manifest), str(place.clips), None, 2, print)
        again = open_source(str(out / split), ".", None, 2, print)
        assert again.records == plain.records
        findings, expected = (x.clips.probe(x.records, 2) for x in (again, plain))
        assert [type(findings[name]) for name in expected] == [type(x) for x in expected.values()]
    assert {path.name for path in tmp_path.iterdir()} == {"packed"}


def test_nothing_is_left_where_packing_fails(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*arguments: object) -> None:
        raise PackError("no more room")

    monkeypatch.setattr(pack, "pack", fail)
    assert packed(place, tmp_path / "packed") == 2
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_taken_is_refused(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mine.txt").write_text("mine")
    assert packed(place, tmp_path) == 2
    assert "exists and is not an empty directory" in capsys.readouterr().err
    assert packed(place, "gs://bucket/packed") == 2
    assert "write to a local folder, then copy that" in capsys.readouterr().err


def test_another_pack_or_a_killed_one_is_told_apart_from_a_result(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "packed.partial").mkdir()
    assert packed(place, tmp_path / "packed") == 2
    assert "another pack to" in capsys.readouterr().err
