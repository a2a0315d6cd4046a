"""Clips spliced from real films: the questions of `data.synthetic`, in another world.

Behind the objects, in the place of a dark texture, run shots of films that test dependencies
bring: real cameras, light and motion, and cuts, which are no event. Spans are known by
construction.
"""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np

from data.records import Record, write_manifest
from data.synthetic import (
    FRAMES_PER_SECOND,
    SIDE,
    Drift,
    Scene,
    draw_event,
    questions,
    scene,
    write_clip,
)
from data.video import FrameSampling, decode

FILMS = ("bikes", "bigbuckbunny", "carphone_pristine", "cityCC0")
SHOT = (1.5, 4.0)  # seconds of a shot, at least and at most
_SEED = 1_000_003  # no scene of another dataset


def write_spliced(root: Path, films: dict[str, Path], clips: int) -> Path:
    """Writes root/spliced/clip_00001.mp4 ... and root/spliced.jsonl, unless they are there.

    Args:
      films: the files of FILMS, by name.
      clips: how many; each has one question per task.

    Returns:
      The manifest.
    """
    manifest = root / "spliced.jsonl"
    if manifest.is_file():
        return manifest
    (root / "spliced").mkdir(parents=True, exist_ok=True)
    footage = [film_frames(films[name]) for name in FILMS]
    records: list[Record] = []
    for number in range(1, clips + 1):
        drawn = scene((_SEED, 0, number))
        video = f"spliced/clip_{number:05d}.mp4"
        write_clip(root / video, render_spliced(drawn, footage))
        records += questions(drawn, f"spliced-{number:05d}", video)
    write_manifest(manifest, records)
    return manifest


def film_frames(path: Path) -> np.ndarray:
    """A film as u8[T, H, W, 3] RGB at 8 frames per second, its shorter side 112 pixels."""

    def shrink(frame: np.ndarray, _: int) -> np.ndarray:
        height, width = (round(side * SIDE / min(frame.shape[:2])) for side in frame.shape[:2])
        return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)

    return decode(path, FrameSampling(fps=FRAMES_PER_SECOND), resize=shrink).frames


def render_spliced(drawn: Scene, footage: list[np.ndarray]) -> np.ndarray:
    """The frames of a scene over shots, each a part of a film drawn anew: u8[T, H, W, 3] RGB."""
    rng = np.random.default_rng(list(drawn.seed))
    count = round(drawn.duration * FRAMES_PER_SECOND)
    shots: list[np.ndarray] = []
    while sum(map(len, shots)) < count:
        film = footage[rng.integers(len(footage))]
        length = min(round(rng.uniform(*SHOT) * FRAMES_PER_SECOND), len(film))
        start = rng.integers(len(film) - length + 1)
        top, left = (rng.integers(side - SIDE + 1) for side in film.shape[1:3])
        shot = film[start : start + length, top : top + SIDE, left : left + SIDE]
        shots.append(shot[:, :, :: rng.choice((-1, 1))])
    frames = np.ascontiguousarray(np.concatenate(shots)[:count])
    motions = [Drift(rng, 7) for _ in drawn.events]
    scales = rng.uniform(0.93, 1.03, len(drawn.events))
    for i, frame in enumerate(frames):
        seconds = i / FRAMES_PER_SECOND
        for event, motion, scale in zip(drawn.events, motions, scales, strict=True):
            if event.start <= seconds < event.end:
                draw_event(frame, event, motion(seconds), scale)
    return frames
