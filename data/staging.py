"""The stage: a local folder that keeps what was fetched from buckets, under a bound.

What it admits it keeps: a store of the most recently used that is smaller than an epoch would throw
every clip away before its next use. When it is full, further clips are streamed. Threads, processes
and runs may share one; a process killed at any moment leaves nothing that would be served wrongly.

    FOLDER/clips/3f/KEY-VERSION-CRC   a clip; digests of its address and version, and its CRC-32
    FOLDER/packed/NAME-KEY/           a packed dataset (`data.sources`)
    FOLDER/probes/KEY.json            what the videos of a bucket claim (`data.probe`)

`data.frames` keeps decoded frames in the same way.
"""

from __future__ import annotations

import functools
import logging
import os
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Final

from data.storage import Identity, StorageError, digest, gib, locked, mirror

_log = logging.getLogger(__name__)

_USED: Final = ".used"  # bytes admitted, written before they are
_RESERVED: Final = ".bytes"  # of a packed dataset, all of its files


@dataclass(frozen=True)
class Pins:
    """A folder, its bound in bytes, and the files in it. It passes between processes."""

    folder: Path
    limit: int

    setting: ClassVar[str]  # the config key of the folder; with "_gib", of the bound
    files: ClassVar[str]  # the folder in it
    otherwise: ClassVar[str]  # what happens to what it does not hold

    def recount(self) -> None:
        """Counts what the folder holds; once at the start of a run, against drift.

        Raises:
          StorageError: the folder cannot be written.
        """
        try:
            with locked(self.folder / ".lock"):
                self._set_used(self._count())
        except OSError as error:
            raise StorageError(
                f"{self.setting}: {self.folder}: {error.strerror or error}"
            ) from error

    def read(self, key: str, version: str) -> bytes | None:
        """A file, if it is here and undamaged; what is damaged is removed."""
        for path in self._of(key):
            _, its_version, crc = path.name.split("-")
            if its_version != version:
                continue
            try:
                data = path.read_bytes()
                if f"{zlib.crc32(data):08x}" == crc:
                    return data
                _log.warning("%s is damaged and is made again", path)
                self._remove(path)
            except FileNotFoundError:
                continue  # removed meanwhile
            except OSError as error:  # a disk that fails, a folder that is read-only
                _warn_once(f"{self.setting}: {path}: {self.otherwise}: {error.strerror}")
        return None

    def write(self, key: str, version: str, data: bytes) -> bool:
        """Keeps a file, in the place of older versions of it; False where there is no room."""
        place = self.folder / self.files / key[:2] / f"{key}-{version}-{zlib.crc32(data):08x}"
        try:
            with locked(self.folder / ".lock"):
                if place.exists():
                    return True
                used = self._used() - sum(map(_remove, self._of(key)))
                if used + len(data) > self.limit:
                    self._set_used(used)
                    _warn_once(
                        f"{self.setting}: {self.folder} is full, it may hold {gib(self.limit)}: "
                        f"further {self.otherwise}; raise {self.setting}_gib, or empty the folder "
                        "if it holds other data"
                    )
                    return False
                self._set_used(used + len(data))
                # One name for all: who finds it while holding the lock finds what a kill left.
                scratch = self.folder / ".incoming"
                try:
                    scratch.write_bytes(data)
                    place.parent.mkdir(parents=True, exist_ok=True)
                    os.replace(scratch, place)
                except OSError:
                    scratch.unlink(missing_ok=True)
                    self._set_used(used)
                    raise
        except OSError as error:
            _warn_once(f"{self.setting}: {self.folder}: {self.otherwise}: {error.strerror}")
            return False
        return True

    def _count(self) -> int:
        """The bytes that the folder holds."""
        return sum(path.stat().st_size for path in (self.folder / self.files).glob("*/*"))

    def _of(self, key: str) -> list[Path]:
        """All versions of a file that are here: one, but for a moment."""
        try:
            with os.scandir(self.folder / self.files / key[:2]) as entries:
                return [Path(entry.path) for entry in entries if entry.name.startswith(key)]
        except FileNotFoundError:
            return []

    def _remove(self, path: Path) -> None:
        with locked(self.folder / ".lock"):
            self._set_used(self._used() - _remove(path))

    def _used(self) -> int:
        try:
            return int((self.folder / _USED).read_text())
        except FileNotFoundError:
            return 0

    def _set_used(self, used: int) -> None:
        _replace(self.folder / _USED, str(used))


class Stage(Pins):
    """The local copies of what is in buckets."""

    setting = "data.stage"
    files = "clips"
    otherwise = "clips are streamed"

    def get(self, url: str, identity: Identity) -> bytes | None:
        """The bytes of a clip, if they are here and undamaged."""
        data = self.read(digest(url), digest(identity.version))
        return data if data is not None and len(data) == identity.size else None

    def put(self, url: str, identity: Identity, data: bytes) -> bool:
        """Keeps a clip, in the place of older versions of it; False where there is no room."""
        return self.write(digest(url), digest(identity.version), data)

    def _count(self) -> int:
        packed = (self.folder / "packed").glob(f"*/{_RESERVED}")
        return super()._count() + sum(int(path.read_text()) for path in packed)

    def packed(
        self,
        url: str,
        name: str,
        files: Mapping[str, Identity],
        threads: int,
        say: Callable[[str], None],
    ) -> Path:
        """The local copy of a packed dataset, complete; `say` is told when files are missing.

        Raises:
          StorageError: it does not fit under the bound, or as `data.storage.mirror`.
        """
        folder = self.folder / "packed" / f"{name}-{digest(url, *sorted(files.items()))}"
        need = sum(identity.size for identity in files.values())
        try:
            with locked(self.folder / ".lock"):
                reserved = folder / _RESERVED
                if not reserved.exists():
                    used = self._used()
                    if used + need > self.limit:
                        raise StorageError(
                            f"{url} needs {gib(need)} in data.stage ({self.folder}), which may "
                            f"hold data.stage_gib = {self.limit / (1 << 30):g} and holds "
                            f"{gib(used)}: raise data.stage_gib, or empty the folder"
                        )
                    self._set_used(used + need)
                    folder.mkdir(parents=True, exist_ok=True)
                    _replace(reserved, str(need))
        except OSError as error:
            raise StorageError(f"data.stage: {self.folder}: {error.strerror or error}") from error
        mirror(url, files, folder, threads, say)
        return folder


@functools.cache
def _warn_once(message: str) -> None:
    _log.warning(message)


def _replace(path: Path, text: str) -> None:
    """Writes a file, whole or not at all, by the holder of the lock."""
    scratch = path.with_name(f"{path.name}.new")
    scratch.write_text(text)
    os.replace(scratch, path)


def _remove(path: Path) -> int:
    """Removes a file and returns its bytes, 0 where another process was faster."""
    try:
        size = path.stat().st_size
        path.unlink()
    except FileNotFoundError:
        return 0
    return size
