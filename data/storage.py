"""Files in buckets (`gs://...`, or any address that fsspec knows): found, read and fetched.

fsspec, and not `etils.epath` (which Orbax brings as well), because a training run needs what epath
does not give: the version of an object, so that nothing stale is served, and a time limit on every
call. Google Cloud Storage comes with `pip install -e '.[gcs]'`.

A call that fails is tried again a few times, with growing pauses; then it is an error that names
the address. Schemes whose library is not asynchronous (file://, memory://) have no time limit: they
do not wait for a network.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import logging
import os
import posixpath
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, NamedTuple, TypeVar
from urllib.parse import quote

import fsspec

# gcsfs would ask another service (gRPC) what kind each bucket is, and wait a minute for it where it
# cannot be reached or not be asked. It reads this when it is imported.
os.environ.setdefault("GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT", "false")
# It would log a traceback for every attempt, besides raising the error that is reported here.
logging.getLogger("gcsfs").setLevel(logging.CRITICAL)

T = TypeVar("T")

# Seconds before each further attempt; libraries such as gcsfs retry some errors themselves besides.
PAUSES: tuple[float, ...] = (1.0, 2.0, 4.0, 8.0)
TIMEOUT = 60.0  # seconds for an attempt, and more for what is large:
_SLOWEST: Final = 1 << 20  # bytes per second
_LISTING: Final = 600.0  # seconds: a million names come in a thousand answers
_CHUNK: Final = 32 << 20  # bytes of a file that are fetched to disk at once

# What libraries call the version of an object, best first. A time stands in where there is no name.
_VERSIONS: Final = (
    "generation", "etag", "ETag", "md5Hash", "content_md5", "Content-MD5", "Digest",
    "Last-Modified", "LastModified", "last_modified", "updated", "mtime", "created",
)  # fmt: skip

# Above this many files of one folder it is listed instead of asking for each.
_LISTED: Final = 8

_PERMANENT: Final = (PermissionError, IsADirectoryError, NotADirectoryError)


class StorageError(ValueError):
    """A bucket that cannot be used, or a disk without room; the message says what to do."""


class Identity(NamedTuple):
    """What tells whether a file is still the one it was: its bytes and its version."""

    size: int
    version: str


def is_url(path: str | os.PathLike[str]) -> bool:
    """Whether a path is an address such as gs://bucket/folder."""
    return "://" in os.fspath(path)


def join(root: str, name: str) -> str:
    """The address of a file below a root; names with "." and ".." are resolved as folders are."""
    name = posixpath.normpath(name)
    if name == ".":
        return root
    return f"{root.rstrip('/')}/{quote(name) if root.startswith('http') else name}"


def cache_folder() -> Path:
    """Where weights and findings are kept: $JAXGRPO_CACHE, by default ~/.cache/jaxgrpo."""
    return Path(os.environ.get("JAXGRPO_CACHE") or "~/.cache/jaxgrpo").expanduser()


def digest(*parts: object) -> str:
    """A short name, 16 hexadecimal digits, for values that are long or hold slashes."""
    return hashlib.sha256("\n".join(map(str, parts)).encode()).hexdigest()[:16]


# ---- reading ----


def read(url: str, identity: Identity | None = None) -> bytes:
    """A whole file in one request.

    Args:
      identity: what the file is known to be; another size is an error.

    Raises:
      FileNotFoundError: there is no such file.
      StorageError: anything else, after the last attempt.
    """
    size = identity.size if identity else 0

    def attempt(files: Any, path: str, limit: dict[str, float]) -> bytes:
        data: bytes = files.cat_file(path, **limit)
        if identity and len(data) != size:
            raise OSError(f"expected {size} bytes, found {len(data)}: was it replaced?")
        return data

    return _tried(url, attempt, TIMEOUT + size / _SLOWEST)


def identify(url: str) -> Identity:
    """A file's size and version.

    Raises: as `read`.
    """

    def attempt(files: Any, path: str, limit: dict[str, float]) -> Identity:
        files.invalidate_cache()
        found = files.info(path, **limit)
        if found["type"] != "file":
            raise FileNotFoundError
        if found["size"] is None:
            raise StorageError(f"{url}: the server does not say how long the file is")
        return _identity(found)

    return _tried(url, attempt, TIMEOUT)


def is_folder(url: str) -> bool:
    """Whether anything lies below an address.

    Raises:
      StorageError: as `read`.
    """

    def attempt(files: Any, path: str, limit: dict[str, float]) -> bool:
        files.invalidate_cache()
        return bool(files.info(path, **limit)["type"] == "directory")

    try:
        return _tried(url, attempt, TIMEOUT)
    except FileNotFoundError:
        return False


def list_files(url: str) -> dict[str, Identity]:
    """The files directly below a folder, by name; none where there is no folder.

    Raises:
      StorageError: as `read`.
    """

    def attempt(files: Any, path: str, limit: dict[str, float]) -> list[dict[str, Any]]:
        files.invalidate_cache()
        found: list[dict[str, Any]] = files.ls(path, detail=True, **limit)
        # A file lists itself, and so does the empty object that consoles make for a folder.
        return [entry for entry in found if entry["name"].strip("/") != path.strip("/")]

    try:
        entries = _tried(url, attempt, _LISTING)
    except FileNotFoundError:
        return {}
    listed = {}
    for entry in entries:
        name = posixpath.basename(entry["name"])
        if name and entry["type"] == "file":
            unsized = entry["size"] is None  # a web server's listing
            listed[name] = identify(join(url, name)) if unsized else _identity(entry)
    return listed


def identify_all(root: str, names: Iterable[str], threads: int) -> dict[str, Identity]:
    """The size and version of each file below `root`; those that do not exist are left out.

    Raises:
      StorageError: as `read`.
    """
    by_folder: dict[str, list[str]] = {}
    for name in sorted(set(names)):
        by_folder.setdefault(posixpath.dirname(posixpath.normpath(name)), []).append(name)

    def look(name: str) -> Identity | None:
        try:
            return identify(join(root, name))
        except FileNotFoundError:
            return None

    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="identify") as pool:
        large = [folder for folder, wanted in by_folder.items() if len(wanted) > _LISTED]
        large = [] if root.startswith("http") else large  # web servers need not list
        listings = pool.map(lambda folder: list_files(join(root, folder)), large)
        listed = dict(zip(large, listings, strict=True))
        found: dict[str, Identity | None] = {
            name: listed[folder].get(posixpath.basename(posixpath.normpath(name)))
            for folder in large
            for name in by_folder[folder]
        }
        rest = [name for wanted in by_folder.values() for name in wanted if name not in found]
        found |= dict(zip(rest, pool.map(look, rest), strict=True))
    return {name: identity for name, identity in found.items() if identity}


def _identity(info: Mapping[str, Any]) -> Identity:
    version = next((str(info[name]) for name in _VERSIONS if info.get(name)), "")
    return Identity(int(info["size"]), version)


def _tried(url: str, attempt: Callable[[Any, str, dict[str, float]], T], timeout: float) -> T:
    """Calls `attempt(file system, path, {"timeout": seconds})` until it succeeds."""
    scheme = url.partition("://")[0]
    for pause in (*PAUSES, None):
        try:
            files, path = fsspec.url_to_fs(url)
            return attempt(files, path, {"timeout": timeout} if files.async_impl else {})
        except StorageError:
            raise
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "there is no such file", url) from error
        except ImportError as error:
            extra = "gcs" if scheme in ("gs", "gcs") else None
            mend = f"pip install -e '.[{extra}]'" if extra else f"install what it names: {error}"
            raise StorageError(f"{url}: {scheme}:// needs a library; {mend}") from error
        except _PERMANENT as error:
            raise StorageError(f"{url}: cannot be read: {error}") from error
        except Exception as error:  # every library has its own errors for a network that fails
            if isinstance(error, ValueError) and "Protocol not known" in str(error):
                raise StorageError(
                    f"{url}: unknown scheme {scheme}://; expected a local path, gs://, or another "
                    "that fsspec knows"
                ) from error
            if pause is None:
                raise StorageError(
                    f"{url}: cannot be read, tried {len(PAUSES) + 1} times: "
                    f"{type(error).__name__}: {' '.join(str(error).split())}{_advice(scheme)}"
                ) from error
            time.sleep(pause)
    raise AssertionError("the last attempt returns or raises")


def _advice(scheme: str) -> str:
    if scheme not in ("gs", "gcs"):
        return ""
    return (
        "; check the bucket's name, and that this machine may read it (`gcloud auth "
        "application-default login`, or the service account of the VM)"
    )


# ---- fetching to disk ----


def mirror(
    url: str,
    files: Mapping[str, Identity],
    folder: Path,
    threads: int,
    say: Callable[[str], None],
) -> None:
    """Fetches files of a bucket's folder into a local one; those that are there already stay.

    Each file appears whole or not at all, whenever the process is killed, and a fetch that was cut
    short goes on where it ended. Several processes may do the same at once: they share the work.

    Args:
      files: the names to fetch, with what each is known to be. A version belongs into the folder's
        name: an existing file of the right size is taken for the right one.
      say: told what is fetched, if anything is missing, and where to.

    Raises:
      StorageError: as `read`; also a file that is gone or changes meanwhile, and a full disk.
    """
    folder.mkdir(parents=True, exist_ok=True)  # of which the disk's room is asked
    need = sum(_missing(folder / name, identity) for name, identity in files.items())
    free = shutil.disk_usage(folder).free
    if need > free:
        raise StorageError(
            f"{folder}: {url} needs {gib(need)} more, but the disk has {gib(free)} left; name a "
            "folder of a larger disk"
        )
    if need:
        say(f"fetching {url} ({len(files)} files, {gib(need)} are missing) to {folder}")

    def work(name: str) -> None:
        fetch(join(url, name), files[name], folder / name)

    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="mirror") as pool:
        list(pool.map(work, files))


def fetch(url: str, identity: Identity, target: Path) -> None:
    """Fetches one file, if it is not there.

    Raises: as `mirror`.
    """
    if not _missing(target, identity):
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with locked(_scratch(target) / f"{target.name}.lock"):
            if _missing(target, identity):
                part = _part(target, identity)
                with open(part, "ab") as file:
                    _append(url, identity, file)
                    os.fsync(file.fileno())
                if identify(url) != identity:
                    part.unlink()
                    raise StorageError(f"{url}: it was replaced while it was fetched; start again")
                os.replace(part, target)
    except OSError as error:
        if error.filename == url:
            raise StorageError(f"{url}: it was there, and is gone now") from error
        raise StorageError(f"{target}: cannot be written: {error.strerror or error}") from error


def _append(url: str, identity: Identity, file: Any) -> None:
    """Adds to an open file what it lacks, in chunks, each of them tried several times."""
    while (start := file.tell()) < identity.size:
        end = min(start + _CHUNK, identity.size)

        def attempt(files: Any, path: str, limit: dict[str, float]) -> bytes:
            data: bytes = files.cat_file(path, start=start, end=end, **limit)  # noqa: B023
            if len(data) != end - start:  # noqa: B023
                raise OSError(f"expected {end - start} bytes, found {len(data)}")  # noqa: B023
            return data

        file.write(_tried(url, attempt, TIMEOUT + (end - start) / _SLOWEST))
        file.flush()


def _scratch(target: Path) -> Path:
    """A folder beside the target's, which holds nothing but what is complete."""
    return target.parent.with_name(f".{target.parent.name}.parts")


def _part(target: Path, identity: Identity) -> Path:
    """What of a file has been fetched."""
    return _scratch(target) / f"{target.name}.{digest(*identity)}"


def _missing(target: Path, identity: Identity) -> int:
    """The bytes of a file that are still to be fetched; one of another size is to be replaced."""
    if target.is_file() and target.stat().st_size == identity.size:
        return 0
    part = _part(target, identity)
    # An empty file has to be made, too.
    return max(1, identity.size - (part.stat().st_size if part.is_file() else 0))


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock against other threads and processes of this machine.

    The kernel gives it back when a process dies, so that no lock outlives its holder.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def gib(size: float) -> str:
    """Bytes for people: "1.50 GiB"."""
    return f"{size / (1 << 30):.2f} GiB"
