"""Synthetic clips and questions for the quickstart and the tests: real mp4 files, exact answers.

A clip shows two or three events on a dark, drifting texture. An event is one large bright object,
visible exactly in [start, end); its colour and shape differ from those of the clip's other events.
Three questions are asked of every clip, one per task. Everything is drawn uniformly and
independently, so no question can be answered from its text: a model must look.

    from data.synthetic import SyntheticSpec, write_dataset
    train, evaluation = write_dataset("clips", SyntheticSpec(train_clips=600, eval_clips=300))

Dimension legend: T frames, H rows, W columns, M spans.
"""

from __future__ import annotations

import dataclasses
import json
import os
import random
import secrets
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import cv2
import numpy as np

from data.records import LETTERS, Record, write_atomically, write_manifest

SIDE = 112  # pixels; the quickstart's processor shrinks it to 28
FRAMES_PER_SECOND = 8
STEP = 0.5  # seconds: every boundary lies on a frame that sampling at 2 fps takes
MIN_EVENT, MAX_EVENT = 1.5, 6.0  # seconds
MIN_GAP = 1.0  # seconds between two events
SHAPES = ("circle", "square", "triangle")
COLORS = {  # RGB
    "red": (235, 35, 35),
    "green": (35, 190, 50),
    "blue": (45, 70, 240),
    "yellow": (240, 225, 40),
}
# Changes whenever the same seed yields other clips or questions.
GENERATOR_VERSION = 2
# The names of a clip's events in time order, for the rationales.
_PLACES = {1: ("only",), 2: ("first", "last"), 3: ("first", "then", "last")}
_SPEC_FILE = "dataset.json"
_SPLITS = ("train", "eval")  # the split's index is part of the seed: no scene is in both


class SyntheticError(ValueError):
    """A spec that cannot be met, or a folder that holds another dataset."""


@dataclasses.dataclass(frozen=True)
class SyntheticSpec:
    """What a dataset holds; equal specs give equal scenes and questions.

    Attributes:
      train_clips, eval_clips: clips of the two splits; each has one question per task.
      seed: the scenes of other seeds are other scenes.
      seconds: shortest and longest clip, multiples of 0.5.
      events: fewest and most events of a clip, at most 3 (the shapes of a clip differ).
      late: seconds by which the labels of the training split may lag behind (`delayed`).

    Raises:
      SyntheticError: the events do not fit in the shortest clip, or a number is out of range.
    """

    train_clips: int
    eval_clips: int
    seed: int = 0
    seconds: tuple[float, float] = (8.0, 16.0)
    events: tuple[int, int] = (2, 3)
    late: float = 0.0

    def __post_init__(self) -> None:
        if min(self.train_clips, self.eval_clips) < 1 or self.seed < 0:
            raise SyntheticError(
                f"found train_clips {self.train_clips}, eval_clips {self.eval_clips}, seed "
                f"{self.seed}: each split needs at least one clip, and a seed is not negative"
            )
        if not 1 <= self.events[0] <= self.events[1] <= len(SHAPES):
            raise SyntheticError(
                f"events is {self.events}, expected (fewest, most) between 1 and {len(SHAPES)}"
            )
        if any(value % STEP for value in self.seconds) or self.seconds[0] > self.seconds[1]:
            raise SyntheticError(
                f"seconds is {self.seconds}, expected (shortest, longest) in multiples of {STEP}"
            )
        if self.late < 0 or self.late % STEP:
            raise SyntheticError(f"late is {self.late}, expected 0 or a multiple of {STEP}")
        needed = self.events[1] * (MIN_EVENT + MIN_GAP) - MIN_GAP
        if self.seconds[0] < needed:
            raise SyntheticError(
                f"seconds starts at {self.seconds[0]}, but {self.events[1]} events need {needed}: "
                "lengthen the clips or ask for fewer events"
            )


class Event(NamedTuple):
    """One object on screen in [start, end), seconds."""

    start: float
    end: float
    color: str
    shape: str


class Scene(NamedTuple):
    """All that a clip shows; the texture and the motion follow from the seed."""

    seed: tuple[int, ...]
    duration: float  # seconds
    events: tuple[Event, ...]  # in time order


def scene(
    seed: tuple[int, ...],
    seconds: tuple[float, float] = (8.0, 16.0),
    events: tuple[int, int] = (2, 3),
) -> Scene:
    """Draws a scene, a pure function of its arguments.

    Event lengths are uniform on multiples of 0.5 s among those that fit; the time that is left is
    shared out uniformly, so that a constant answer scores little.
    """
    rng = random.Random(f"scene {seed}")
    steps = rng.randint(int(seconds[0] / STEP), int(seconds[1] / STEP))
    count = rng.randint(*events)
    room = steps - (count - 1) * int(MIN_GAP / STEP)
    while True:
        lengths = [rng.randint(int(MIN_EVENT / STEP), int(MAX_EVENT / STEP)) for _ in range(count)]
        slack = room - sum(lengths)
        if slack >= 0:
            break
    # `count` cuts among `slack + count` places: every way to share out the slack is equally likely.
    cuts = sorted(rng.sample(range(slack + count), count))
    colors = rng.sample(sorted(COLORS), count)
    shapes = rng.sample(SHAPES, count)
    drawn, before = [], 0
    for i in range(count):
        start = cuts[i] - i + before + i * int(MIN_GAP / STEP)
        drawn.append(Event(start * STEP, (start + lengths[i]) * STEP, colors[i], shapes[i]))
        before += lengths[i]
    return Scene(seed, steps * STEP, tuple(drawn))


def delayed(drawn: Scene, late: float) -> Scene:
    """The scene as a hurried annotator notes it: each boundary 0 to `late` seconds after its time.

    A key pressed on noticing something is pressed too late. Labels like these teach a model what
    to look for and how to answer, but not when; that is left to the reward. Delays are uniform on
    multiples of 0.5 s, among those that end with the clip and leave a span.
    """
    rng = random.Random(f"delays {drawn.seed}")
    noted = []
    for event in drawn.events:
        start, end = 1.0, 0.0
        while start >= end or end > drawn.duration:
            start, end = (
                time + STEP * rng.randint(0, int(late / STEP)) for time in (event.start, event.end)
            )
        noted.append(event._replace(start=start, end=end))
    return drawn._replace(events=tuple(noted))


def render(drawn: Scene) -> np.ndarray:
    """The frames of a scene, uint8[T, H, W, 3] RGB at 8 frames per second."""
    rng = np.random.default_rng(list(drawn.seed))
    count = round(drawn.duration * FRAMES_PER_SECOND)
    margin = 24
    coarse = rng.integers(0, 60, (12, 12, 1)) + rng.integers(0, 16, (12, 12, 3))
    large = (SIDE + 2 * margin, SIDE + 2 * margin)
    texture = cv2.resize(coarse.astype(np.float32), large, interpolation=cv2.INTER_LINEAR)
    texture = texture.astype(np.uint8)
    noise = rng.integers(0, 16, (*large, 3), dtype=np.uint8)
    offsets = rng.integers(0, 2 * margin, (count, 2))
    background = Drift(rng, margin - 1)
    motions = [Drift(rng, 7) for _ in drawn.events]
    scales = rng.uniform(0.93, 1.03, len(drawn.events))
    frames = np.empty((count, SIDE, SIDE, 3), np.uint8)
    for i in range(count):
        seconds = i / FRAMES_PER_SECOND
        x, y = (int(margin + offset) for offset in background(seconds))
        frame = texture[y : y + SIDE, x : x + SIDE].copy()
        for event, motion, scale in zip(drawn.events, motions, scales, strict=True):
            if event.start <= seconds < event.end:
                draw_event(frame, event, motion(seconds), scale)
        y, x = offsets[i]
        frames[i] = cv2.add(frame, noise[y : y + SIDE, x : x + SIDE])
    return frames


class Drift:
    """A slow closed curve: offset (x, y) in pixels, at most `reach` from zero, at a time."""

    def __init__(self, rng: np.random.Generator, reach: float):
        self.reach = reach
        self.period = rng.uniform(5.0, 9.0, 2)  # seconds
        self.phase = rng.uniform(0.0, 2 * np.pi, 2)

    def __call__(self, seconds: float) -> np.ndarray:
        return self.reach * np.sin(2 * np.pi * seconds / self.period + self.phase)


def draw_event(frame: np.ndarray, event: Event, offset: np.ndarray, scale: float) -> None:
    """Paints the event's object, a little under half of the frame's area."""
    center = SIDE / 2 + offset
    color = COLORS[event.color]
    fraction = 4  # cv2 takes fixed-point coordinates; sixteenths of a pixel keep the motion smooth
    if event.shape == "circle":
        x, y = (center * 2**fraction).round().astype(int).tolist()
        radius = round(0.39 * SIDE * scale * 2**fraction)
        cv2.circle(frame, (x, y), radius, color, -1, cv2.LINE_AA, fraction)
        return
    if event.shape == "square":
        corners = np.array([(-0.34, -0.34), (0.34, -0.34), (0.34, 0.34), (-0.34, 0.34)])
    else:
        corners = np.array([(0.0, -0.46), (0.49, 0.42), (-0.49, 0.42)])
    points = (center + corners * SIDE * scale) * 2**fraction
    cv2.fillConvexPoly(frame, points.round().astype(np.int32), color, cv2.LINE_AA, fraction)


def questions(drawn: Scene, name: str, video: str) -> list[Record]:
    """One question per task about a scene, a pure function of its arguments.

    Args:
      drawn: the scene.
      name: the stem of the ids, for example "train-00012" gives "train-00012-mcqa".
      video: the clip's path relative to the root.
    """
    rng = random.Random(f"questions {drawn.seed}")
    place = rng.choice(("first", "last"))
    options = tuple(COLORS)
    at_place = drawn.events[0 if place == "first" else -1]
    mcqa = Record(
        id=f"{name}-mcqa",
        video=video,
        task="mcqa",
        question=f"Which color appears {place}?",
        options=options,
        answer=LETTERS[options.index(at_place.color)],
        spans=(),
        duration=drawn.duration,
    )
    grounded = rng.choice(drawn.events)
    tvg = dataclasses.replace(
        mcqa,
        id=f"{name}-tvg",
        task="tvg",
        question=f"When is the {grounded.color} {grounded.shape} visible?",
        options=(),
        answer=None,
        spans=((grounded.start, grounded.end),),
    )
    both = rng.choice(drawn.events)
    gqa = dataclasses.replace(
        mcqa,
        id=f"{name}-gqa",
        task="gqa",
        question=f"Which color is the {both.shape}, and when is it visible?",
        answer=LETTERS[options.index(both.color)],
        spans=((both.start, both.end),),
    )
    return [
        dataclasses.replace(record, rationale=_rationale(drawn, record, asked))
        for record, asked in ((mcqa, at_place), (tvg, grounded), (gqa, both))
    ]


def _rationale(drawn: Scene, record: Record, asked: Event) -> str:
    """Reasoning for the supervised cold start: each event, and whether it is the asked one.

    Seen: first red circle no, last blue square yes C 8.0 to 10.5.

    What the answer holds follows each "yes", so a small model, which learns late to look a word up
    in its own text, needs only to tell whether a word stands in the question.
    """
    seen = []
    for place, event in zip(_PLACES[len(drawn.events)], drawn.events, strict=True):
        words = [place, event.color, event.shape, "yes" if event is asked else "no"]
        if event is asked and record.answer:
            words.append(record.answer)
        if event is asked and record.spans:
            words.append(f"{event.start:.1f} to {event.end:.1f}")
        seen.append(" ".join(words))
    return f"Seen: {', '.join(seen)}."


def write_dataset(
    root: str | os.PathLike[str], spec: SyntheticSpec, threads: int = 2
) -> tuple[Path, Path]:
    """Writes root/{train,eval}/clip_00001.mp4 ... and root/{train,eval}.jsonl.

    Files are renamed into place when complete and the manifests come last, so a finished dataset
    of the same spec is reused, and an interrupted one is completed.

    Returns:
      The paths of the two manifests.

    Raises:
      SyntheticError: the folder holds a dataset of another spec, or a clip cannot be encoded.
    """
    root = Path(root)
    manifests = [root / f"{split}.jsonl" for split in _SPLITS]
    _claim(root, spec)
    with ThreadPoolExecutor(max(1, threads)) as pool:
        for index, split in enumerate(_SPLITS):
            (root / split).mkdir(exist_ok=True)
            records: list[Record] = []
            scenes, paths = [], []
            for number in range(1, (spec.train_clips, spec.eval_clips)[index] + 1):
                drawn = scene((spec.seed, index, number), spec.seconds, spec.events)
                video = f"{split}/clip_{number:05d}.mp4"
                noted = delayed(drawn, spec.late) if split == "train" else drawn
                records += questions(noted, f"{split}-{number:05d}", video)
                if not (root / video).is_file():
                    scenes.append(drawn)
                    paths.append(root / video)
            list(pool.map(lambda path, drawn: write_clip(path, render(drawn)), paths, scenes))
            if not manifests[index].is_file():
                write_manifest(manifests[index], records)
    return manifests[0], manifests[1]


def _claim(root: Path, spec: SyntheticSpec) -> None:
    """Marks the folder as holding this spec; a folder that holds another is refused."""
    content = json.dumps(dataclasses.asdict(spec) | {"version": GENERATOR_VERSION}, indent=1)
    path = root / _SPEC_FILE
    if path.is_file():
        if path.read_text(encoding="utf-8") != content:
            raise SyntheticError(
                f"{path} describes another dataset than the one asked for ({spec}, version "
                f"{GENERATOR_VERSION}): choose another folder, or delete {root}"
            )
        return
    root.mkdir(parents=True, exist_ok=True)
    write_atomically(path, content)


def write_clip(path: Path, frames: np.ndarray) -> None:
    """An mp4 of u8[T, H, W, 3] RGB at 8 frames per second, renamed into place when complete."""
    # Two processes may fill one folder at once, on different hosts too.
    partial = path.with_name(f"partial_{os.getpid()}_{secrets.token_hex(4)}_{path.name}")
    fourcc = cv2.VideoWriter.fourcc(*"mp4v")
    writer = cv2.VideoWriter(str(partial), fourcc, FRAMES_PER_SECOND, frames.shape[2:0:-1])
    if not writer.isOpened():
        raise SyntheticError(f"{partial} cannot be written: is the folder writable, the disk full?")
    for frame in frames:
        writer.write(frame[:, :, ::-1])
    writer.release()
    partial.replace(path)
