"""What a video file claims about itself, looked at once and cheaply: metadata and its first frame.

The claims are enough to plan steps (how many frames, how many tokens, which bucket). Whether the
rest of the file keeps them shows only when it is decoded: see `data.video`.

Rotation metadata (phones) is applied by OpenCV, here and when decoding: width and height are those
of the upright picture, as a player shows it.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import math
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import cv2
import numpy as np

from data.records import Record, write_atomically

_log = logging.getLogger(__name__)

# A day at 120 frames a second is 10 million frames. Beyond that a count is noise, like the -9e18
# of a picture renamed to .mp4.
_MOST_FRAMES: Final = 10_000_000
_HIGHEST_FPS: Final = 1000.0

# Raised when probing finds something else in the same file, so that old caches are not believed.
_CACHE_VERSION: Final = 1


class VideoError(ValueError):
    """A video that cannot be used. It survives pickling, so it passes between processes.

    Attributes:
      kind: what is wrong, in one word, for counting:
        missing       no such file, or a folder, or not readable
        empty         zero bytes
        unreadable    OpenCV finds no video in it: text, audio only, an unknown container
        frame_count   a count of frames that no video has (a picture renamed to .mp4)
        frame_rate    a frame rate that no video has
        first_frame   opens, but its first frame cannot be decoded
        truncated     ends before 98 % of the frames it claims
        timestamps    frame times that do not increase
        duration      ends before the annotated duration
        clip          the clip window lies outside of the file
        too_short     fewer than two frames
        shape         pictures that are too narrow or too flat for the model's processor
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


def open_video(path: str | os.PathLike[str]) -> tuple[cv2.VideoCapture, int, float]:
    """An open capture before its first frame, with the claimed frame count and frame rate.

    One decoding thread each: videos are decoded in parallel, frames are not.

    Raises:
      VideoError: missing, empty, unreadable, frame_count, frame_rate.
    """
    file = Path(path)
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
    # An absolute path: FFmpeg would read "name:rest" as a protocol.
    capture = cv2.VideoCapture(os.path.abspath(file), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
    try:
        if not capture.isOpened():
            raise VideoError("unreadable", f"{file}: OpenCV finds no video stream in it")
        count, fps = capture.get(cv2.CAP_PROP_FRAME_COUNT), capture.get(cv2.CAP_PROP_FPS)
        if not 0 < count <= _MOST_FRAMES:
            raise VideoError(
                "frame_count",
                f"{file}: expected a count of frames, found {count:g}; is it a picture or a "
                "stream without an index? Re-encode it to mp4",
            )
        if not (math.isfinite(fps) and 0 < fps <= _HIGHEST_FPS):
            raise VideoError(
                "frame_rate", f"{file}: expected 0 to {_HIGHEST_FPS:g} frames/s, found {fps:g}"
            )
    except BaseException:
        capture.release()
        raise
    return capture, int(count), fps


def probe(path: str | os.PathLike[str]) -> Probe:
    """Reads a file's metadata and decodes its first frame.

    Raises:
      VideoError: missing, empty, unreadable, frame_count, frame_rate, first_frame.
    """
    capture, frames, fps = open_video(path)
    try:
        ok, first = capture.read()
    except cv2.error as error:
        raise VideoError("first_frame", f"{path}: cannot decode a frame: {error}") from error
    finally:
        capture.release()
    if not ok or first is None or first.ndim != 3 or first.size == 0:
        raise VideoError(
            "first_frame", f"{path}: claims {frames} frames, but the first cannot be decoded"
        )
    height, width = np.shape(first)[:2]
    return Probe(frames, fps, width, height, frames / fps)


def probe_all(
    records: Iterable[Record],
    root: str | os.PathLike[str],
    threads: int,
    cache_path: str | os.PathLike[str] | None,
) -> dict[str, Probe | VideoError]:
    """Probes the video of every record, each file once, and remembers what it found.

    Args:
      records: with unique ids; several may share a video.
      root: the folder that their videos are relative to.
      threads: files looked at at once, at least 1.
      cache_path: a JSON file, read and rewritten; a file whose size and modification time have not
        changed is not opened again. What it holds about other files is kept. None keeps nothing.
        Where it cannot be written (a read-only data root) a warning says so.

    Returns:
      Per record id what the file claims, or what is wrong with it (never raised).
    """
    records = list(records)
    videos = sorted({record.video for record in records})
    cache = {} if cache_path is None else _read_cache(Path(cache_path))

    def look(video: str) -> tuple[dict[str, Any] | None, Probe | VideoError]:
        """The cache entry (None where there is no file) and the finding."""
        path = Path(root, video)
        try:
            stat = path.stat()
        except OSError:
            stat = None
        entry = cache.get(video)
        if (
            stat
            and entry
            and (entry["size"], entry["mtime_ns"]) == (stat.st_size, stat.st_mtime_ns)
        ):
            return entry, _finding(entry, path)
        found: dict[str, Any]
        result: Probe | VideoError
        try:
            result = probe(path)
            found = {"probe": dataclasses.asdict(result)}
        except VideoError as error:
            result = error
            message = error.message.removeprefix(f"{path}: ")
            found = {"error": {"kind": error.kind, "message": message}}
        if stat is None or (isinstance(result, VideoError) and result.kind == "missing"):
            return None, result
        return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, **found}, result

    with ThreadPoolExecutor(max_workers=max(1, threads), thread_name_prefix="probe") as pool:
        looked = dict(zip(videos, pool.map(look, videos), strict=True))
    if cache_path is not None:
        fresh = {video: entry for video, (entry, _) in looked.items() if entry is not None}
        kept = {video: entry for video, entry in cache.items() if video not in looked}
        if kept | fresh != cache:
            _write_cache(Path(cache_path), kept | fresh)
    return {record.id: looked[record.video][1] for record in records}


def _finding(entry: dict[str, Any], path: Path) -> Probe | VideoError:
    if "probe" in entry:
        return Probe(**entry["probe"])
    return VideoError(entry["error"]["kind"], f"{path}: {entry['error']['message']}")


def _read_cache(path: Path) -> dict[str, dict[str, Any]]:
    """The cache's entries by video; none, with a warning, where it is damaged or of old age."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        if content["version"] != _CACHE_VERSION:
            raise ValueError(f"version {content['version']}, expected {_CACHE_VERSION}")
        files: dict[str, dict[str, Any]] = content["files"]
        for video, entry in files.items():
            _finding(entry, Path(video))
            int(entry["size"]), int(entry["mtime_ns"])
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
