"""`jaxgrpo pack`: manifests and clips become a folder that trains the same."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from data.packing import PackError
from data.sources import open_source
from jaxgrpo import cli, pack
from jaxgrpo.mixture import open_manifests
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
    def fail(*arguments: object, clips: bool) -> None:
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


def test_without_clips_the_rows_train_from_the_root(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "packed"
    assert packed(place, out, "data.eval=''", "--without-clips") == 0
    assert f"data.train={out / 'train'}" in capsys.readouterr().out
    plain = open_source(str(place.clips / "train.jsonl"), str(place.clips), None, 2, print)
    again = open_source(str(out / "train"), str(place.clips), None, 2, print)
    assert again.records == plain.records
    assert again.clips.probe(again.records, 2) == plain.clips.probe(plain.records, 2)
    video = plain.records[0].video
    assert again.clips.fetch(video) == place.clips / video


def test_of_a_mixture_each_manifest_is_packed_and_the_next_command_keeps_the_weights(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    parts = [{"manifest": str(place.clips / "train.jsonl"), "weight": 2.0}]
    parts.append({"manifest": str(place.clips / "eval.jsonl"), "prefix": "e/"})
    mixture = f"data.mixture={json.dumps(parts)}"
    out = tmp_path / "packed"
    assert packed(place, out, "data.train=''", "data.eval=''", mixture) == 0
    assert {path.name for path in out.iterdir()} == {"train-0", "train-1"}
    [told] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("next:")]
    override = told.split("'")[1]
    before = tiny_run.load_config(place, "data.train=''", mixture).data
    after = tiny_run.load_config(place, "data.train=''", override).data
    assert [part.weight for part in after.mixture] == [2.0, 1.0]
    opened, plain = (open_manifests(data.mixture, data, None, print) for data in (after, before))
    assert opened.source.records == plain.source.records and opened.weights == plain.weights
