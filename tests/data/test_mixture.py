"""Several manifests as one: records in a row, videos of their own roots, ids that stay apart."""

from __future__ import annotations

import pickle
from pathlib import Path

import pytest

from data.mixture import Member, MixtureError, mix
from data.probe import VideoError
from data.records import Record, write_manifest
from data.sources import Source, open_source


def source(folder: Path, *ids: str) -> Source:
    """Questions about FOLDER/videos/ID.mp4, whose bytes are FOLDER's name and the id."""
    (folder / "videos" / "sub").mkdir(parents=True)
    records = []
    for name in ids:
        video = f"sub/{name.replace('/', '-')}.mp4"
        (folder / "videos" / video).write_text(f"{folder.name} {name}")
        records.append(Record(name, video, "tvg", "When?", (), None, ((0.0, 1.0),), None))
    write_manifest(folder / "m.jsonl", records)
    return open_source(str(folder / "m.jsonl"), str(folder / "videos"), None, 1, print)


def test_each_record_keeps_its_own_root(tmp_path: Path) -> None:
    first, second = source(tmp_path / "a", "1", "2"), source(tmp_path / "b", "3", "1")
    mixed = mix([Member("a.jsonl", first), Member("b.jsonl", second, "b/")])
    assert [record.id for record in mixed.records] == ["1", "2", "b/3", "b/1"]
    clips = pickle.loads(pickle.dumps(mixed.clips))
    found = [Path(clips.fetch(record.video)).read_text() for record in mixed.records]
    assert found == ["a 1", "a 2", "b 3", "b 1"]
    videos = [record.video for record in mixed.records]
    assert [clips.manifest(video) for video in videos] == ["a.jsonl"] * 2 + ["b.jsonl"] * 2
    assert clips.name(videos[3]) == str(tmp_path / "b" / "videos" / "sub" / "1.mp4")
    assert len(set(videos)) == 4


def test_findings_and_identities_come_from_the_part_and_go_by_id(tmp_path: Path) -> None:
    first, second = source(tmp_path / "a", "1"), source(tmp_path / "b", "long id")
    (tmp_path / "b" / "videos" / "sub" / "long id.mp4").unlink()
    mixed = mix([Member("a.jsonl", first), Member("b.jsonl", second)])
    findings = mixed.clips.probe(mixed.records, 2)
    assert {
        name: found.kind for name, found in findings.items() if isinstance(found, VideoError)
    } == {
        "1": "unreadable",
        "long id": "missing",
    }
    assert str(findings["long id"]).startswith(str(tmp_path / "b"))
    identities = mixed.clips.identities([record.video for record in mixed.records], 1)
    assert [identity.size for identity in identities.values()] == [3]
    assert list(identities) == [mixed.records[0].video]


def test_one_manifest_alone_is_itself(tmp_path: Path) -> None:
    alone = source(tmp_path / "a", "1")
    assert mix([Member("a.jsonl", alone)]) == alone
    assert mix([Member("a.jsonl", alone, "x/")]).records[0].id == "x/1"


@pytest.mark.parametrize("prefix", ["", "b/"])
def test_ids_that_collide_name_both_manifests(prefix: str, tmp_path: Path) -> None:
    first, second = source(tmp_path / "a", "b/1", "1"), source(tmp_path / "b", "1")
    with pytest.raises(MixtureError) as caught:
        mix([Member("a.jsonl", first), Member("b.jsonl", second, prefix)])
    message = str(caught.value)
    assert f"the id {prefix + '1'!r} is in two" in message
    assert "b.jsonl and a.jsonl" in message and "give one of them a prefix" in message
