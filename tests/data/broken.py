"""Broken and odd videos, made on the spot, and what is to become of each."""

from __future__ import annotations

import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import av
import cv2
import numpy as np

from tests.data import clips
from tests.data.clips import FPS, HEIGHT, WIDTH, picture, write_clip

RIGHT = "right"  # PyAV's frames at PyAV's times
UPRIGHT = "upright"  # the same, turned as the file says
SCALED = "scaled"  # the same, later frames in the size of the first


class Case(NamedTuple):
    """How a file is made, and what `decode` is to do: a word of above, or a kind of VideoError."""

    make: Callable[[Path], object]
    outcome: str
    suffix: str = "mp4"
    seconds: float | None = None  # the annotated duration that gives it away


def _edited(
    edit: Callable[[bytearray], bytes | bytearray], **how: object
) -> Callable[[Path], None]:
    """A maker of a damaged copy."""

    def make(path: Path) -> None:
        write_clip(path, **how)
        path.write_bytes(edit(bytearray(path.read_bytes())))

    return make


FASTSTART = {"container_options": {"movflags": "faststart"}}


def _media(data: bytearray) -> tuple[int, int]:
    """Where the coded pictures of an mp4 without fast start begin and end."""
    begin = data.find(b"mdat") + 4
    return begin, begin - 8 + struct.unpack(">I", data[begin - 8 : begin - 4])[0]


def _zero_a_hole(data: bytearray) -> bytearray:
    begin, end = _media(data)
    third = (end - begin) // 3
    data[begin + third : begin + 2 * third] = bytes(third)
    return data


def _without_index(data: bytearray) -> bytes:
    """An AVI whose index was never written, as by a recorder that lost power."""
    return bytes(data[: data.rfind(b"idx1")])


def _lying_count(data: bytearray) -> bytearray:
    """An AVI whose header says that it has four times as many frames."""
    frames = struct.pack("<I", 50)
    for _ in range(2):  # in the file's header and in the stream's
        data[data.find(frames) : data.find(frames) + 4] = struct.pack("<I", 200)
    return data


def _lying_size(data: bytearray) -> bytearray:
    """An mp4 whose index says that its pictures have 60,000 x 60,000 pixels."""
    place = data.find(b"avc1") + 4 + 24
    data[place : place + 4] = struct.pack(">HH", 60_000, 60_000)
    return data


def write_odd(path: Path, codec: str, pix_fmt: str, width: int, height: int) -> None:
    """A clip in another pixel format or size."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=FPS)
        stream.width, stream.height, stream.pix_fmt = width, height, pix_fmt
        for number in range(50):
            pixels = cv2.resize(picture(number), (width, height))
            frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            frame.pts = number
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_huge(path: Path) -> None:
    """Raw pixels in AVI that claim to be 30,000 x 30,000."""
    write_odd(path, "rawvideo", "bgr24", WIDTH, HEIGHT)
    data = bytearray(path.read_bytes())
    header = data.find(b"strf") + 8
    data[header + 4 : header + 12] = struct.pack("<ii", 30_000, 30_000)
    path.write_bytes(data)


def flip_bit(path: Path, number: int) -> None:
    """An mp4 one of whose bits, another for each number, is not what was written."""
    write_clip(path)
    data = bytearray(path.read_bytes())
    begin, end = _media(data)
    data[begin + 1500 + number * 97 % (end - begin - 1500)] ^= 0x10
    path.write_bytes(data)


def write_several_streams(path: Path) -> None:
    """Sound, the video, and a smaller second video (a preview)."""
    with av.open(str(path), "w") as container:
        sound = container.add_stream("aac", rate=16_000)
        videos = []
        for scale in (1, 2):
            stream = container.add_stream("libx264", rate=FPS)
            stream.width, stream.height = WIDTH // scale, HEIGHT // scale
            stream.pix_fmt = "yuv420p"
            videos.append(stream)
        silence = av.AudioFrame.from_ndarray(
            np.zeros((1, 32_000), np.float32), format="fltp", layout="mono"
        )
        silence.rate, silence.pts = 16_000, 0
        container.mux(sound.encode(silence))
        for number in range(50):
            for stream in videos:
                pixels = cv2.resize(picture(number), (stream.width, stream.height))
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
        for stream in (sound, *videos):
            container.mux(stream.encode())


def write_jpeg(path: Path) -> None:
    ok, data = cv2.imencode(".jpg", picture(0))
    assert ok
    path.write_bytes(data.tobytes())


def write_raw(path: Path) -> None:
    """H.264 without a container."""
    with av.open(str(path), "w", format="h264") as container:
        stream = container.add_stream("libx264", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        for number in range(50):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())


def write_renamed(path: Path, suffix: str) -> None:
    """A good file of another container, with this one's name."""
    made = write_clip(path.with_name(f"{path.stem}-made.{suffix}"))
    made.rename(path)


def write_cut_program_stream(path: Path) -> None:
    """MPEG-PS has no index and no count: a cut one looks like a shorter one."""
    write_clip(path, 250, codec="mpeg2video", b_frames=0)
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])


LATE_MS = [5000 + 40 * number for number in range(50)]
VARIABLE_MS = np.cumsum(np.random.default_rng(0).integers(20, 200, 60)).tolist()

CASES: dict[str, Case] = {
    # ---- no video at all ----
    "zero bytes": Case(lambda path: path.touch(), "empty"),
    "text": Case(lambda path: path.write_text("not a video\n" * 100), "unreadable"),
    "zeros": Case(lambda path: path.write_bytes(bytes(10_000)), "unreadable"),
    "a PNG": Case(clips.write_png, "frame_count"),
    "a JPEG": Case(write_jpeg, "frame_count"),
    "sound only": Case(clips.write_audio, "unreadable"),
    "a folder": Case(lambda path: path.mkdir(), "missing"),
    "a FIFO": Case(os.mkfifo, "missing"),
    "no file": Case(lambda path: None, "missing"),
    # ---- damaged ----
    "cut, index in front": Case(clips.write_cut, "truncated"),
    "cut, index at the end": Case(_edited(lambda data: data[: len(data) // 2]), "unreadable"),
    "cut MPEG-PS": Case(write_cut_program_stream, "duration", "mpg", seconds=10.0),
    "cut MPEG-TS": Case(
        _edited(lambda data: data[: len(data) // 2], frames=250), "duration", "ts", seconds=10.0
    ),
    "a lying count": Case(_edited(_lying_count, codec="mpeg4", b_frames=0), "truncated", "avi"),
    "no index": Case(_edited(_without_index, codec="mpeg4", b_frames=0), RIGHT, "avi"),
    "a lying size": Case(_edited(_lying_size), RIGHT),
    "a huge size": Case(write_huge, "truncated", "avi"),
    "times that stand still": Case(clips.write_repeated_time, "timestamps", "mkv"),
    "a hole of zeros": Case(_edited(_zero_a_hole), "truncated"),
    "bytes behind the end": Case(_edited(lambda data: data + bytes(5000)), RIGHT),
    # ---- odd, and good ----
    "one frame": Case(lambda path: write_clip(path, 1), "too_short"),
    "a variable rate": Case(lambda path: write_clip(path, 60, times_ms=VARIABLE_MS), RIGHT),
    "a late start": Case(lambda path: write_clip(path, 50, times_ms=LATE_MS), RIGHT),
    "a lost head": Case(lambda path: write_clip(path, 50, times_ms=LATE_MS), "truncated", "mkv"),
    "rotated": Case(lambda path: clips.write_rotated(path, 90), UPRIGHT),
    "odd sides": Case(lambda path: write_odd(path, "libx264", "yuv444p", 63, 47), RIGHT),
    "10 bits": Case(lambda path: write_odd(path, "libx264", "yuv420p10le", 64, 48), RIGHT),
    "grey": Case(lambda path: write_odd(path, "libx264", "gray", 64, 48), RIGHT),
    "several streams": Case(write_several_streams, RIGHT),
    "a size that changes": Case(clips.write_growing, SCALED, "ts"),
    "B-frames in AVI": Case(lambda path: write_clip(path, codec="mpeg4"), RIGHT, "avi"),
    "Matroska named mp4": Case(lambda path: write_renamed(path, "mkv"), RIGHT),
    "mp4 named text": Case(lambda path: write_renamed(path, "mp4"), RIGHT, "txt"),
    "no container": Case(write_raw, "frame_count", "h264"),
}
