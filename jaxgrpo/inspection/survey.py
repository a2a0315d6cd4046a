"""What the questions and videos of a dataset are like, in figures, for `jaxgrpo inspect`.

Nothing is measured here: sizes, buckets, steps, target completions and rewards are those that
training itself makes (`inputs`, `dataset`, `data.prompts`, `rewards`).
"""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from data.probe import Probe
from data.records import ROUNDING, SPAN_TASKS, Record
from jaxgrpo.config import Config
from jaxgrpo.dataset import Dataset, step_plan
from jaxgrpo.inputs import Measured
from jaxgrpo.inspection.right_answers import RightAnswers, score_targets, write_targets
from jaxgrpo.mixture import draws
from models.qwen2_5_vl.config import VisionConfig
from models.qwen2_5_vl.processor import Processor
from models.qwen2_5_vl.sizes import Size
from rewards.reward import Reward

_BARS = 24  # of a histogram, at most


@dataclass(frozen=True)
class Part:
    """The questions of one task from one manifest; `weight` and `draws` as in `mixture.Share`."""

    manifest: str
    task: str
    items: int
    weight: float
    draws: float


@dataclass(frozen=True)
class Bad:
    """A question that is left out because its video cannot be used."""

    id: str
    kind: str  # as of `data.probe.VideoError`
    reason: str


@dataclass(frozen=True)
class Overflow:
    """A question whose prompt is longer than the largest bucket."""

    id: str
    tokens: int
    video_tokens: int
    over: int  # tokens above the largest bucket


@dataclass(frozen=True)
class Outside:
    """A true span that is not within what is shown of the video."""

    id: str
    span: tuple[float, float]
    seconds: float  # that are shown


@dataclass(frozen=True)
class Column:
    """One figure of all items: its quantiles and its histogram."""

    least: float
    median: float
    p95: float
    most: float
    edges: tuple[float, ...]
    counts: tuple[int, ...]


@dataclass(frozen=True)
class Bucket:
    """What a bucket of `tokens` tokens holds, and what is computed for each that is real."""

    tokens: int
    items: int
    median: float | None  # tokens of a prompt
    token_ratio: float | None  # tokens computed / tokens of the prompts
    patch_ratio: float | None
    steps: int | None  # of the first epoch


@dataclass(frozen=True)
class Steps:
    """The outline of the step plan."""

    prompts: int  # in a step
    epoch: int  # steps of the first epoch
    run: int  # steps of the run
    never: tuple[str, ...]  # ids that no step of the run draws


@dataclass(frozen=True)
class Survey:
    """One dataset."""

    questions: int  # of the manifests
    items: int  # that can be used
    parts: tuple[Part, ...]
    bad: tuple[Bad, ...]
    overflows: tuple[Overflow, ...]
    outside: tuple[Outside, ...]
    columns: dict[str, Column]  # by what they are, with the unit
    resolutions: dict[str, int]  # "WIDTH x HEIGHT" of the files -> items, the most frequent first
    buckets: tuple[Bucket, ...]
    steps: Steps | None  # of training
    answers: RightAnswers


def survey(
    config: Config,
    key: str,
    measured: Measured,
    dataset: Dataset,
    excluded: Mapping[str, str],
    processor: Processor,
    reward: Reward,
) -> Survey:
    """Looks at one dataset.

    Args:
      key: "data.train" or "data.eval".
      measured: with the prompts that overflow.
      dataset: those that fit.
      excluded: see `inputs.Inputs`.
      reward: of this dataset, with its limit on completions.

    Raises:
      RewardError: see `rewards.reward.Reward.truth`.
    """
    vision = processor.config.vision
    training = key == "data.train"
    targets = write_targets(dataset.records, processor, config.data.thinking)
    columns, resolutions = _columns(dataset, measured, vision)
    columns["answer (tokens)"] = np.array([count for count in targets.tokens if count])
    steps, of_bucket = _steps(config, dataset) if training else (None, {})
    return Survey(
        questions=len(measured.probes),
        items=len(dataset.records),
        parts=_parts(config, key, dataset),
        bad=_bad(key, excluded),
        overflows=overflows(measured.usable, config.data.buckets[-1], vision),
        outside=_outside(dataset.records, measured),
        columns={name: _column(values) for name, values in columns.items() if len(values)},
        resolutions=resolutions,
        buckets=_buckets(dataset, of_bucket if training else None),
        steps=steps,
        answers=score_targets(dataset.records, targets, reward),
    )


def seconds_shown(record: Record, probe: Probe) -> float:
    """How much of a record's video is shown."""
    return record.clip[1] - record.clip[0] if record.clip else probe.duration


def overflows(
    usable: Sequence[tuple[Record, Size]], largest: int, vision: VisionConfig
) -> tuple[Overflow, ...]:
    """The prompts of more than `largest` tokens, the longest first."""
    found = [
        Overflow(record.id, size.tokens, size.patches // vision.merge_area, size.tokens - largest)
        for record, size in usable
        if size.tokens > largest
    ]
    return tuple(sorted(found, key=lambda overflow: -overflow.tokens))


def mend_overflows(config: Config, processor: Processor, measured: Measured) -> str:
    """The keys that would make all prompts fit: tried on those that do not, not estimated."""
    vision, largest = processor.config.vision, config.data.buckets[-1]
    long = [(record, size) for record, size in measured.usable if size.tokens > largest]
    mend = f"add a bucket of {max(size.tokens for _, size in long)} to data.buckets"
    texts = [size.tokens - size.patches // vision.merge_area for _, size in long]
    side = vision.patch_size * vision.merge_size
    pixels = (largest - max(texts)) * side**2
    if pixels < config.data.min_pixels:
        return f"{mend}, or shorten the questions"
    limits = dataclasses.replace(processor.limits, total_pixels=pixels)
    smaller = dataclasses.replace(processor, limits=limits)
    for (record, size), text in zip(long, texts, strict=True):
        probe = measured.probes[record.id]
        assert isinstance(probe, Probe), "it was measured"
        grid = smaller.grid((probe.height, probe.width), size.frames * vision.temporal_patch_size)
        if text + grid.patches // vision.merge_area > largest:
            return f"{mend}, or lower data.max_frames or data.fps"
    return f"{mend}, or set data.total_pixels={pixels}"


def _parts(config: Config, key: str, dataset: Dataset) -> tuple[Part, ...]:
    data = config.data
    one, several = {
        "data.train": (data.train, data.mixture),
        "data.eval": (data.eval, data.eval_mixture),
    }[key]
    lone = several[0].manifest if several else one or "data.synthetic"
    shares = draws(dataset.records, dataset.weights, dataset.clips)
    return tuple(Part(manifest or lone, task, *share) for (manifest, task), share in shares.items())


def _bad(key: str, excluded: Mapping[str, str]) -> tuple[Bad, ...]:
    """Of one dataset; a reason is written as "ID: KIND: MESSAGE"."""
    found = []
    for name, reason in excluded.items():
        if name.startswith(f"{key}/"):
            item = name.removeprefix(f"{key}/")
            kind, _, message = reason.removeprefix(f"{item}: ").partition(": ")
            found.append(Bad(item, kind, message))
    return tuple(found)


def _outside(records: Sequence[Record], measured: Measured) -> tuple[Outside, ...]:
    """By the length that the files claim; manifests are read against the annotated one only."""
    found = []
    for record in records:
        probe = measured.probes[record.id]
        if record.task in SPAN_TASKS and isinstance(probe, Probe):
            seconds = seconds_shown(record, probe)
            found += [
                Outside(record.id, span, seconds)
                for span in record.spans
                if span[0] >= seconds or span[1] > seconds + ROUNDING
            ]
    return tuple(found)


def _columns(
    dataset: Dataset, measured: Measured, vision: VisionConfig
) -> tuple[dict[str, np.ndarray], dict[str, int]]:
    """Figures [items] by name, and how many items have a resolution."""
    probes = [measured.probes[record.id] for record in dataset.records]
    claims = [probe for probe in probes if isinstance(probe, Probe)]
    sizes = np.array(dataset.sizes)
    named = dict(zip(Size._fields, sizes.T, strict=True))
    columns = {
        "video length (s)": np.array(list(map(seconds_shown, dataset.records, claims))),
        "frame rate of the file (1/s)": np.array([probe.fps for probe in claims]),
        "frames the model sees": named["frames"] * vision.temporal_patch_size,
        "video (tokens)": named["patches"] // vision.merge_area,
        "prompt (tokens)": named["tokens"],
    }
    seen = collections.Counter(f"{probe.width} x {probe.height}" for probe in claims)
    return columns, dict(seen.most_common())


def _column(values: np.ndarray) -> Column:
    """Whole numbers get bars that hold whole numbers."""
    least, most = values.min().item(), values.max().item()
    if np.issubdtype(values.dtype, np.integer):
        width = -(-(most - least + 1) // _BARS)
        edges = np.arange(least, most + width + 1, width) - 0.5
    else:
        spread = most - least
        bars = 1 if spread < 1e-9 * abs(most) else _BARS
        margin = 0.0 if bars > 1 else 0.5
        edges = np.linspace(least - margin, most + margin, bars + 1)
    counts, _ = np.histogram(values, edges)
    median, p95 = np.quantile(values, [0.5, 0.95]).tolist()
    return Column(least, median, p95, most, tuple(edges.tolist()), tuple(counts.tolist()))


def _buckets(dataset: Dataset, steps: Mapping[int, int] | None) -> tuple[Bucket, ...]:
    """`steps` by number of bucket; None in evaluation."""
    found = []
    for number, (items, offer) in enumerate(zip(dataset.buckets, dataset.offers, strict=True)):
        turns = None if steps is None else steps.get(number, 0)
        if not items:
            found.append(Bucket(offer.tokens, 0, None, None, None, turns))
            continue
        sizes = [dataset.sizes[item] for item in items]
        tokens, patches = (sum(s.tokens for s in sizes), sum(s.patches for s in sizes))
        found.append(
            Bucket(
                offer.tokens,
                len(items),
                float(np.median([size.tokens for size in sizes])),
                offer.tokens * len(items) / tokens,
                offer.patches * len(items) / patches,
                turns,
            )
        )
    return tuple(found)


def _steps(config: Config, dataset: Dataset) -> tuple[Steps, dict[int, int]]:
    """The outline, and by number of bucket its steps in the first epoch."""
    plan = step_plan(dataset, config.rollout.prompts, config.seed)
    epoch, run = plan.first_step(1), config.train.steps
    of_bucket: collections.Counter[int] = collections.Counter()
    never = set(range(len(dataset.records)))
    for number in range(max(epoch, run)):
        bucket, items = plan.step(number)
        if number < epoch:
            of_bucket[bucket] += 1
        if number < run:
            never.difference_update(items)
    names = tuple(dataset.records[item].id for item in sorted(never))
    return Steps(plan.prompts, epoch, run, names), of_bucket
