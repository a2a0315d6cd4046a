"""The manifest of a checkpoint; `test_checkpoint.py` shows what a run does with its verdicts."""

import hashlib
import itertools
import os
from pathlib import Path

import pytest
from etils import epath

from jaxgrpo import manifest
from jaxgrpo.manifest import MANIFEST, Verdict

FILES = {"config/metadata": b"{}", "state/d/0": b"weights", "state/empty": b"", "step": b"12"}
SOUND = Verdict(manifest=True, hashed=True, damage=[])


@pytest.fixture
def folder(tmp_path: Path) -> epath.Path:
    for name, content in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return epath.Path(tmp_path)


def replace(path: epath.Path, content: bytes) -> None:
    """Other bytes, and a later time of change however coarse the file system's clock is."""
    later = os.stat(path).st_mtime_ns + 10**9
    path.write_bytes(content)
    os.utime(path, ns=(later, later))


def test_it_lists_every_file_and_ends_with_its_own_hash(folder: epath.Path) -> None:
    assert manifest.write(folder, limit=1e9)
    *lines, last = (folder / MANIFEST).read_text().splitlines(keepends=True)
    assert lines == [
        f"{hashlib.sha256(content).hexdigest()} {len(content)} {name}\n"
        for name, content in FILES.items()
    ]
    assert last == hashlib.sha256("".join(lines).encode()).hexdigest() + "\n"


def test_what_was_written_is_sound(folder: epath.Path) -> None:
    manifest.write(folder, limit=1e9)
    assert manifest.check(folder) == SOUND


def test_writing_again_leaves_the_manifest_itself_out(folder: epath.Path) -> None:
    manifest.write(folder, limit=1e9)
    first = (folder / MANIFEST).read_text()
    manifest.write(folder, limit=1e9)
    assert (folder / MANIFEST).read_text() == first
    assert {path.name for path in folder.iterdir()} == {"config", "state", "step", MANIFEST}


def test_a_flipped_bit_is_damage(folder: epath.Path) -> None:
    manifest.write(folder, limit=1e9)
    replace(folder / "state/d/0", b"weighty")
    assert manifest.check(folder).damage == [
        "state/d/0: other bytes than were written (SHA-256)",
    ]


def test_missing_and_cut_files_are_damage_each_by_name(folder: epath.Path) -> None:
    manifest.write(folder, limit=1e9)
    (folder / "step").unlink()
    (folder / "state/d/0").write_bytes(b"weig")
    assert manifest.check(folder).damage == [
        "state/d/0: 4 bytes, 7 when it was written",
        "step: missing",
    ]


@pytest.mark.parametrize("cut", [0, 1, 40, -65, -1])
def test_a_cut_manifest_is_damage(folder: epath.Path, cut: int) -> None:
    manifest.write(folder, limit=1e9)
    path = folder / MANIFEST
    path.write_bytes(path.read_bytes()[:cut])
    verdict = manifest.check(folder)
    assert verdict.manifest
    assert verdict.damage == ["manifest: does not end with the hash of its lines"]


def test_a_folder_without_one_is_no_damage_but_said(folder: epath.Path) -> None:
    assert manifest.check(folder) == Verdict(manifest=False, hashed=False, damage=[])


def test_above_the_limit_only_sizes_are_taken(folder: epath.Path) -> None:
    size = sum(map(len, FILES.values()))
    assert manifest.write(folder, limit=size)
    assert not manifest.write(folder, limit=size - 1)
    assert manifest.check(folder) == SOUND._replace(hashed=False)
    replace(folder / "state/d/0", b"weighty")  # as long as before
    assert manifest.check(folder).damage == []
    replace(folder / "state/d/0", b"weight")
    assert manifest.check(folder).damage == ["state/d/0: 6 bytes, 7 when it was written"]


def test_only_the_files_below_a_name_are_looked_at(folder: epath.Path) -> None:
    manifest.write(folder, limit=1e9)
    (folder / "step").unlink()
    assert manifest.check(folder, below="state/") == SOUND
    assert manifest.check(folder, below="step").damage == ["step: missing"]


def test_the_shares_of_the_hosts_cover_every_file_once(folder: epath.Path) -> None:
    manifest.write(folder, limit=1e9)
    for name in FILES:
        (folder / name).unlink()
    shares = [manifest.check(folder, share=(i, 3)).damage for i in range(3)]
    assert sorted(itertools.chain(*shares)) == sorted(f"{name}: missing" for name in FILES)
    assert [len(share) for share in shares] == [2, 1, 1]
