"""What a video file claims about itself, looked at once and cheaply: metadata and its first frame.

The claims are enough to plan steps (how many frames, how many tokens, which bucket). Whether the
rest of the file keeps them shows only when it is decoded: see `data.video`.

Rotation metadata (phones) is applied by OpenCV, here and when decoding: width and height are those
of the upright picture, as a player shows it.
"""

from __future__ import annotations

import dataclasses
import io
import json
import logging
import math
import os
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple, Protocol

import cv2
import numpy as np

from data.records import Record, write_atomically
from data.storage import Identity
from data.watch import HungError, watched

_log = logging.getLogger(__name__)

# A day at 120 frames a second is 10 million frames. Beyond that a count is noise, like the -9e18
# of a picture renamed to .mp4.
_MOST_FRAMES: Final = 10_000_000
_HIGHEST_FPS: Final = 1000.0

# Of a picture; 8K is half as much. One of 30,000 x 30,000 pixels takes 2.7 GB to decode.
_MOST_PIXELS: Final = 1 << 26

# Raised when probing finds something else in the same file, or the cache has other fields, so that
# old caches are not believed.
_CACHE_VERSION: Final = 2


GIVEN_UP: Final = "timeout"  # the kind of a video whose decoder hung

# What may be otherwise at the next look, though the file is the same.
_PASSING: Final = frozenset({"missing", "unreachable", GIVEN_UP})


class VideoError(ValueError):
    """A video that cannot be used. It survives pickling, so it passes between processes.

    Attributes:
      kind: what is wrong, in one word, for counting:
        missing       no such file, or a folder, or not readable
        unreachable   a bucket did not give it, after several attempts
        empty         zero bytes
        unreadable    OpenCV finds no video in it: text, audio only, an unknown container
        frame_count   a count of frames that no video has (a picture renamed to .mp4)
        frame_rate    a frame rate that no video has
        first_frame   opens, but its first frame cannot be decoded
        truncated     ends before 98 % of the frames it claims
        frame_size    claims pictures that no video has
        timestamps    frame times that do not increase
        duration      ends before the annotated duration
        clip          the clip window lies outside of the file
        too_short     fewer than two frames
        shape         pictures that are too narrow or too flat for the model's processor
        timeout       the decoder, or the disk, made no progress
        changed       another video than the one that was probed
      message: names the file, what was expected and what was found.
    """

    def __init__(self, kind: str, message: str) -> None:
        super().__init__(kind, message)
        self.kind = kind
        self.message = message

    def __str__(self) -> str:
        return self.message


@dataclass(frozen=True)
class Probe:
    """What a file claims: frames, frames per second, pixels of the upright picture, seconds."""

    frames: int
    fps: float
    width: int
    height: int
    duration: float


class Encoded(NamedTuple):
    """A video file in memory, and where it is from, for messages."""

    name: str
    data: bytes

    def __str__(self) -> str:
        return self.name


VideoFile = str | os.PathLike[str] | Encoded


class Clips(Protocol):
    """The videos that a manifest names, wherever they are. It is pickled into worker processes."""

    def name(self, video: str) -> str:
        """What messages call it: its path or address."""

    def identities(self, videos: Iterable[str], threads: int) -> dict[str, Identity]:
        """What changes when a file does, for those that exist."""

    def fetch(self, video: str) -> VideoFile:
        """What `open_video` opens; a `VideoError` where it cannot be had."""

    def probe(
        self, records: Iterable[Record], threads: int, timeout: float = math.inf
    ) -> dict[str, Probe | VideoError]:
        """Per record id what its video claims, or what is wrong with it (never raised).

        No video may take more than `timeout` seconds.
        """


@contextmanager
def open_video(video: VideoFile) -> Iterator[tuple[cv2.VideoCapture, int, float]]:
    """An open capture before its first frame, with the claimed frame count and frame rate.

    One decoding thread each: videos are decoded in parallel, frames are not.

    Raises:
      VideoError: missing, empty, unreadable, frame_count, frame_rate, frame_size.
    """
    options = [cv2.CAP_PROP_N_THREADS, 1]
    if isinstance(video, Encoded):
        if not video.data:
            raise VideoError("empty", f"{video}: expected a video, found 0 bytes")
        # The capture reads from the stream, but does not keep it alive: this frame does.
        stream = io.BytesIO(video.data)
        capture = cv2.VideoCapture(stream, cv2.CAP_FFMPEG, options)  # type: ignore[call-overload]
    else:
        check_file(Path(video))
        # An absolute path: FFmpeg would read "name:rest" as a protocol.
        capture = cv2.VideoCapture(os.path.abspath(video), cv2.CAP_FFMPEG, options)
    try:
        if not capture.isOpened():
            raise VideoError("unreadable", f"{video}: OpenCV finds no video stream in it")
        count, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
        if not 0 < count <= _MOST_FRAMES:
            raise VideoError(
                "frame_count",
                f"{video}: expected a count of frames, found {count:g}; is it a picture or a "
                "stream without an index? Re-encode it to mp4",
            )
        if not (math.isfinite(fps) and 0 < fps <= _HIGHEST_FPS):
            raise VideoError(
                "frame_rate", f"{video}: expected 0 to {_HIGHEST_FPS:g} frames/s, found {fps:g}"
            )
        width, height = (
            int(capture.get(side)) for side in (cv2.CAP_PROP_FRAME_WIDTH, cv2.CAP_PROP_FRAME_HEIGHT)
        )
        if width * height > _MOST_PIXELS:
            raise VideoError(
                "frame_size",
                f"{video}: expected frames of at most {_MOST_PIXELS} pixels, found {width} x "
                f"{height}",
            )
        yield capture, int(count), fps
    finally:
        capture.release()


def check_file(file: Path) -> None:
    """Raises a `VideoError` (missing, empty) for what is not a file with something in it."""
    try:
        size = file.stat().st_size
    except OSError as error:
        raise VideoError("missing", f"{file}: cannot read the file: {error.strerror}") from error
    if not file.is_file():
        raise VideoError("missing", f"{file}: expected a file, found a folder or a device")
    if not os.access(file, os.R_OK):
        raise VideoError("missing", f"{file}: no permission to read the file")
    if size == 0:
        raise VideoError("empty", f"{file}: expected a video, found 0 bytes")


def probe(video: VideoFile, timeout: float = math.inf) -> Probe:
    """Reads a file's metadata and decodes its first frame, within `timeout` seconds.

    Raises:
      VideoError: as `open_video`; first_frame, timeout.
    """
    try:
        return watched(timeout, lambda _: _probe(video))
    except HungError as error:
        raise hung(video, error) from error


def hung(video: VideoFile, error: HungError) -> VideoError:
    """What is wrong with a video whose decoder was given up."""
    return VideoError(
        GIVEN_UP, f"{video}: {error}: the decoder or the disk hangs; data.timeout sets the limit"
    )


def _probe(video: VideoFile) -> Probe:
    with open_video(video) as (capture, frames, fps):
        try:
            ok, first = capture.read()
        except cv2.error as error:
            raise VideoError("first_frame", f"{video}: cannot decode a frame: {error}") from error
    if not ok or first is None or first.ndim != 3 or first.size == 0:
        raise VideoError(
            "first_frame", f"{video}: claims {frames} frames, but the first cannot be decoded"
        )
    height, width = np.shape(first)[:2]
    return Probe(frames, fps, width, height, frames / fps)


def probe_all(
    records: Iterable[Record],
    clips: Clips,
    threads: int,
    cache_path: str | os.PathLike[str] | None,
    timeout: float = math.inf,
) -> dict[str, Probe | VideoError]:
    """Probes the video of every record, each file once, and remembers what it found.

    Args:
      records: with unique ids; several may share a video.
      clips: where their videos are.
      threads: files looked at at once, at least 1.
      cache_path: a JSON file, read and rewritten; a file whose identity has not changed is not
        opened again. What it holds about other files is kept. None keeps nothing. Where it cannot
        be written (a read-only data root) a warning says so.
      timeout: seconds that one may take.

    Returns:
      Per record id what the file claims, or what is wrong with it (never raised).
    """
    records = list(records)
    videos = sorted({record.video for record in records})
    identities = clips.identities(videos, threads)
    cache = {} if cache_path is None else _read_cache(Path(cache_path))

    def look(video: str) -> tuple[dict[str, Any] | None, Probe | VideoError]:
        """The cache entry (None where there is no file) and the finding."""
        name = clips.name(video)
        identity = identities.get(video)
        entry = cache.get(video)
        if identity and entry and (entry["size"], entry["version"]) == identity:
            return entry, finding(entry, name)
        found: dict[str, Any]
        result: Probe | VideoError
        try:
            result = probe(clips.fetch(video), timeout)
            found = {"probe": dataclasses.asdict(result)}
        except VideoError as error:
            result = error
            message = error.message.removeprefix(f"{name}: ")
            found = {"error": {"kind": error.kind, "message": message}}
        passing = isinstance(result, VideoError) and result.kind in _PASSING
        if identity is None or passing:
            return None, result
        return {**identity._asdict(), **found}, result

    with ThreadPoolExecutor(max_workers=max(1, threads), thread_name_prefix="probe") as pool:
        looked = dict(zip(videos, pool.map(look, videos), strict=True))
    if cache_path is not None:
        fresh = {video: entry for video, (entry, _) in looked.items() if entry is not None}
        kept = {video: entry for video, entry in cache.items() if video not in looked}
        if kept | fresh != cache:
            _write_cache(Path(cache_path), kept | fresh)
    return {record.id: looked[record.video][1] for record in records}


def finding(entry: dict[str, Any], name: str) -> Probe | VideoError:
    """What a cache entry says about the video of that name."""
    if "probe" in entry:
        return Probe(**entry["probe"])
    return VideoError(entry["error"]["kind"], f"{name}: {entry['error']['message']}")


def _read_cache(path: Path) -> dict[str, dict[str, Any]]:
    """The cache's entries by video; none, with a warning, where it is damaged or of old age."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _CACHE_VERSION:
            raise ValueError(f"version {content['version']}, expected {_CACHE_VERSION}")
        files: dict[str, dict[str, Any]] = content["files"]
        for video, entry in files.items():
            finding(entry, video)
            int(entry["size"]), str(entry["version"])
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        _log.warning("%s: probing all videos again, the cache cannot be used: %r", path, error)
        return {}
    return files


def _write_cache(path: Path, files: dict[str, dict[str, Any]]) -> None:
    lines = [f"  {json.dumps(video)}: {json.dumps(files[video])}" for video in sorted(files)]
    body = ",\n".join(lines)
    try:
        write_atomically(path, f'{{"version": {_CACHE_VERSION}, "files": {{\n{body}\n}}}}\n')
    except OSError as error:
        _log.warning("%s: the next run probes all videos again, no cache written: %s", path, error)
