"""The manifests that a config names: one, several with weights, or synthetic ones."""

from __future__ import annotations

import collections
import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from data.mixture import Member, MixedClips, mix
from data.probe import Clips
from data.records import Record
from data.sources import Source, open_source
from data.staging import Stage
from data.synthetic import SyntheticSpec, write_dataset
from jaxgrpo.config import DataSection
from jaxgrpo.mixture_config import ManifestSection, MixtureSection


class Opened(NamedTuple):
    """The questions of all manifests of a key, with their videos, and the weight of each by id."""

    source: Source
    weights: dict[str, float]


def manifests(data: DataSection) -> dict[str, Sequence[ManifestSection]]:
    """The manifests by key, none where none is set; synthetic ones are made, with their clips."""
    train, evaluation = data.train, data.eval
    if data.synthetic is not None:
        spec = SyntheticSpec(**dataclasses.asdict(data.synthetic))
        train, evaluation = map(str, write_dataset(data.root, spec, data.threads))
    one = [MixtureSection(train)] if train else []
    one_eval = [ManifestSection(evaluation)] if evaluation else []
    return {"data.train": data.mixture or one, "data.eval": data.eval_mixture or one_eval}


def open_manifests(
    parts: Sequence[ManifestSection],
    data: DataSection,
    stage: Stage | None,
    say: Callable[[str], None],
) -> Opened:
    """Reads the manifests of one key and finds out where their videos are.

    A question's weight is its manifest's times its task's; in evaluation, which takes each once, it
    means nothing.

    Raises:
      ManifestError, StorageError: see `data.sources.open_source`.
      MixtureError: an id is in two of the manifests.
    """
    members = [
        Member(
            part.manifest, open_source(*place(part, data), stage, data.threads, say), part.prefix
        )
        for part in parts
    ]
    source = mix(members)
    of_part = [
        part.weight if isinstance(part, MixtureSection) else 1.0
        for part, member in zip(parts, members, strict=True)
        for _ in member.source.records
    ]
    of_task: Mapping[str, float] = dataclasses.asdict(data.task_weights)
    return Opened(
        source,
        {
            record.id: weight * of_task[record.task]
            for record, weight in zip(source.records, of_part, strict=True)
        },
    )


def absent_tasks(records: Sequence[Record], data: DataSection) -> list[str]:
    """The tasks that `data.task_weights` weighs and none of the questions has."""
    there = {record.task for record in records}
    weights = dataclasses.asdict(data.task_weights)
    return [task for task, weight in weights.items() if weight != 1 and task not in there]


class Share(NamedTuple):
    """How much of a dataset some of its questions are."""

    items: int
    weight: float  # of each of them, on average
    draws: float  # of all draws, 0 to 1


def strata(records: Sequence[Record], clips: Clips) -> list[tuple[str, str]]:
    """The manifest and the task of each question; "" where there is only one manifest."""
    return [
        (clips.manifest(record.video) if isinstance(clips, MixedClips) else "", record.task)
        for record in records
    ]


def draws(
    records: Sequence[Record], weights: Sequence[float], clips: Clips
) -> dict[tuple[str, str], Share]:
    """The share of each (manifest, task), in their order; "" where there is only one manifest."""
    given: dict[tuple[str, str], list[float]] = collections.defaultdict(list)
    for stratum, weight in zip(strata(records, clips), weights, strict=True):
        given[stratum].append(weight)
    total = sum(weights)
    return {
        key: Share(len(part), sum(part) / len(part), sum(part) / total)
        for key, part in sorted(given.items())
    }


def shares(records: Sequence[Record], weights: Sequence[float], clips: Clips) -> list[str]:
    """Lines that say what is drawn how often; none for one manifest whose questions weigh alike."""
    if not isinstance(clips, MixedClips) and len(set(weights)) == 1:
        return []
    by_task: dict[str, float] = collections.defaultdict(float)
    by_manifest: dict[str, float] = collections.defaultdict(float)
    for (manifest, task), share in draws(records, weights, clips).items():
        by_task[task] += share.draws
        if manifest:
            by_manifest[manifest] += share.draws
    return [
        "draws: " + ", ".join(f"{share:.1%} {name}" for name, share in sorted(part.items()))
        for part in (by_manifest, by_task)
        if part
    ]


def place(part: ManifestSection, data: DataSection) -> tuple[str, str]:
    """A part's manifest and the root of its videos."""
    return part.manifest, data.root if part.root is None else part.root
