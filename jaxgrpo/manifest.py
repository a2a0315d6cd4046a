"""The manifest of a checkpoint: the size and SHA-256 of every file, to notice damage.

Orbax restores an array file with a flipped bit as if nothing were wrong. `STEP/manifest` has a line
`SHA256 SIZE NAME` per file, with `-` for a hash that was not taken, and ends with the SHA-256 of
the lines above it.
"""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

from etils import epath

from data.storage import is_url

MANIFEST = "manifest"

_THREADS = 8
_CHUNK = 1 << 24  # bytes


class Verdict(NamedTuple):
    """What `check` found.

    Attributes:
      manifest: whether there is one.
      hashed: whether it has hashes, not only sizes.
      damage: a line per damaged file, which names it.
    """

    manifest: bool
    hashed: bool
    damage: list[str]


def write(folder: epath.Path, limit: float) -> bool:
    """Writes the manifest of a complete folder.

    Args:
      limit: bytes of all files together, above which only sizes are taken.

    Returns:
      Whether hashes were taken.
    """
    sizes = {name: int((folder / name).stat().length) for name in _names(folder)}
    hashed = sum(sizes.values()) <= limit
    hashes = _hashes(folder, list(sizes)) if hashed else ["-"] * len(sizes)
    lines = [f"{hash_} {sizes[name]} {name}\n" for name, hash_ in zip(sizes, hashes, strict=True)]
    body = "".join(lines)
    text = f"{body}{hashlib.sha256(body.encode()).hexdigest()}\n"
    if is_url(folder):  # where a file is there as a whole or not at all
        (folder / MANIFEST).write_text(text)
    else:
        scratch = folder / f".{MANIFEST}"
        scratch.write_text(text)
        scratch.replace(folder / MANIFEST)
    return hashed


def check(folder: epath.Path, below: str = "", share: tuple[int, int] = (0, 1)) -> Verdict:
    """Compares the files of a folder with its manifest.

    Args:
      below: only files whose name starts so are looked at.
      share: (i, n), to look at every n-th file from the i-th on.
    """
    try:
        data = (folder / MANIFEST).read_bytes()
    except FileNotFoundError:
        return Verdict(False, False, [])
    body = data[: data[:-1].rfind(b"\n") + 1]
    if data != body + hashlib.sha256(body).hexdigest().encode() + b"\n":
        return Verdict(True, False, [f"{MANIFEST}: does not end with the hash of its lines"])
    entries = [line.split(" ", 2) for line in body.decode().splitlines()]
    mine = [entry for entry in entries if entry[2].startswith(below)][share[0] :: share[1]]
    damage, same_size = [], []
    for expected, size, name in mine:
        if not (folder / name).exists():
            damage.append(f"{name}: missing")
        elif (found := (folder / name).stat().length) != int(size):
            damage.append(f"{name}: {found} bytes, {size} when it was written")
        elif expected != "-":
            same_size.append((name, expected))
    hashes = _hashes(folder, [name for name, _ in same_size])
    for (name, expected), found in zip(same_size, hashes, strict=True):
        if found != expected:
            damage.append(f"{name}: other bytes than were written (SHA-256)")
    return Verdict(True, all(entry[0] != "-" for entry in entries), damage)


def _names(folder: epath.Path, prefix: str = "") -> Iterator[str]:
    """The files below a folder, but for the manifest itself, in order."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            yield from _names(path, f"{prefix}{path.name}/")
        elif prefix or path.name not in (MANIFEST, f".{MANIFEST}"):
            yield prefix + path.name


def _hashes(folder: epath.Path, names: list[str]) -> list[str]:
    def one(name: str) -> str:
        path = folder / name
        if is_url(path):
            return _sha256(str(path), path.stat().mtime)
        return _sha256(str(path), os.stat(path).st_mtime_ns)

    with ThreadPoolExecutor(_THREADS) as pool:  # hashing does not hold Python's lock
        return list(pool.map(one, names))


@functools.lru_cache(maxsize=1 << 14)
def _sha256(path: str, modified: float) -> str:
    """Of a file, read once in a process: a start asks for a checkpoint several times."""
    digest = hashlib.sha256()
    with epath.Path(path).open("rb") as file:
        while chunk := file.read(_CHUNK):
            digest.update(chunk)
    return digest.hexdigest()
