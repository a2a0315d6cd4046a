"""The usable questions of a manifest: buckets, what they offer, and what a run keeps to."""

from __future__ import annotations

import dataclasses
import json

import pytest

from data.records import Record
from data.sources import FolderClips
from jaxgrpo.dataset import Dataset, bucket_sizes, make_dataset, step_plan
from models.qwen2_5_vl.sizes import Size

WIDTHS = [100, 300]


@pytest.fixture
def train() -> Dataset:
    """Six questions in two buckets, one of which holds some of the other's as well."""
    usable = [
        (
            Record(f"r{i}", f"{i}.mp4", "tvg", "When?", (), None, ((0.0, 1.0),), None),
            Size(tokens, tokens, 4, 2, patches),
        )
        for i, (tokens, patches) in enumerate(
            [(90, 40), (80, 200), (250, 100), (95, 90), (300, 64), (40, 16)]
        )
    ]
    offers = bucket_sizes([size for _, size in usable], WIDTHS)
    weights = {record.id: 1.0 for record, _ in usable}
    return make_dataset(usable, offers, 1, FolderClips("."), weights)


def test_every_item_is_in_the_smallest_bucket_that_holds_it(train: Dataset) -> None:
    assert train.buckets == ((0, 1, 3, 5), (2, 4))
    assert [offer.tokens for offer in train.offers] == WIDTHS


def test_the_plan_of_a_dataset_notices_whatever_changes_its_steps(train: Dataset) -> None:
    plan = train.plan
    assert json.loads(json.dumps(plan)) == plan  # as a checkpoint gives it back
    first, *rest = train.records
    for records in (
        (dataclasses.replace(first, question="What now?"), *rest),
        (dataclasses.replace(first, video="other.mp4"), *rest),
        (*rest, first),
    ):
        assert train._replace(records=records).plan["items"] != plan["items"]
    sizes = (train.sizes[0]._replace(frames=99), *train.sizes[1:])
    assert train._replace(sizes=sizes).plan["items"] != plan["items"]
    assert train._replace(offers=train.offers[:-1]).plan != plan
    assert train._replace(max_spans=7).plan != plan
    weights = (2.0, *train.weights[1:])
    assert train._replace(weights=weights).plan["weights"] != plan["weights"]
    assert train._replace(weights=(3.0,) * len(weights)).plan == plan  # it is the same plan then


def test_a_spare_of_a_bucket_is_an_item_of_another_that_it_holds(train: Dataset) -> None:
    assert any(train.spares)
    for number, spares in enumerate(train.spares):
        others = set(range(len(train.records))) - set(train.buckets[number])
        assert set(spares) == {i for i in others if train.sizes[i].fits(train.offers[number])}


def test_a_spare_whose_frames_do_not_fit_the_rows_is_none(train: Dataset) -> None:
    own = Size(tokens=200, patches=480, windows=20, frames=3, frame_patches=160)
    narrow = Size(tokens=90, patches=400, windows=20, frames=10, frame_patches=40)  # 4 in a row
    long = Size(tokens=90, patches=440, windows=20, frames=11, frame_patches=40)
    longer = Size(tokens=90, patches=520, windows=20, frames=13, frame_patches=40)
    wide = Size(tokens=90, patches=161, windows=20, frames=1, frame_patches=161)
    half = Size(tokens=90, patches=324, windows=20, frames=4, frame_patches=81)  # 1 in a row
    sizes = (own, narrow, long, longer, wide, half)
    dataset = train._replace(
        sizes=sizes, buckets=((1, 2, 3, 4, 5), (0,)), offers=(long._replace(tokens=100), own)
    )
    assert dataset.spares[1] == [1, 2]


def test_a_step_takes_items_by_their_weight(train: Dataset) -> None:
    heavy = train._replace(weights=(1.0, 1.0, 1.0, 1.0, 1.0, 25.0))
    drawn = [item for step in range(60) for item in step_plan(heavy, 1, 0).step(step).items]
    assert drawn.count(5) == 50
