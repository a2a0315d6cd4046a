"""Files in buckets: found, read, fetched whole, errors in one line.

On fsspec's file system in memory and, where names are listed, on file://, whose listings tell the
versions as real buckets' do.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import pytest

from data import storage
from data.storage import (
    Identity,
    StorageError,
    fetch,
    identify,
    identify_all,
    is_folder,
    is_url,
    join,
    list_files,
    mirror,
    read,
)
from tests.gcs import emulated_bucket

ROOT = "memory://bucket"
PAUSES = storage.PAUSES


@pytest.fixture(autouse=True)
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    monkeypatch.setattr(storage, "PAUSES", (0.0, 0.0))
    files = fsspec.filesystem("memory")
    yield files
    if files.exists("/bucket"):
        files.rm("/bucket", recursive=True)


def put(name: str, data: bytes = b"data") -> str:
    fsspec.filesystem("memory").pipe_file(f"/bucket/{name}", data)
    return f"{ROOT}/{name}"


@pytest.fixture
def shelf(tmp_path: Path) -> Path:
    """A folder that is read as file://..."""
    return tmp_path / "shelf"


def shelve(shelf: Path, name: str, data: bytes = b"data") -> None:
    (shelf / name).parent.mkdir(parents=True, exist_ok=True)
    (shelf / name).write_bytes(data)


def failing(
    monkeypatch: pytest.MonkeyPatch, method: str, errors: list[Exception]
) -> Callable[[], int]:
    """Makes the bucket's next calls of a method fail; returns how many calls there were."""
    files = fsspec.filesystem("memory")
    original, calls = type(files).__dict__.get(method) or getattr(files, method), []

    def attempt(self: Any, *args: Any, **kwargs: Any) -> Any:
        calls.append(args)
        if errors:
            raise errors.pop(0)
        bound = original.__get__(self) if hasattr(original, "__get__") else original
        return bound(*args, **kwargs)

    monkeypatch.setattr(type(files), method, attempt)
    return lambda: len(calls)


# ---- names ----


def test_an_address_has_a_scheme() -> None:
    assert is_url("gs://bucket/a") and is_url("memory://a")
    assert not is_url("/a/b") and not is_url("a.mp4") and not is_url(Path("a"))


@pytest.mark.parametrize(
    ("root", "name", "joined"),
    [
        ("gs://b/clips", "a.mp4", "gs://b/clips/a.mp4"),
        ("gs://b/clips/", "sub/../a b.mp4", "gs://b/clips/a b.mp4"),
        ("gs://b", ".", "gs://b"),
        ("https://h/c", "é #1.mp4", "https://h/c/%C3%A9%20%231.mp4"),
    ],
)
def test_names_are_resolved_as_folders_are(root: str, name: str, joined: str) -> None:
    assert join(root, name) == joined


# ---- reading ----


def test_a_file_is_found_and_read_whole() -> None:
    url = put("a.bin", b"0123")
    identity = identify(url)
    assert identity.size == 4 and identity.version
    assert read(url, identity) == read(url) == b"0123"


def test_a_file_of_another_size_than_known_was_replaced() -> None:
    with pytest.raises(StorageError, match=r"a.bin: .* expected 9 bytes, found 4: was it replaced"):
        read(put("a.bin"), Identity(9, "1"))


def test_another_version_is_another_identity() -> None:
    first = identify(put("a.bin", b"0123"))
    assert identify(put("a.bin", b"4567")) != first


def test_only_files_directly_below_a_folder_are_listed() -> None:
    put("f/a"), put("f/b", b""), put("f/sub/c")
    assert {name: found.size for name, found in list_files(f"{ROOT}/f").items()} == {"a": 4, "b": 0}
    assert list_files(f"{ROOT}/none") == {}
    assert list_files(f"{ROOT}/f/a") == {}


def test_a_folder_is_what_holds_files() -> None:
    put("f/sub/c")
    assert is_folder(f"{ROOT}/f") and is_folder(f"{ROOT}/f/sub")
    assert not is_folder(f"{ROOT}/f/sub/c") and not is_folder(f"{ROOT}/none")


@pytest.mark.parametrize("count", [3, 20])  # asked for one by one, and listed
def test_many_files_are_identified_and_missing_ones_left_out(shelf: Path, count: int) -> None:
    names = [f"f/{number}" for number in range(count)]
    for name in names[1:]:
        shelve(shelf, name)
    found = identify_all(shelf.as_uri(), names, threads=2)
    assert found == {name: identify(f"{shelf.as_uri()}/{name}") for name in names[1:]}


# ---- errors ----


def test_a_file_that_is_not_there_is_named() -> None:
    with pytest.raises(FileNotFoundError) as error:
        read(f"{ROOT}/none.mp4")
    assert error.value.filename == f"{ROOT}/none.mp4"


def test_an_unknown_scheme() -> None:
    with pytest.raises(StorageError, match=r"unknown scheme nosuch://; expected .*gs://"):
        identify("nosuch://bucket/a")


def test_a_missing_library_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> Any:
        raise ImportError("Please install gcsfs")

    monkeypatch.setattr(fsspec, "url_to_fs", missing)
    with pytest.raises(StorageError, match=r"gs:// needs a library; pip install -e '\.\[gcs\]'"):
        identify("gs://bucket/a")
    with pytest.raises(StorageError, match=r"s3:// needs a library; install what it names"):
        identify("s3://bucket/a")


def test_a_refusal_is_not_tried_again(monkeypatch: pytest.MonkeyPatch) -> None:
    url = put("a.bin")
    calls = failing(monkeypatch, "cat_file", [PermissionError("403")])
    with pytest.raises(StorageError, match=r"a.bin: cannot be read: 403"):
        read(url)
    assert calls() == 1


def test_a_network_that_fails_twice_is_tried_a_third_time(monkeypatch: pytest.MonkeyPatch) -> None:
    url = put("a.bin")
    calls = failing(monkeypatch, "cat_file", [OSError("reset"), TimeoutError("slow")])
    assert read(url) == b"data" and calls() == 3


def test_a_network_that_stays_away_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    url = put("a.bin")
    calls = failing(monkeypatch, "cat_file", [OSError("reset\nby peer")] * 9)
    with pytest.raises(StorageError, match=r"tried 3 times: OSError: reset by peer") as error:
        read(url)
    assert calls() == 3 and "\n" not in str(error.value)


def test_pauses_between_attempts_grow(monkeypatch: pytest.MonkeyPatch) -> None:
    url, slept = put("a.bin"), []
    monkeypatch.setattr(storage, "PAUSES", PAUSES)
    monkeypatch.setattr(storage.time, "sleep", slept.append)
    failing(monkeypatch, "cat_file", [OSError("reset")] * 9)
    with pytest.raises(StorageError, match="tried 5 times"):
        read(url)
    assert slept == [1.0, 2.0, 4.0, 8.0]


def test_without_credentials_the_message_says_how_to_get_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def anonymous(url: str) -> Any:
        raise OSError("Anonymous caller does not have storage.objects.get access")

    monkeypatch.setattr(fsspec, "url_to_fs", anonymous)
    with pytest.raises(StorageError, match=r"gs://bucket/a: .*Anonymous.*gcloud auth application-"):
        identify("gs://bucket/a")


# ---- a web server ----


@pytest.fixture
def server() -> Iterator[tuple[str, list[int]]]:
    """The address of 4 bytes, and the list of what the next requests get: 0 is no answer."""
    answers: list[int] = []
    closing = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            status = answers.pop(0) if answers else 200
            if status == 0:
                closing.wait(30)
                return
            self.send_response(status)
            self.send_header("Content-Length", "4")
            self.end_headers()
            self.wfile.write(b"data")

        def log_message(self, *arguments: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as listening:
        threading.Thread(target=listening.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{listening.server_port}/a.bin", answers
        closing.set()
        listening.shutdown()


def test_a_server_that_fails_and_then_works(server: tuple[str, list[int]]) -> None:
    url, answers = server
    answers += [503, 500]
    assert read(url) == b"data" and answers == []


def test_a_server_that_does_not_answer_is_given_up_in_time(
    server: tuple[str, list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    url, answers = server
    answers += [0, 0, 0]
    monkeypatch.setattr(storage, "TIMEOUT", 0.2)
    started = time.monotonic()
    with pytest.raises(StorageError, match=r"a.bin: cannot be read, tried 3 times: .*Timeout"):
        read(url)
    assert answers == [] and 0.6 <= time.monotonic() - started < 20


# ---- Google's storage ----


@pytest.fixture(scope="module")
def google() -> Iterator[str]:
    with emulated_bucket("clips") as url:
        yield url


def test_google_tells_versions_and_what_is_not_there(google: str, tmp_path: Path) -> None:
    files = fsspec.filesystem("gs")
    files.pipe({f"clips/f/{name}": b"0123" for name in ("a", "b", "sub/c")})
    url = f"{google}/f/a"
    known = identify(url)
    assert read(url, known) == b"0123"
    assert list_files(f"{google}/f") == {"a": known, "b": identify(f"{google}/f/b")}
    assert is_folder(f"{google}/f") and not is_folder(url) and not is_folder(f"{google}/no")
    for none in (f"{google}/no", "gs://no-such-bucket/f"):
        assert list_files(none) == {}
        with pytest.raises(FileNotFoundError):
            read(none)
    assert identify_all(google, ["f/a", "f/no"], 2) == {"f/a": known}
    files.pipe("clips/f/a", b"4567")
    assert identify(url) != known
    with pytest.raises(StorageError, match="replaced while it was fetched"):
        fetch(url, known, tmp_path / "f" / "a")


def test_google_is_mirrored_in_chunks(
    google: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "_CHUNK", 3)
    fsspec.filesystem("gs").pipe({"clips/g/a": b"0123456789", "clips/g/empty": b""})
    mirror(f"{google}/g", list_files(f"{google}/g"), tmp_path / "g", 2, print)
    found = {path.name: path.read_bytes() for path in (tmp_path / "g").iterdir()}
    assert found == {"a": b"0123456789", "empty": b""}


# ---- fetching ----


def test_a_file_is_fetched_whole_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    url, target = put("a.bin", b"0123456789"), tmp_path / "here" / "a.bin"
    monkeypatch.setattr(storage, "_CHUNK", 4)
    calls = failing(monkeypatch, "cat_file", [])
    fetch(url, identify(url), target)
    assert target.read_bytes() == b"0123456789" and calls() == 3
    fetch(url, identify(url), target)
    assert calls() == 3
    assert [path.name for path in (tmp_path / "here").iterdir()] == ["a.bin"]


def test_a_fetch_that_was_cut_short_goes_on_where_it_ended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url, target = put("a.bin", b"0123456789"), tmp_path / "here" / "a.bin"
    monkeypatch.setattr(storage, "_CHUNK", 4)
    monkeypatch.setattr(storage, "PAUSES", ())
    failing(monkeypatch, "cat_file", [])
    files = fsspec.filesystem("memory")
    whole = type(files).cat_file

    def once(self: Any, path: str, start: int = 0, end: int = 0, **rest: Any) -> bytes:
        if start >= 4:
            raise OSError("unplugged")
        data: bytes = whole(self, path, start=start, end=end, **rest)
        return data

    monkeypatch.setattr(type(files), "cat_file", once)
    with pytest.raises(StorageError, match="unplugged"):
        fetch(url, identify(url), target)
    assert not target.exists()
    monkeypatch.setattr(type(files), "cat_file", whole)
    calls = failing(monkeypatch, "cat_file", [])
    fetch(url, identify(url), target)
    assert target.read_bytes() == b"0123456789" and calls() == 2


def test_a_file_replaced_meanwhile_is_not_kept(tmp_path: Path) -> None:
    url = put("a.bin", b"0123")
    known = identify(url)
    put("a.bin", b"4567")
    with pytest.raises(StorageError, match="replaced while it was fetched; start again"):
        fetch(url, known, tmp_path / "a.bin")
    assert not (tmp_path / "a.bin").exists()


def test_a_file_that_vanishes_is_said_to_be_gone(tmp_path: Path) -> None:
    url = put("a.bin")
    known = identify(url)
    fsspec.filesystem("memory").rm("/bucket/a.bin")
    with pytest.raises(StorageError, match=r"a.bin: it was there, and is gone now"):
        fetch(url, known, tmp_path / "a.bin")


def test_threads_that_want_the_same_file_share_one_fetch(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    url = put("a.bin")
    known = identify(url)
    calls = failing(monkeypatch, "cat_file", [])
    threads = [
        threading.Thread(target=fetch, args=(url, known, tmp_path / "a.bin")) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert calls() == 1 and (tmp_path / "a.bin").read_bytes() == b"data"


def test_a_folder_is_mirrored_and_a_small_disk_is_named(
    tmp_path: Path, shelf: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shelve(shelf, "a")
    shelve(shelf, "b", b"")
    url = shelf.as_uri()
    said: list[str] = []
    for _ in range(2):
        mirror(url, list_files(url), tmp_path / "here", 2, said.append)
    assert said == [f"fetching {url} (2 files, 0.00 GiB are missing) to {tmp_path / 'here'}"]
    assert (tmp_path / "here" / "a").read_bytes() == b"data"
    assert (tmp_path / "here" / "b").read_bytes() == b""
    full = type(storage.shutil.disk_usage(tmp_path))(100, 99, 1)
    monkeypatch.setattr(storage.shutil, "disk_usage", lambda path: full)
    with pytest.raises(StorageError, match=r"needs .* GiB more, but the disk has .* left"):
        mirror(url, list_files(url), tmp_path / "there", 1, print)
