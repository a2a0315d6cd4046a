"""`jaxgrpo inspect CONFIG`: what a run would train on, before anything is rented.

Everything is made by what training itself uses: the same manifests, probes, buckets, step plan,
prompts, frames and rewards. The model's weights are not read, and no device is used but the CPU.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
from PIL import Image

from data.probe import Probe, VideoError
from data.prompts import target_text
from data.records import Record, write_atomically
from data.storage import is_url
from jaxgrpo.config import Config, to_dict
from jaxgrpo.dataset import Dataset
from jaxgrpo.evaluate import truth_text
from jaxgrpo.inputs import InputError, Inputs, check_fits, measure, prompt_loader, sort_into_buckets
from jaxgrpo.inspection import page, survey
from jaxgrpo.inspection.contact_sheet import contact_sheet, frames_of
from jaxgrpo.inspection.findings import counted, problem, warnings
from jaxgrpo.inspection.survey import Survey
from jaxgrpo.load import open_processor
from jaxgrpo.output import OutputError
from jaxgrpo.scoring import open_reward
from models.qwen2_5_vl.processor import Processor, Prompt

FIGURES = "inspect.json"
PAGE = "index.html"
HISTOGRAMS = "figures.png"

_TRIES = 5  # items of a task that are decoded, until one can be


@dataclass(frozen=True)
class Shown:
    """An item as the model gets it."""

    id: str
    task: str
    video: str
    question: str
    options: tuple[str, ...]
    truth: str
    prompt: str  # the decoded tokens
    right_completion: str
    frames: int
    frame_size: str  # "WIDTH x HEIGHT", pixels
    times: tuple[float, ...]  # of the frames, seconds from the start of what is shown
    seconds_per_frame: float  # the model's clock
    picture: str  # a file beside the page


@dataclass(frozen=True)
class Inspection:
    """All that was found."""

    problems: tuple[str, ...]  # why training would refuse to start
    warnings: tuple[str, ...]
    train: Survey
    evaluation: Survey
    shown: tuple[Shown, ...]

    @property
    def trainable(self) -> bool:
        return not self.problems

    @property
    def verdict(self) -> str:
        """One line."""
        if not self.trainable:
            return f"CANNOT be trained on yet: {counted(len(self.problems), 'problem')} to mend"
        told = counted(len(self.warnings), "warning") if self.warnings else "no warnings"
        return f"can be trained on, {told}"


def main(config: Config, out: str | None, as_json: bool, show: Sequence[str]) -> int:
    """Writes the report and prints its summary; 0 if the data can be trained on, 2 if not.

    Args:
      config: of the run.
      out: the folder to write; None: run_dir with "-inspect" behind it, here if that is in a
        bucket.
      as_json: print the figures instead.
      show: ids of training items to show beside the first of each task.

    Raises:
      OutputError: the folder holds something else.
      InputError: an id of `show` is not there, or see `inputs.measure`.
      RewardError, ManifestError, StorageError, VideoError: see there.
    """
    jax.config.update("jax_platforms", "cpu")  # rewards need no more; it may be another's device
    folder = _folder(config, out)
    with contextlib.redirect_stdout(sys.stderr):  # only the result goes to stdout
        found, pictures = inspect(config, show)
        pictures[HISTOGRAMS] = page.histograms(found.train)
    figures = {
        "trainable": found.trainable,
        "verdict": found.verdict,
        **dataclasses.asdict(found),
        "config": to_dict(config),
    }
    text = json.dumps(figures, indent=1, allow_nan=False)
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob("item-*.png"):
        stale.unlink()
    for name, picture in pictures.items():
        (folder / name).write_bytes(picture)
    write_atomically(folder / PAGE, page.page(found, config, HISTOGRAMS))
    write_atomically(folder / FIGURES, text)
    if as_json:
        print(text)
    else:
        print(page.summary(found))
        beside = ", ".join([FIGURES, *sorted(pictures)])
        print(f"wrote {folder / PAGE}, and beside it {beside}")
        again = "mend the problems above, then run the same command again"
        print(f"next: {'jaxgrpo train CONFIG' if found.trainable else again}")
    return 0 if found.trainable else 2


def inspect(config: Config, show: Sequence[str]) -> tuple[Inspection, dict[str, bytes]]:
    """What was found, and the contact sheets as PNG by name of file; see `main`."""
    reward = open_reward(config)
    processor = open_processor(config, weights=False)
    print("reading the manifests and probing the videos ...", flush=True)
    measured, excluded = measure(config, processor, train=True, evaluation=True)
    largest = config.data.buckets[-1]
    fitting = {}
    for key, part in measured.items():
        fits = [(record, size) for record, size in part.usable if size.tokens <= largest]
        if not fits:
            check_fits(key, part.usable, config.data.buckets)
        fitting[key] = part._replace(usable=fits)
    inputs = sort_into_buckets(config, processor, fitting, excluded)
    assert inputs.train is not None and inputs.evaluation is not None
    print("scoring the right answers ...", flush=True)
    limited = open_reward(config, config.eval.max_new_tokens)
    found = {
        key: survey.survey(config, key, measured[key], dataset, excluded, processor, scorer)
        for key, dataset, scorer in (
            ("data.train", inputs.train, reward),
            ("data.eval", inputs.evaluation, limited),
        )
    }
    problems = [
        problem(key, part, largest, survey.mend_overflows(config, processor, measured[key]))
        for key, part in found.items()
        if part.overflows
    ]
    told = [text for key, part in found.items() for text in warnings(key, part, config)]
    print("decoding the items that are shown ...", flush=True)
    shown: dict[int, Shown] = {}
    pictures = {}
    for items in _chosen(inputs.train, show):
        for item in items[:_TRIES]:
            try:
                one, picture = _show(config, inputs, item, measured["data.train"].probes)
            except VideoError as error:
                name = inputs.train.records[item].id
                told.append(f"data.train: {name} cannot be decoded: {error.kind}: {error}")
                continue
            shown[item], pictures[one.picture] = one, picture
            break
    done = Inspection(
        tuple(problems), tuple(told), found["data.train"], found["data.eval"], tuple(shown.values())
    )
    return done, pictures


def _folder(config: Config, out: str | None) -> Path:
    """Where the report goes: nothing, an empty folder, or an earlier report."""
    if out is None:
        run_dir = config.run_dir.rstrip("/")
        out = f"{run_dir.rpartition('/')[2] if is_url(run_dir) else run_dir}-inspect"
    folder = Path(out)
    if is_url(out) or (folder.exists() and not folder.is_dir()):
        raise OutputError(f"--out {out}: expected a local folder")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / FIGURES).is_file():
        raise OutputError(
            f"--out {out} holds files but no {FIGURES} of an earlier inspection: name another "
            "folder, or empty it"
        )
    return folder


# ---- the items that are shown ----


def _chosen(dataset: Dataset, show: Sequence[str]) -> list[list[int]]:
    """Lists of items of which the first that can be decoded is shown: those asked for one by one,
    and all of each task."""
    numbers = {record.id: item for item, record in enumerate(dataset.records)}
    if unknown := [name for name in show if name not in numbers]:
        raise InputError(
            f"--show {unknown[0]}: data.train has no such item that can be read and fits a bucket"
        )
    of_task: dict[str, list[int]] = {}
    for item, record in enumerate(dataset.records):
        of_task.setdefault(record.task, []).append(item)
    return [[numbers[name]] for name in dict.fromkeys(show)] + list(of_task.values())


def _show(config: Config, inputs: Inputs, item: int, probes: dict[str, Any]) -> tuple[Shown, bytes]:
    """The item as it is loaded for training, and its contact sheet as PNG."""
    assert inputs.train is not None
    load = prompt_loader(inputs, inputs.train, config.data)
    record = inputs.train.records[item]
    frames = load.frames(item)
    prompt = load.prompt(item, frames)
    seen = frames_of(prompt, inputs.processor.config.vision)
    times = frames.timestamps
    probe = probes[record.id]
    assert isinstance(probe, Probe), "the item was measured"
    seconds = survey.seconds_shown(record, probe)
    sheet = contact_sheet(f"{record.id} ({record.task})", seen, times, record.spans, seconds)
    _, height, width, _ = seen.shape
    shown = Shown(
        id=record.id,
        task=record.task,
        video=load.clips.name(record.video),
        question=record.question,
        options=record.options,
        truth=truth_text(record),
        prompt=prompt_text(prompt, inputs.processor),
        right_completion=_right_completion(record, config.data.thinking),
        frames=len(seen),
        frame_size=f"{width} x {height}",
        times=tuple(np.round(times, 4).tolist()),
        seconds_per_frame=frames.seconds_per_frame,
        picture=f"item-{item}-{record.task}.png",
    )
    return shown, _png(sheet)


def _right_completion(record: Record, thinking: bool) -> str:
    try:
        return target_text(record, thinking)
    except ValueError as error:
        return f"(none: {error})"


def prompt_text(prompt: Prompt, processor: Processor) -> str:
    """The tokens of a prompt as text, special ones too; a run of video tokens is one and a count.

    "<|vision_start|><|video_pad|> x 1234<|vision_end|>When does the door open?"
    """
    pad = processor.config.video_token_id
    tokens = np.asarray(prompt.tokens)
    changes = np.flatnonzero(np.diff(tokens == pad)) + 1
    parts = []
    for run in np.split(tokens, changes):
        text = processor.tokenizer.backend_tokenizer.decode(
            (run[:1] if run[0] == pad else run).tolist(), skip_special_tokens=False
        )
        parts.append(f"{text} x {len(run)}" if run[0] == pad else text)
    return "".join(parts)


def _png(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG", optimize=True)
    return file.getvalue()
