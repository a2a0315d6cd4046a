"""Folders that commands make: nothing or everything is there, whenever the command is killed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data.storage import is_url


class OutputError(ValueError):
    """A place that cannot be written to."""


def check_free(out: str | Path) -> None:
    """Raises an `OutputError` where something is at `out`, or where it is in a bucket."""
    if is_url(out):
        raise OutputError(f"{out}: write to a local folder, then copy that to the bucket")
    folder = Path(out)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        found = "exists and is not an empty directory" if folder.is_dir() else "exists"
        raise OutputError(f"{out} {found}: remove it or name another one")


@contextmanager
def new_directory(out: str | Path, command: str) -> Iterator[Path]:
    """A directory beside `out` that becomes `out` at the end of the block, unless that fails.

    Args:
      out: nothing or an empty directory may be there.
      command: what writes to it, in one word.

    Raises:
      OutputError: `out` is taken, or another one writes there.
    """
    check_free(out)
    out = Path(out).resolve()
    partial = out.with_name(f"{out.name}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise OutputError(
            f"{partial} exists: another {command} to {out} is running, or one was killed; in that "
            "case remove it"
        ) from error
    try:
        yield partial
        os.replace(partial, out)
    except BaseException:
        shutil.rmtree(partial)
        raise
