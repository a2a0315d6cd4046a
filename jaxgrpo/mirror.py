"""The text files of a run whose run_dir is in a bucket, where nothing can be appended to.

They are written to a temporary folder of this process and copied to the bucket at every save,
before the checkpoint, so that a checkpoint never lacks the lines before it. A start fetches them,
on whatever machine it is.
"""

from __future__ import annotations

import tempfile
from pathlib import Path

from etils import epath

from data.storage import is_url


class Mirror:
    """A run's files here and, if that is elsewhere, in `run_dir`.

    Attributes:
      folder: where the files are read and written: `run_dir` itself, if it is on this machine;
        else a folder that goes when the mirror does.
    """

    def __init__(self, run_dir: str, names: tuple[str, ...]):
        """Fetches the files of a run in a bucket.

        Args:
          names: the files, and the folders of files, to fetch; all that is in `folder` is copied.
        """
        self.folder = Path(run_dir)
        self._remote = epath.Path(run_dir) if is_url(run_dir) else None
        self._copied: dict[str, tuple[int, int]] = {}
        if self._remote is None:
            return
        self._temporary = tempfile.TemporaryDirectory(prefix="jaxgrpo-", ignore_cleanup_errors=True)
        self.folder = Path(self._temporary.name)
        for name in names:
            self._fetch(self._remote / name, self.folder / name)

    def push(self) -> None:
        """Copies what has changed since the last time; nothing where `run_dir` is on this machine.

        One process calls it.
        """
        if self._remote is None:
            return
        for path in sorted(self.folder.rglob("*")):
            name, stat = path.relative_to(self.folder).as_posix(), path.stat()
            known = (stat.st_size, stat.st_mtime_ns)
            if path.is_file() and self._copied.get(name) != known:
                (self._remote / name).parent.mkdir(parents=True, exist_ok=True)
                (self._remote / name).write_bytes(path.read_bytes())
                self._copied[name] = known

    def _fetch(self, source: epath.Path, target: Path) -> None:
        if source.is_dir():
            target.mkdir()
            for path in source.iterdir():
                self._fetch(path, target / path.name)
        elif source.exists():
            target.write_bytes(source.read_bytes())
