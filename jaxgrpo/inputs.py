"""From manifests and videos to batches: what is read, which bucket it goes to, how it is loaded.

Everything about shapes is decided here, before anything is decoded: videos are probed once, prompts
are measured, and each goes to the smallest bucket that holds its tokens.

Legend: P prompts in a step, C completion tokens.
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.frames import FrameStore, open_store
from data.probe import Clips, Probe, VideoError
from data.prompts import question_text, target_text
from data.records import Record
from data.staging import Stage
from data.video import Frames, FrameSampling, decode, frame_count
from jaxgrpo.config import Config, DataSection
from jaxgrpo.dataset import Dataset, bucket_sizes, make_dataset
from jaxgrpo.keep import kept_records
from jaxgrpo.mixture import absent_tasks, manifests, open_manifests, shares
from models.qwen2_5_vl.processor import Processor, Prompt, Video, collate
from models.qwen2_5_vl.sizes import PixelLimits, ProcessorError, Size

_SHOWN = 5  # bad items that a message names


class InputError(ValueError):
    """Data that cannot be trained on or evaluated as configured."""


class Inputs(NamedTuple):
    """All data of a run, measured."""

    processor: Processor
    train: Dataset | None
    evaluation: Dataset | None
    swapped: Dataset | None  # grounding questions of `evaluation`, each about another item's video
    excluded: dict[str, str]  # "data.train/ID" -> why its video cannot be read: in no dataset
    store: FrameStore | None  # keeps decoded frames

    def served(self) -> dict[str, int]:
        """How often this process found a video in the store, by the names of metrics.jsonl."""
        served = self.store.served()._asdict() if self.store else {}
        return {f"data/frame_store_{name}": count for name, count in served.items()}


class Measured(NamedTuple):
    """The questions of one key's manifests whose videos can be read, before they are sorted."""

    usable: list[tuple[Record, Size]]  # with what the prompts need, in the manifests' order
    probes: dict[str, Probe | VideoError]  # by id, of all questions: what their videos claim
    clips: Clips  # where the videos are
    weights: dict[str, float]  # by id, see `Dataset.weights`


class Target(NamedTuple):
    """A prompt and the completion to learn, for supervised training."""

    prompt: Prompt
    completion: np.ndarray  # int32[C], not padded; a batch: int32[P, 1, C]
    length: np.ndarray  # int32[]; a batch: int32[P, 1]


def pixel_limits(config: DataSection) -> PixelLimits:
    """The limits on frame and video size."""
    return PixelLimits(config.min_pixels, config.max_pixels, config.total_pixels)


def frame_sampling(config: DataSection) -> FrameSampling:
    """Which frames of a video the model sees."""
    return FrameSampling(config.fps, config.min_frames, config.max_frames, config.frames)


def open_stage(config: DataSection) -> Stage | None:
    """The folder that keeps what buckets give, with what it holds counted.

    Raises:
      StorageError: it cannot be written.
    """
    if not config.stage:
        return None
    stage = Stage(Path(config.stage).expanduser(), int(config.stage_gib * (1 << 30)))
    stage.recount()
    return stage


def messages(record: Record, thinking: bool) -> list[dict[str, Any]]:
    """The chat that a record's prompt is: one user's turn, the video and the question."""
    text = question_text(record, thinking)
    content = [{"type": "video"}, {"type": "text", "text": text}]
    return [{"role": "user", "content": content}]


def prepare(
    config: Config,
    processor: Processor,
    *,
    train: bool,
    evaluation: bool,
    excluded: Mapping[str, str] | None = None,
) -> Inputs:
    """Makes or reads the manifests, probes the videos and sorts the prompts into buckets.

    Args:
      config: its `data` section and `eval.limit`.
      processor: measures prompts.
      train, evaluation: which manifests are needed.
      excluded: as in the result, left out whatever the videos are like now: what a resumed run
        left out, so that its plan stays the same.

    Raises:
      InputError: a manifest is not configured, none of its videos can be read, a question cannot
        be asked, prompts do not fit the largest bucket, or the hosts see different data.
      ManifestError, MixtureError, KeepError, SyntheticError, StorageError: see there.
    """
    measured, bad = measure(
        config, processor, train=train, evaluation=evaluation, excluded=excluded
    )
    for key, found in measured.items():
        check_fits(key, found.usable, config.data.buckets)
    return sort_into_buckets(config, processor, measured, bad)


def measure(
    config: Config,
    processor: Processor,
    *,
    train: bool,
    evaluation: bool,
    excluded: Mapping[str, str] | None = None,
) -> tuple[dict[str, Measured], dict[str, str]]:
    """The first half of `prepare`: by key what can be read, and "KEY/ID" -> what cannot, and why.

    Raises: as `prepare`, but nothing about buckets.
    """
    data = config.data
    needed = {"data.train": train, "data.eval": evaluation}
    named = {key: parts for key, parts in manifests(data).items() if needed[key]}
    for key, parts in named.items():
        if not parts:
            raise InputError(f"{key} is empty: set it to a JSONL manifest, or set data.synthetic")
    stage = open_stage(data)
    opened = {key: open_manifests(parts, data, stage, _say) for key, parts in named.items()}
    clips = {key: source.clips for key, (source, _) in opened.items()}
    records = {key: source.records for key, (source, _) in opened.items()}
    if data.keep and train:
        records["data.train"] = kept_records(records["data.train"], data.keep)
    if train and (absent := absent_tasks(records["data.train"], data)):
        _say(f"warning: data.task_weights names tasks that no item has: {', '.join(absent)}")
    if config.eval.limit and evaluation:
        records["data.eval"] = records["data.eval"][: config.eval.limit]

    bad = dict(excluded or {})
    measured: dict[str, Measured] = {}
    for key, rows in records.items():
        probes = clips[key].probe(rows, data.threads, data.timeout)
        left_out = {record.id for record in rows if f"{key}/{record.id}" in bad}
        usable, errors = _measure(rows, probes, clips[key], processor, data, left_out)
        bad |= {f"{key}/{name}": reason for name, reason in errors.items()}
        if not usable:
            shown = "\n".join(list(errors.values())[:_SHOWN])
            raise InputError(f"none of the {len(rows)} videos of {key} can be read:\n{shown}")
        measured[key] = Measured(usable, probes, clips[key], opened[key].weights)
    return measured, bad


def sort_into_buckets(
    config: Config,
    processor: Processor,
    measured: Mapping[str, Measured],
    excluded: Mapping[str, str],
) -> Inputs:
    """The second half of `prepare`: what was measured, each prompt in a bucket that holds it.

    Args:
      measured, excluded: see `measure`; all prompts fit the largest bucket.

    Raises:
      InputError: the hosts see different data.
    """
    data = config.data
    datasets = {}
    # Training is sized by itself, so that eval.limit does not change its programs.
    for key, (usable, _, clips, weights) in measured.items():
        moved = _swap_videos(usable, clips, processor, data) if key == "data.eval" else []
        together = usable + moved
        offers = bucket_sizes([size for _, size in together], data.buckets)
        max_spans = max(max(len(record.spans), 1) for record, _ in together)
        datasets[key] = make_dataset(usable, offers, max_spans, clips, weights)
        if moved:
            datasets["swapped"] = make_dataset(moved, offers, max_spans, clips, weights)
    _check_hosts_agree({key: dataset.plan for key, dataset in datasets.items()})
    return Inputs(
        processor,
        datasets.get("data.train"),
        datasets.get("data.eval"),
        datasets.get("swapped"),
        dict(excluded),
        open_store(data.frame_store, data.frame_store_gib) if data.frame_store else None,
    )


def describe(inputs: Inputs) -> str:
    """A few lines for the user: items, buckets, and the videos that are left out, by name."""
    lines = []
    for name, dataset in (("train", inputs.train), ("eval", inputs.evaluation)):
        if dataset is not None:
            tasks = collections.Counter(record.task for record in dataset.records)
            counts = ", ".join(f"{count} {task}" for task, count in sorted(tasks.items()))
            fills = ", ".join(
                f"{len(items)} of at most {bucket.tokens} tokens"
                for items, bucket in zip(dataset.buckets, dataset.offers, strict=True)
            )
            lines.append(f"{name}: {len(dataset.records)} items ({counts}); prompts: {fills}")
            if name == "train":
                told = shares(dataset.records, dataset.weights, dataset.clips)
                lines += [f"  {line}" for line in told]
    if inputs.excluded:
        shown = list(inputs.excluded.values())[:_SHOWN]
        more = len(inputs.excluded) - len(shown)
        lines.append(f"{len(inputs.excluded)} items left out, their videos cannot be read:")
        lines += [f"  {reason}" for reason in shown] + ([f"  ... and {more} more"] if more else [])
    return "\n".join(lines)


@dataclasses.dataclass(frozen=True)
class PromptLoader:
    """Item -> prompt: decodes the video and processes it. Runs in data threads and workers.

    Attributes:
      sizes: what the items' prompts were measured to need; without them nothing is compared.
      store: keeps frames, if any.
    """

    processor: Processor
    records: tuple[Record, ...]
    data: DataSection
    clips: Clips
    sizes: tuple[Size, ...] = ()
    store: FrameStore | None = None

    def __call__(self, item: int) -> Prompt:
        return self.prompt(item, self.frames(item))

    def prompt(self, item: int, frames: Frames) -> Prompt:
        """The prompt of an item whose frames are these."""
        record = self.records[item]
        video = Video(frames.frames, frames.seconds_per_frame, frames.decoded_hw)
        prompt = self.processor(messages(record, self.data.thinking), [video])
        if self.sizes and prompt.size != self.sizes[item]:
            raise VideoError(
                "changed",
                f"{self.clips.name(record.video)}: expected a prompt of {self.sizes[item]} as when "
                f"the video was probed, found {prompt.size}: it was replaced since the run began",
            )
        return prompt

    def frames(self, item: int) -> Frames:
        """The item's frames, from the store or decoded."""
        record = self.records[item]
        store, name = self.store, self.clips.name(record.video)
        identity = self.clips.identities([record.video], 1).get(record.video) if store else None
        if store is None or identity is None:
            return self._decode(record)
        vision = self.processor.config.vision
        how = (
            frame_sampling(self.data),
            record.clip,
            record.duration,
            self.processor.limits,
            self.data.resize,
            (vision.patch_size, vision.merge_size, vision.temporal_patch_size),
        )
        frames = store.get(name, how, identity)
        if frames is None:
            frames = self._decode(record)
            store.put(name, how, identity, frames)
        return frames

    def _decode(self, record: Record) -> Frames:
        return decode(
            self.clips.fetch(record.video),
            frame_sampling(self.data),
            record.clip,
            record.duration,
            self.processor.resize_frame,
            self.data.timeout,
        )


@dataclasses.dataclass(frozen=True)
class TargetLoader:
    """Item -> prompt and the completion with the largest reward, for supervised training.

    With thinking, a record's rationale is the thought; without one the thought is empty.
    """

    prompts: PromptLoader
    max_tokens: int

    def __call__(self, item: int) -> Target:
        completion = self.completion(item)
        return Target(self.prompts(item), completion, np.array(len(completion), np.int32))

    def completion(self, item: int) -> np.ndarray:
        """The tokens to learn, int32[C], not padded.

        Raises:
          InputError: there are more than `max_tokens`.
        """
        record = self.prompts.records[item]
        text = target_text(record, self.prompts.data.thinking)
        completion = self.prompts.processor.encode_completion(text)
        if len(completion) > self.max_tokens:
            raise InputError(
                f"record {record.id!r}: its target is {len(completion)} tokens, more than "
                f"rollout.max_new_tokens ({self.max_tokens}); raise that"
            )
        return completion


def prompt_loader(inputs: Inputs, dataset: Dataset, data: DataSection) -> PromptLoader:
    """The loader of a dataset's prompts."""
    return PromptLoader(
        inputs.processor, dataset.records, data, dataset.clips, dataset.sizes, inputs.store
    )


@dataclasses.dataclass(frozen=True)
class PromptCollator:
    """P prompts -> one batch, padded to their bucket."""

    buckets: tuple[Size, ...]
    pad_id: int

    def __call__(self, prompts: list[Prompt], bucket: int) -> Prompt:
        return collate(prompts, self.buckets[bucket], self.pad_id)


@dataclasses.dataclass(frozen=True)
class TargetCollator:
    """P targets -> one batch: prompts padded to their bucket, completions to C."""

    prompts: PromptCollator
    max_tokens: int

    def __call__(self, targets: list[Target], bucket: int) -> Target:
        completions = np.full((len(targets), 1, self.max_tokens), self.prompts.pad_id, np.int32)
        for row, target in zip(completions, targets, strict=True):
            row[0, : len(target.completion)] = target.completion
        return Target(
            self.prompts([target.prompt for target in targets], bucket),
            completions,
            np.array([[target.length] for target in targets], np.int32),
        )


def _measure(
    records: Sequence[Record],
    probes: dict[str, Probe | VideoError],
    clips: Clips,
    processor: Processor,
    data: DataSection,
    excluded: set[str],
) -> tuple[list[tuple[Record, Size]], dict[str, str]]:
    """(usable records with the sizes of their prompts, id -> why a video cannot be used).

    A video that any of the hosts cannot use is used by none: they must plan the same steps.
    """
    measured: list[tuple[Record, Size]] = []
    errors: dict[str, str] = {}
    for record in records:
        probe = probes[record.id]
        if record.id in excluded:
            continue
        if isinstance(probe, VideoError):
            errors[record.id] = f"{record.id}: {probe.kind}: {probe}"
            continue
        try:
            measured.append((record, _size(record, probe, clips, processor, data)))
        except VideoError as error:
            errors[record.id] = f"{record.id}: {error.kind}: {error}"
    errors = {name: reason for part in _from_hosts(errors) for name, reason in part.items()}
    return [(record, size) for record, size in measured if record.id not in errors], errors


def _size(
    record: Record, probe: Probe, clips: Clips, processor: Processor, data: DataSection
) -> Size:
    """What a record's prompt needs.

    Raises:
      VideoError: the clip window lies outside of the file, or its pictures have a shape that the
        processor refuses.
      InputError: the processor refuses the question.
    """
    frames = frame_count(probe, frame_sampling(data), record.clip)
    try:
        grid = processor.grid((probe.height, probe.width), frames)
    except ProcessorError as error:
        raise VideoError("shape", f"{clips.name(record.video)}: {error}") from error
    try:
        return processor.size(messages(record, data.thinking), [grid])
    except ProcessorError as error:
        raise InputError(
            f"record {record.id!r}: its question or an option spells a token that stands for a "
            f"picture, such as <|video_pad|>; remove that ({error})"
        ) from error


def _check_hosts_agree(plans: dict[str, Any]) -> None:
    first, *others = _from_hosts(plans)
    for process, other in enumerate(others, start=1):
        for key, plan in first.items():
            if other[key] != plan:
                raise InputError(
                    f"process {process} finds other items or videos in {key} than process 0: "
                    f"{other[key]}, not {plan}; all hosts must see the same manifest and the same "
                    "files in data.root"
                )


def _from_hosts(value: Any) -> list[Any]:
    # Worker processes import this module for its loaders, and have no use for jax.
    from jaxgrpo.sharding import gather_objects

    return gather_objects(value)


def _say(text: str) -> None:
    from jaxgrpo.sharding import say  # as above

    say(text)


def _swap_videos(
    usable: list[tuple[Record, Size]], clips: Clips, processor: Processor, data: DataSection
) -> list[tuple[Record, Size]]:
    """Each grounding question about the video of the next one, to see what the video is worth.

    A model that answers from the text alone scores the same on these. Pairs whose prompt would not
    fit the largest bucket are left out.
    """
    grounding = [record for record, _ in usable if record.task == "tvg"]
    moved = grounding[1:] + grounding[:1]
    pairs = [
        dataclasses.replace(record, video=other.video, clip=other.clip, duration=other.duration)
        for record, other in zip(grounding, moved, strict=True)
        if (record.video, record.clip) != (other.video, other.clip)
    ]
    probes = clips.probe(pairs, data.threads, data.timeout)
    swapped, _ = _measure(pairs, probes, clips, processor, data, set())
    return [(record, size) for record, size in swapped if size.tokens <= data.buckets[-1]]


def check_fits(key: str, usable: Sequence[tuple[Record, Size]], buckets: Sequence[int]) -> None:
    """Raises an `InputError` that names the prompts longer than the largest bucket."""
    long = [(r.id, size.tokens) for r, size in usable if size.tokens > buckets[-1]]
    if long:
        shown = ", ".join(f"{name} ({tokens} tokens)" for name, tokens in long[:_SHOWN])
        longest = max(tokens for _, tokens in long)
        raise InputError(
            f"{len(long)} prompts of {key} are longer than the largest bucket ({buckets[-1]} "
            f"tokens): {shown}{', ...' if len(long) > _SHOWN else ''}; add a bucket of {longest} "
            "to data.buckets, or lower data.total_pixels, data.max_pixels or data.fps"
        )
