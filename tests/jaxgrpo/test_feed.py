"""The rows of a process, and what processes that feed the same rows agree on.

This process plays one of two; what the other says is made up. `test_processes` has real ones.
"""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from data.pipeline import Batch
from data.probe import VideoError
from data.records import Record
from data.sampling import StepPlan
from jaxgrpo import feed
from jaxgrpo.config import DataSection, MeshSection
from jaxgrpo.feed import Feed
from jaxgrpo.sharding import make_mesh

P = 8
RECORDS = [
    Record(
        id=f"v{item}",
        video=f"v{item}.mp4",
        task="tvg",
        question="When?",
        options=(),
        answer=None,
        spans=((0.0, 1.0),),
        duration=None,
        clip=None,
    )
    for item in range(20)
]
PLAN = StepPlan([range(20)], P, seed=1)


def batches_of(bad: set[int], steps: int = 3) -> list[Batch]:
    """What this process reads where it cannot read the items `bad`."""

    def load(item: int) -> int:
        if item in bad:
            raise VideoError("missing", f"v{item}.mp4 is not here")
        return item

    def collate(items: list[int], bucket: int) -> np.ndarray:
        return np.array(items)

    reader = Feed(
        make_mesh(MeshSection(tensor=2)),
        PLAN,
        load,
        collate,
        RECORDS,
        DataSection(train="t", workers=0),
        start_step=0,
        num_steps=steps,
    )
    assert reader.rows == list(range(P))
    with reader:
        return list(reader)


@pytest.fixture
def other_cannot_read(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Items that another process with the same rows cannot read; a third feeds other rows."""
    theirs: set[int] = set()

    def gather(mine: list[Any]) -> list[Any]:
        rows, items, _ = mine
        other = mine  # once it has heard of it, this process reads what the other does
        if theirs & set(items):
            failures = [[item, "truncated", f"v{item}.mp4: cut"] for item in theirs]
            other = [rows, [-1 if item in theirs else item for item in items], failures]
        elsewhere = [[P, P + 1], [90, 91], []]
        told: list[Any] = json.loads(json.dumps([mine, other, elsewhere]))
        return told

    monkeypatch.setattr(feed, "shares_rows", lambda mesh: True)
    monkeypatch.setattr(feed, "gather_objects", gather)
    return theirs


def test_what_only_another_process_cannot_read_is_replaced_here_too(
    other_cannot_read: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    bad = PLAN.step(0).items[2]
    other_cannot_read.add(bad)
    found = batches_of(set())
    monkeypatch.setattr(feed, "shares_rows", lambda mesh: False)
    expected = batches_of({bad})  # as if this process could not read it itself
    for batch, same in zip(found, expected, strict=True):
        assert batch.items == same.items and bad not in batch.items
        np.testing.assert_array_equal(batch.prompts, same.prompts)
    assert (found[0].failures[0].item, found[0].failures[0].kind) == (bad, "truncated")


def test_nothing_is_read_again_where_all_read_the_same(other_cannot_read: set[int]) -> None:
    assert [batch.failures for batch in batches_of(set())] == [[], [], []]


def test_nobody_is_asked_where_each_process_has_rows_of_its_own(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def refuse(value: Any) -> list[Any]:
        raise AssertionError("asked")

    monkeypatch.setattr(feed, "gather_objects", refuse)
    assert [batch.items for batch in batches_of(set())] == [PLAN.step(i).items for i in range(3)]


def test_a_decoder_that_hung_once_is_not_tried_again() -> None:
    """Not in this start, and not in a later one, which is told."""
    tried: list[int] = []
    hung = PLAN.step(0).items[2]

    def load(item: int) -> int:
        tried.append(item)
        if item == hung:
            raise VideoError("timeout", f"v{item}.mp4: no progress")
        return item

    def read(steps: int, **how: Any) -> list[Batch]:
        mesh, data = make_mesh(MeshSection()), DataSection(train="t", threads=1)
        first = 12 - steps
        with Feed(
            mesh, PLAN, load, len_of, RECORDS, data, start_step=first, num_steps=steps, **how
        ) as reader:
            return list(reader)

    whole = read(12)
    assert tried.count(hung) == 1
    failures = [failure for batch in whole for failure in batch.failures]
    assert len(failures) > 2 and {failure.item for failure in failures} == {hung}
    tried.clear()
    rest = read(8, given_up={hung: ("timeout", f"v{hung}.mp4: no progress")})
    assert hung not in tried
    assert [batch[:4] for batch in rest] == [batch[:4] for batch in whole[4:]]


def len_of(items: list[int], bucket: int) -> int:
    return len(items)
