"""Decoding and resizing real films, beside qwen_vl_utils on the same files and frames.

    python -m benchmarks.video [--rounds 7]

Writes benchmarks/video.json and benchmarks/video.md. Ours is a whole prompt, down to patches in
window order; theirs ends with the resized frames that `qwen_vl_utils.fetch_video` returns, before
transformers' processor. Its readers:

    all to RGB     its torchvision reader, on a stand-in for `torchvision.io.read_video` that does
                   the same with PyAV: every frame becomes RGB, then the chosen ones are taken
    chosen to RGB  the best that can be done with PyAV: only the chosen frames become RGB
    decord         its decord reader, if decord is installed

One thread each; the sides take turns. Times are CPU time, which other programs on the machine
disturb least, and wall time beside it; medians. A pixel difference is the mean of |difference| in
grey levels to torch's antialiased bicubic resize in float64, clipped and rounded.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.util
import json
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import av
import cv2
import numpy as np
import torch

from data.frames import open_store
from data.records import Record
from data.sources import FolderClips
from data.video import decode
from jaxgrpo.config import DataSection
from jaxgrpo.inputs import PromptLoader, frame_sampling, messages, pixel_limits
from models.qwen2_5_vl.processor import Processor, Video
from models.qwen2_5_vl.resize import exact, pillow
from tests.data.clips import real_clips
from tests.oracle import hf_processing as hf

HERE = Path(__file__).parent
JSON, TABLE = HERE / "video.json", HERE / "video.md"
MODEL = HERE.parent / "models" / "tiny"  # for its processor, whose patches are the release's
QUESTION = Record("q", "", "tvg", "When does it begin?", (), None, ((0.0, 1.0),), None, None)
FILMS = ("bikes", "bigbuckbunny", "carphone_pristine", "cityCC0")
LIMITS = {
    "qwen_vl_utils": {"min_pixels": 128 * 784, "total_pixels": 115_200 * 784},  # its defaults
    "the paper": {"min_pixels": 4 * 784, "total_pixels": 2048 * 784},  # its released script
}


class Timed(NamedTuple):
    """Seconds, medians over the rounds."""

    cpu: float
    wall: float


def timed(sides: dict[str, Callable[[], Any]], rounds: int) -> dict[str, Timed]:
    """Runs the sides in turn, `rounds` times after one that does not count."""
    found: dict[str, list[Timed]] = {name: [] for name in sides}
    for number in range(rounds + 1):
        for name, side in sides.items():
            cpu, wall = time.process_time(), time.perf_counter()
            side()
            spent = Timed(time.process_time() - cpu, time.perf_counter() - wall)
            found[name] += [spent] if number else []
    return {
        name: Timed(*(statistics.median(column) for column in zip(*times, strict=True)))
        for name, times in found.items()
    }


# ---- their side ----


def read_all(element: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
    """qwen_vl_utils' own torchvision reader, on PyAV."""

    def read_video(path: str, **_: Any) -> tuple[torch.Tensor, None, dict[str, float]]:
        with av.open(path) as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            frames = [frame.to_rgb().to_ndarray() for frame in container.decode(stream)]
            info = {"video_fps": float(stream.average_rate)}
        return torch.as_tensor(np.stack(frames)).permute(0, 3, 1, 2), None, info

    module = hf.qwen_vl_utils()
    with mock.patch.object(module, "io", mock.Mock(read_video=read_video), create=True):
        return module._read_video_torchvision(element)


def read_chosen(element: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any], float]:
    """The same frames, without converting the others."""
    module = hf.qwen_vl_utils()
    with av.open(element["video"]) as container:
        stream = container.streams.video[0]
        stream.codec_context.thread_count = 1
        fps = float(stream.average_rate)
        frames = container.streams.video[0].frames or round(container.duration * fps / av.time_base)
        count = module.smart_nframes(element, frames, fps)
        chosen = set(torch.linspace(0, frames - 1, count).round().long().tolist())
        pictures = [
            frame.to_rgb().to_ndarray()
            for number, frame in enumerate(container.decode(stream))
            if number in chosen
        ]
    return torch.as_tensor(np.stack(pictures)).permute(0, 3, 1, 2), {}, count / frames * fps


def readers() -> dict[str, Callable[[dict[str, Any]], Any]]:
    found = {"all to RGB": read_all, "chosen to RGB": read_chosen}
    if importlib.util.find_spec("decord"):
        found["decord"] = hf.qwen_vl_utils()._read_video_decord
    return found


def fetch(path: Path, limits: dict[str, int], read: Callable[..., Any]) -> torch.Tensor:
    """float[T, 3, h, w]: what qwen_vl_utils makes of a file."""
    module = hf.qwen_vl_utils()
    with (
        mock.patch.dict(module.VIDEO_READER_BACKENDS, {"torchvision": read}),
        mock.patch.object(module, "get_video_reader_backend", lambda: "torchvision"),
    ):
        return module.fetch_video({"video": str(path), **limits})


# ---- the measurements ----


def interpolate(frames: np.ndarray, size: tuple[int, int], dtype: torch.dtype) -> np.ndarray:
    """torch's antialiased bicubic resize of u8[T, H, W, 3], computed in a type."""
    pixels = torch.from_numpy(frames).permute(0, 3, 1, 2).to(dtype)
    resized = torch.nn.functional.interpolate(pixels, size=size, mode="bicubic", antialias=True)
    return resized.clamp(0, 255).round().permute(0, 2, 3, 1).numpy().astype(np.int16)


def differences(path: Path, loader: PromptLoader) -> dict[str, float]:
    """How far each side's resize is from the exact one, and our decoder from PyAV."""
    sampling = frame_sampling(loader.data)
    whole = decode(path, sampling).frames
    size = decode(path, sampling, None, None, loader.processor.resize_frame).frames.shape[1:3]
    truth = interpolate(whole, size, torch.float64)

    def mean(frames: Any) -> float:
        return float(np.abs(frames - truth).mean())

    theirs, _, _ = read_all({"video": str(path)})
    decoded = np.abs(theirs.permute(0, 2, 3, 1).numpy().astype(np.int16) - whole)
    return {
        "ours": mean(np.stack([exact(frame, *size) for frame in whole])),
        "qwen_vl_utils": mean(interpolate(whole, size, torch.float32)),
        "torch uint8": mean(interpolate(whole, size, torch.uint8)),
        "Pillow": mean(np.stack([pillow(frame, *size) for frame in whole])),
        "decoded, to PyAV": float(decoded.mean()),
    }


def parts(path: Path, loader: PromptLoader, rounds: int) -> dict[str, float]:
    """CPU milliseconds of a prompt's parts, and of one part if Pillow did it."""
    sampling, processor = frame_sampling(loader.data), loader.processor

    def grab() -> None:
        capture = cv2.VideoCapture(str(path), cv2.CAP_FFMPEG, [cv2.CAP_PROP_N_THREADS, 1])
        while capture.grab():
            pass

    by_pillow = dataclasses.replace(processor, resize=pillow)
    frames = decode(path, sampling, None, None, processor.resize_frame)
    video = Video(frames.frames, frames.seconds_per_frame, frames.decoded_hw)
    steps = {
        "decoding": grab,
        "chosen frames": lambda: decode(path, sampling),
        "resizing": lambda: decode(path, sampling, None, None, processor.resize_frame),
        "resizing by Pillow": lambda: decode(path, sampling, None, None, by_pillow.resize_frame),
        "patches, tokens": lambda: processor(messages(QUESTION, True), [video]),
    }
    spent = {name: time_.cpu * 1000 for name, time_ in timed(steps, rounds).items()}
    spent["resizing"] -= spent["chosen frames"]
    spent["resizing by Pillow"] -= spent["chosen frames"]
    spent["chosen frames"] -= spent["decoding"]
    return spent


def loader_of(path: Path, limits: dict[str, int], store: Path | None = None) -> PromptLoader:
    data = DataSection(eval="unread.jsonl", root=str(path.parent), **limits)
    processor = Processor.load(MODEL, pixel_limits(data))
    record = dataclasses.replace(QUESTION, video=path.name)
    kept = open_store(str(store), 1.0) if store else None
    return PromptLoader(processor, (record,), data, FolderClips(str(path.parent)), store=kept)


def measure(path: Path, limits: dict[str, int], rounds: int) -> dict[str, Any]:
    """Everything about one film under one setting."""
    loader = loader_of(path, limits)
    sides: dict[str, Callable[[], Any]] = {"ours": lambda: loader(0)}
    for name, read in readers().items():
        sides[name] = lambda read=read: fetch(path, limits, read)
    with tempfile.TemporaryDirectory() as folder:
        stored = loader_of(path, limits, Path(folder))
        cpu, wall = time.process_time(), time.perf_counter()
        first = stored(0)
        filling = Timed(time.process_time() - cpu, time.perf_counter() - wall)
        again = timed({"again": lambda: stored(0)}, rounds)["again"]
        np.testing.assert_array_equal(stored(0).patches, first.patches)
    frames = decode(path, frame_sampling(loader.data), None, None, loader.processor.resize_frame)
    return {
        "decoded": [len(frames.frames), *frames.decoded_hw],
        "resized": list(frames.frames.shape[1:3]),
        "seconds": {name: time_._asdict() for name, time_ in timed(sides, rounds).items()},
        "frame store": {"first": filling._asdict(), "again": again._asdict()},
        "differences": differences(path, loader),
        "parts": parts(path, loader, rounds),
    }


# ---- the report ----


def table(report: dict[str, Any]) -> str:
    """benchmarks/video.md."""
    films, names = report["films"], report["readers"]
    ratios = ", ".join(f"{name} {ratio:.2f}" for name, ratio in report["ratios"].items())
    before, after = report["load"]
    lines = [
        f"""# Decoding and resizing, beside qwen_vl_utils

Made by `{report["command"]}` on {report["machine"]}; {report["versions"]};
load average {before:.1f} before, {after:.1f} after. [video.py](video.py) says what the sides are.

CPU milliseconds for one film, and how many times as long as ours theirs takes (in brackets: by the
wall clock). Ours includes cutting patches, theirs does not.

| film | limits | frames | ours | {" | ".join(names)} |
{"| --- " * (4 + len(names))}|"""
    ]
    for row in films:
        count, height, width = row["decoded"]
        times = row["seconds"]
        ours = times["ours"]
        cells = [
            f"{times[name]['cpu'] * 1000:.0f}: {times[name]['cpu'] / ours['cpu']:.2f} "
            f"({times[name]['wall'] / ours['wall']:.2f})"
            for name in names
        ]
        shapes = f"{count} of {width}x{height} to {row['resized'][1]}x{row['resized'][0]}"
        lines.append(
            f"| {row['film']} | {row['limits']} | {shapes} | {ours['cpu'] * 1000:.0f} | "
            f"{' | '.join(cells)} |"
        )
    lines.append(
        f"""
Geometric means of the ratios: {ratios}. Decoding itself, FFmpeg on all sides, is the limit: where
frames are small it is nearly everything.

## Pixels

Mean difference in grey levels of the resized frames to the exact resize of the same decoded frames,
and of our decoded frames to PyAV's (which interpolates the colours of 405 rows in another way).

| film | limits | {" | ".join(films[0]["differences"])} |
{"| --- " * (2 + len(films[0]["differences"]))}|"""
    )
    for row in films:
        cells = [f"{value:.5f}" for value in row["differences"].values()]
        lines.append(f"| {row['film']} | {row['limits']} | {' | '.join(cells)} |")
    lines.append(
        f"""
## Where our time goes, and the frame store

CPU milliseconds. With `data.frame_store`: the first time (decoded and written), and later (read and
checked; in brackets, how many times faster than decoding).

| film | limits | {" | ".join(films[0]["parts"])} | store, first | store, later |
{"| --- " * (4 + len(films[0]["parts"]))}|"""
    )
    for row in films:
        cells = [f"{value:.1f}" for value in row["parts"].values()]
        first, again = (row["frame store"][name]["cpu"] for name in ("first", "again"))
        faster = row["seconds"]["ours"]["cpu"] / again
        cells += [f"{first * 1000:.0f}", f"{again * 1000:.1f} ({faster:.1f})"]
        lines.append(f"| {row['film']} | {row['limits']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    cv2.setNumThreads(1)
    before = os.getloadavg()[0]
    clips = real_clips()
    films = []
    for film in FILMS:
        for name, limits in LIMITS.items():
            print(f"{film}, limits of {name} ...", flush=True)
            found = measure(clips[film], limits, options.rounds)
            films.append({"film": film, "limits": name, **found})
    names = list(readers())
    ratios = {
        name: statistics.geometric_mean(
            row["seconds"][name]["cpu"] / row["seconds"]["ours"]["cpu"] for row in films
        )
        for name in names
    }
    report = {
        "command": f"python -m benchmarks.video --rounds {options.rounds}",
        "machine": f"{_processor()}, {os.cpu_count()} cores, {platform.system()}",
        "versions": f"OpenCV {cv2.__version__}, PyAV {av.__version__}, torch {torch.__version__}",
        "load": [before, os.getloadavg()[0]],
        "readers": names,
        "ratios": ratios,
        "films": films,
    }
    JSON.write_text(json.dumps(report, indent=1) + "\n")
    TABLE.write_text(table(report))
    print(f"wrote {JSON} and {TABLE}")


def _processor() -> str:
    """What the machine calls its processor."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((x.partition(": ")[2] for x in lines if x.startswith("model name")), "unknown")


if __name__ == "__main__":
    main()
