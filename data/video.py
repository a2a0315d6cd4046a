"""Decoding: the frames that the model was trained to see, their true times, or a stated reason.

Frames are chosen as qwen_vl_utils chooses them, and read in one sequential pass: OpenCV's seeking
is 4 to 13 times slower and, in some containers, wrong in silence. A container may lie about all
that it says. So the pass checks the count and the times it meets, and where they are not what was
claimed (a count a little off, a variable frame rate) frames are chosen by their times in a second
pass. How many frames there are never changes: the step plan counted on it.

Of a long video only the chosen frames are held, and those as small as the model sees them.

T frames chosen, H, W pixels of the upright picture (see `data.probe` on rotation).
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Final, NamedTuple

import cv2
import numpy as np

from data.probe import Probe, VideoError, VideoFile, hung, open_video
from data.watch import HungError, watched

__all__ = ["FrameSampling", "Frames", "VideoError", "decode", "frame_count"]

Clip = tuple[float, float]
Resize = Callable[[np.ndarray, int], np.ndarray]

_FRAME_FACTOR: Final = 2  # frames enter the model in pairs

# A file that ends before this share of the frames it claims is cut. Some containers estimate the
# count from the duration, so a little less is normal.
_COMPLETE: Final = 0.98

# Codecs hold back up to 16 frames for reordering. Where the container stores no presentation times
# (AVI, some MPEG program streams) OpenCV reports 0 for those that come out after the last packet.
_MOST_HELD_BACK: Final = 16

# Seconds to which a time is known: containers round to 1 ms, or to 1/90,000 s.
_CLOCK: Final = 1.5e-3


@dataclass(frozen=True)
class FrameSampling:
    """How many frames to take: qwen_vl_utils' fps, min_frames and max_frames, or its nframes.

    Attributes:
      fps, min_frames, max_frames: so many per second of video, within these limits.
      frames: so many of any video instead, an even number; shorter videos cannot be used.
    """

    fps: float = 2.0
    min_frames: int = 4
    max_frames: int = 768
    frames: int | None = None

    def __post_init__(self) -> None:
        if not (math.isfinite(self.fps) and self.fps > 0):
            raise ValueError(f"fps: expected a number above 0, found {self.fps}")
        if not _FRAME_FACTOR <= self.min_frames <= self.max_frames:
            raise ValueError(
                f"min_frames, max_frames: expected {_FRAME_FACTOR} <= min_frames <= max_frames, "
                f"found {self.min_frames} and {self.max_frames}"
            )
        if self.frames is not None and (self.frames < 1 or self.frames % _FRAME_FACTOR):
            raise ValueError(
                f"frames: expected an even number above 0 (frames enter the model in pairs), found "
                f"{self.frames}"
            )


class Frames(NamedTuple):
    """Decoded frames.

    Attributes:
      frames: u8[T, H, W, 3], RGB, upright; as small as `decode` was told to make them.
      timestamps: f64[T], when each is shown, in seconds from the start of the clip (of the file,
        without a clip), as spans are.
      seconds_per_frame: 1 / sampled_fps, as qwen_vl_utils has it: sampled_fps = T / total * fps,
        with total the file's frames in the clip. It is the model's clock, and a little shorter
        than the distance between frames (which is (total - 1) / (T - 1) / fps).
      decoded_hw: height and width of the frames as they are in the file.
    """

    frames: np.ndarray
    timestamps: np.ndarray
    seconds_per_frame: float
    decoded_hw: tuple[int, int]


class _Window(NamedTuple):
    """The frames start..end (inclusive) of a file, by its claims, and how many of them to take."""

    start: int
    end: int
    take: int

    @property
    def total(self) -> int:
        return self.end - self.start + 1


def frame_count(probe: Probe, sampling: FrameSampling, clip: Clip | None = None) -> int:
    """How many frames `decode` returns: qwen_vl_utils' `smart_nframes`, an even number.

        10 s at 25 frames/s, sampling.fps = 2: 250 / 25 * 2 = 20 frames

    Raises:
      VideoError: too_short (fewer than 2 frames), clip (outside of the file).
    """
    return _window(probe.frames, probe.fps, sampling, clip, "the video").take


def decode(
    path: VideoFile,
    sampling: FrameSampling,
    clip: Clip | None = None,
    expected_duration: float | None = None,
    resize: Resize | None = None,
    timeout: float = math.inf,
) -> Frames:
    """Decodes the frames the model sees, and checks that the file is what it claims to be.

    Args:
      path: the video, a file or in memory.
      sampling: how many frames.
      clip: only the frames inside [start, end] seconds; reading stops after them.
      expected_duration: the annotated length of the whole file in seconds. A file that ends
        earlier, by more than 5 % and by more than 1 s (annotations are rounded), is refused; a
        longer one is not, since annotations often stop at the last event. Not checked with a clip
        that ends before the file: there the clip's own end counts.
      resize: from a frame u8[H, W, 3], whose channels it treats alike, and T to the frame as it is
        to be returned. Each is resized when it is read, so that no more than one is held in full.
      timeout: seconds in which the decoder may make no progress.

    Raises:
      VideoError: any kind of `data.probe.VideoError`.
    """
    work = functools.partial(_decode, path, sampling, clip, expected_duration, resize)
    try:
        return watched(timeout, work)
    except HungError as error:
        raise hung(path, error) from error


def _decode(
    path: VideoFile,
    sampling: FrameSampling,
    clip: Clip | None,
    expected_duration: float | None,
    resize: Resize | None,
    progress: Callable[[], None],
) -> Frames:
    """See `decode`; `progress` is called for each frame."""
    reader = _Reader(path, resize, progress)
    with open_video(path) as (capture, claimed, fps):
        window = _window(claimed, fps, sampling, clip, str(path))
        wanted = np.linspace(window.start, window.end, window.take).round().astype(np.int64)
        to_the_end = window.end == claimed - 1
        seen = reader.read(capture, wanted, None if to_the_end else window.end)
    times = _times(seen.times, fps, path)
    if to_the_end or len(times) <= window.end:
        _check_complete(times, claimed, fps, path)
    kept_its_word = len(times) == (claimed if to_the_end else window.end + 1)
    if kept_its_word and _is_regular(times, fps):
        if to_the_end:
            _check_duration(times, expected_duration, path)
        start = clip[0] if clip else 0.0
        seconds_per_frame = window.total / (window.take * fps)
        return Frames(seen.frames, times[wanted] - start, seconds_per_frame, seen.decoded_hw)
    del seen
    expected = expected_duration if to_the_end else None
    return _decode_by_time(reader, clip, expected, window.take, claimed, fps)


def _decode_by_time(
    reader: _Reader,
    clip: Clip | None,
    expected_duration: float | None,
    count: int,
    claimed: int,
    fps: float,
) -> Frames:
    """Decodes the `count` frames nearest to equally spaced times, in two passes.

    At a constant frame rate these are the frames that qwen_vl_utils takes. At a variable one, equal
    steps in frames would be unequal steps in time, which the model's clock cannot express.
    """
    path = reader.path
    with open_video(path) as (capture, _, _):
        raw = reader.read(capture, np.empty(0, np.int64), None).times
    times = _times(raw, fps, path)
    _check_complete(times, claimed, fps, path)
    _check_duration(times, expected_duration, path)
    start, end = clip if clip else (0.0, math.inf)
    inside = np.flatnonzero((times >= start - _CLOCK) & (times <= end + _CLOCK))
    if len(inside) < _FRAME_FACTOR:
        raise VideoError(
            "clip" if clip else "too_short",
            f"{path}: expected at least {_FRAME_FACTOR} frames"
            f"{f' within {start:g} to {end:g} s' if clip else ''}, found {len(inside)}",
        )
    within = times[inside]
    targets = np.linspace(within[0], within[-1], count)
    after = np.searchsorted(within, targets).clip(1, len(within) - 1)
    earlier_is_nearer = targets - within[after - 1] <= within[after] - targets
    wanted = inside[np.where(earlier_is_nearer, after - 1, after)]
    with open_video(path) as (capture, _, _):
        seen = reader.read(capture, wanted, int(wanted[-1]))
    # total / fps is the window's length: N frames last N / (N - 1) times as long as first to last.
    length = (within[-1] - within[0]) * len(within) / (len(within) - 1)
    return Frames(seen.frames, times[wanted] - start, float(length) / count, seen.decoded_hw)


def _window(
    frames: int, fps: float, sampling: FrameSampling, clip: Clip | None, name: str
) -> _Window:
    """qwen_vl_utils' `calculate_video_frame_range` and `smart_nframes`.

    Raises:
      VideoError: clip, too_short.
    """
    first, last = 0, frames - 1
    if clip is not None:
        if _ends_before(frames / fps, clip[1]):
            raise VideoError(
                "clip",
                f"{name}: expected a clip within the file, found {clip[0]:g} to {clip[1]:g} s of "
                f"{frames / fps:.2f} s",
            )
        first = max(0, math.ceil(clip[0] * fps))
        last = min(last, math.floor(clip[1] * fps))
    total = last - first + 1
    count, least = _count(total, fps, sampling), sampling.frames or _FRAME_FACTOR
    if count < least:
        raise VideoError(
            "clip" if clip else "too_short",
            f"{name}: expected at least {least} frames"
            f"{f' within {clip[0]:g} to {clip[1]:g} s' if clip else ''}, found {max(total, 0)}",
        )
    return _Window(first, last, count)


def _count(total: int, fps: float, sampling: FrameSampling) -> int:
    """How many of `total` frames to take; too few where there are too few."""
    if sampling.frames is not None:
        return min(sampling.frames, total)
    lowest = math.ceil(sampling.min_frames / _FRAME_FACTOR) * _FRAME_FACTOR
    highest = math.floor(min(sampling.max_frames, total) / _FRAME_FACTOR) * _FRAME_FACTOR
    count = min(max(total / fps * sampling.fps, lowest), highest)
    return math.floor(count / _FRAME_FACTOR) * _FRAME_FACTOR


class _Seen(NamedTuple):
    """One pass: the time of every frame grabbed (f64[N], seconds, raw), the wanted frames, and
    their size before they were resized."""

    times: np.ndarray
    frames: np.ndarray
    decoded_hw: tuple[int, int]


class _Reader(NamedTuple):
    """Passes over one file; see `decode` for `resize` and `_decode` for `progress`."""

    path: VideoFile
    resize: Resize | None
    progress: Callable[[], None]

    def read(self, capture: cv2.VideoCapture, wanted: np.ndarray, stop: int | None) -> _Seen:
        """Grabs frames up to number `stop` (to the end with None) and keeps the wanted ones.

        `wanted` is sorted and may repeat numbers. Frames past the end of the file stay black: the
        caller sees from `times` that they were not reached. Without wanted frames none are kept.
        """
        places: dict[int, slice] = {}
        for number in np.unique(wanted):
            first, last = np.searchsorted(wanted, [number, number + 1])
            places[int(number)] = slice(int(first), int(last))
        times: list[float] = []
        frames = np.empty((0, 0, 0, 3), np.uint8)
        decoded_hw = (0, 0)
        try:
            while (stop is None or len(times) <= stop) and capture.grab():
                self.progress()
                place = places.get(len(times))
                times.append(capture.get(cv2.CAP_PROP_POS_MSEC) / 1000)
                if place is None:
                    continue
                ok, picture = capture.retrieve()
                if not ok or picture is None:
                    raise VideoError(
                        "truncated", f"{self.path}: cannot decode frame {len(times) - 1}"
                    )
                # All of the first one's size: OpenCV scales where a stream changes it.
                decoded_hw = picture.shape[:2]
                if self.resize is not None:
                    picture = self.resize(picture, len(wanted))
                if not frames.size:
                    frames = np.zeros((len(wanted), *picture.shape), np.uint8)
                frames[place] = cv2.cvtColor(picture, cv2.COLOR_BGR2RGB)
        except cv2.error as error:
            raise VideoError("truncated", f"{self.path}: frame {len(times)}: {error}") from error
        return _Seen(np.array(times), frames, decoded_hw)


def _times(raw: np.ndarray, fps: float, path: VideoFile) -> np.ndarray:
    """When each frame is shown, from 0 and strictly increasing, f64[N] seconds.

    Frames that the codec held back to the end may have no time (0.0): they follow at the frame
    rate. Raises `VideoError` where times still do not increase.

        raw (MPEG-4 with B-frames in AVI, 25 frames/s)   0.04, 0.08, 0.12, 0.0
        returned                                         0.00, 0.04, 0.08, 0.12
    """
    if not len(raw):
        return raw
    times = raw.copy()
    timed = np.flatnonzero(raw != 0)
    last = int(timed[-1]) if len(timed) else 0
    held_back = len(raw) - 1 - last
    if held_back <= _MOST_HELD_BACK:
        times[last + 1 :] = times[last] + np.arange(1, held_back + 1) / fps
    steps = np.diff(times)
    if (steps <= 0).any():
        i = int(np.argmax(steps <= 0))
        raise VideoError(
            "timestamps",
            f"{path}: expected frame times that increase, found {times[i]:.4f} s for frame {i} and "
            f"{times[i + 1]:.4f} s for frame {i + 1}; re-encode it to mp4",
        )
    return times - times[0]


def _is_regular(times: np.ndarray, fps: float) -> bool:
    """Whether every frame is shown within half a frame of where the frame rate puts it."""
    expected = np.arange(len(times)) / fps
    return bool(np.abs(times - expected).max(initial=0.0) <= 0.5 / fps + _CLOCK)


def _check_complete(times: np.ndarray, claimed: int, fps: float, path: VideoFile) -> None:
    """Refuses a file that ends early.

    Early in frames *and* in time: where the rate varies, Matroska's count (duration times nominal
    rate) may be far above the true one although nothing is missing. One frame less is never early.
    """
    if len(times) >= min(claimed * _COMPLETE, claimed - 1) and len(times):
        return
    length = float(times[-1]) + 1 / fps if len(times) else 0.0
    regular = _is_regular(times, fps)
    if len(times) >= _FRAME_FACTOR and not regular and length >= _COMPLETE * claimed / fps:
        return
    raise VideoError(
        "truncated",
        f"{path}: expected {claimed} frames ({claimed / fps:.2f} s), found {len(times)} "
        f"({length:.2f} s): the file is cut or damaged",
    )


def _check_duration(times: np.ndarray, expected: float | None, path: VideoFile) -> None:
    end = float(times[-1]) * len(times) / max(1, len(times) - 1)  # the last frame is shown too
    if expected is not None and _ends_before(end, expected):
        raise VideoError(
            "duration",
            f"{path}: expected {expected:g} s as annotated, found {end:.2f} s: the file is cut, or "
            "another video's",
        )


def _ends_before(end: float, expected: float) -> bool:
    return end < expected - max(1.0, 0.05 * expected)
