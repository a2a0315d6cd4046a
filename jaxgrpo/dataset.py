"""The usable questions of a manifest, sorted into buckets of one shape each.

A prompt goes to the smallest bucket that holds its tokens; a bucket offers what its largest prompt
needs of everything else.

Legend: P prompts in a step.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from data.online import ItemValues, OnlinePlan, Rules
from data.probe import Clips
from data.records import Record
from data.sampling import StepPlan
from jaxgrpo.mixture import strata
from jaxgrpo.mixture_config import OnlineSection
from models.qwen2_5_vl.sizes import Size


class Dataset(NamedTuple):
    """The usable records of one manifest; an item is a record's number in it."""

    records: tuple[Record, ...]
    sizes: tuple[Size, ...]  # what each item's prompt needs
    buckets: tuple[tuple[int, ...], ...]  # the items of each bucket
    offers: tuple[Size, ...]  # what each bucket offers to each of its prompts
    max_spans: int  # M, the most true spans that an item has
    clips: Clips  # where the records' videos are
    weights: tuple[float, ...]  # how often each item is drawn in training, relative to 1

    @property
    def spares(self) -> list[list[int]]:
        """Per bucket the items of others that it would hold, for when its own are all bad."""
        return [
            [i for i, size in enumerate(self.sizes) if i not in own and size.fits(offer)]
            for own, offer in zip(map(set, self.buckets), self.offers, strict=True)
        ]

    @property
    def plan(self) -> dict[str, Any]:
        """What the steps depend on besides the config: by name, JSON values, and short."""
        rows = [
            [dataclasses.asdict(record), size]
            for record, size in zip(self.records, self.sizes, strict=True)
        ]
        return {
            "items": f"{len(rows)} with digest {_digest(rows)}",
            "bucket sizes": [size._asdict() for size in self.offers],
            "spans of an item at most": self.max_spans,
            "weights": None if len(set(self.weights)) == 1 else _digest(self.weights),
        }


def step_plan(dataset: Dataset, prompts: int, seed: int, run: int = 1) -> StepPlan:
    """Which items each training step takes, without a look at what it earns; see `StepPlan`."""
    return StepPlan(dataset.buckets, prompts, seed, dataset.spares, dataset.weights, run)


def online_plan(
    dataset: Dataset,
    prompts: int,
    seed: int,
    run: int,
    section: OnlineSection,
    folder: Path,
    saved: Mapping[str, Any] | None,
) -> tuple[OnlinePlan, ItemValues]:
    """Which items each training step takes, by what it sees of them; see `data.online`.

    Args:
      folder: an empty one on this machine.
      saved: `ItemValues.state()` of the run that goes on; None: a new run.
    """
    plan = OnlinePlan(
        *(dataset.buckets, prompts, seed, folder),
        round_steps=section.round,
        spares=dataset.spares,
        run=run,
    )
    names = strata(dataset.records, dataset.clips)
    numbers = {name: number for number, name in enumerate(sorted(set(names)))}
    rules = Rules(**dataclasses.asdict(section))
    return plan, ItemValues(plan, dataset.weights, [numbers[name] for name in names], rules, saved)


def _bucket_of(tokens: int, buckets: Sequence[int]) -> int:
    return int(np.searchsorted(np.asarray(buckets), tokens))


def bucket_sizes(sizes: Sequence[Size], tokens: Sequence[int]) -> tuple[Size, ...]:
    """What each bucket offers: its tokens, and of all else the most that a prompt in it needs."""
    offers: list[Size] = []
    for bucket, width in enumerate(tokens):
        members = [size for size in sizes if _bucket_of(size.tokens, tokens) == bucket]
        offers.append(bucket_offer(members, width))
    return tuple(offers)


def bucket_offer(members: Sequence[Size], tokens: int) -> Size:
    """What a bucket of `tokens` tokens must offer to prompts of these sizes.

    The rows that a prompt's frames need are known once the largest frame of the bucket is.
    """
    most = Size(*np.max(members, axis=0).tolist()) if members else Size(0, 0, 0, 0, 0)
    rows = max((size.rows(most.frame_patches) for size in members), default=0)
    return most._replace(tokens=tokens, frames=rows)


def make_dataset(
    usable: Sequence[tuple[Record, Size]],
    offers: tuple[Size, ...],
    max_spans: int,
    clips: Clips,
    weights: Mapping[str, float],
) -> Dataset:
    """The usable questions, with what each prompt needs, in their buckets.

    Args:
      usable: in the manifest's order.
      offers: of each bucket, rising in tokens.
      max_spans: see `Dataset`.
      clips: where the videos are.
      weights: by record id.
    """
    widths = [bucket.tokens for bucket in offers]
    items: list[list[int]] = [[] for _ in offers]
    for number, (_, size) in enumerate(usable):
        items[_bucket_of(size.tokens, widths)].append(number)
    records, sizes = zip(*usable, strict=True)
    drawn = tuple(weights[record.id] for record in records)
    return Dataset(records, sizes, tuple(map(tuple, items)), offers, max_spans, clips, drawn)


def _digest(value: Any) -> str:
    """A short text that differs where the value, made of JSON's types, does."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]
