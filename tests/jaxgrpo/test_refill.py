"""Refilling a step with groups that teach."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from data.records import Record
from jaxgrpo.config import MeshSection
from jaxgrpo.programs import Scores
from jaxgrpo.refill import Drawn, Groups, lower_refill, places, refilled, together
from jaxgrpo.rollout import Rollout
from jaxgrpo.sharding import PROMPTS, make_mesh
from models.qwen2_5_vl.processor import Prompt

P, G, C = 4, 2, 3


def test_new_groups_take_the_places_of_equal_ones_in_their_order() -> None:
    source = places(np.array([False, True, False, True]), np.array([True, False, False, False]))
    np.testing.assert_array_equal(source, [-1, 1, -1, 2])  # as in the docstring


@pytest.mark.parametrize(
    ("equal", "newly_equal", "expected"),
    [
        ([1, 1, 1, 1], [1, 1, 0, 1], [2, -1, -1, -1]),
        ([1, 1, 1, 1], [1, 1, 1, 1], [-1] * 4),
        ([0, 0, 0, 1], [0, 0, 0, 0], [-1, -1, -1, 0]),
        ([0, 0, 0, 0], [0, 0, 0, 0], [-1] * 4),
    ],
)
def test_as_many_change_places_as_there_are_of_both(
    equal: list[int], newly_equal: list[int], expected: list[int]
) -> None:
    source = places(np.array(equal, bool), np.array(newly_equal, bool))
    np.testing.assert_array_equal(source, expected)


def drawn(first: int) -> Drawn:
    """Groups numbered from `first` on, told by all that belongs to them."""
    number = np.arange(first, first + P)
    records = [
        Record(str(i), "a.mp4", "tvg", "When?", (), None, ((0.0, 1.0),), 2.0) for i in number
    ]
    per_completion = np.broadcast_to(number[:, None], (P, G))
    scores: Any = Scores(
        total=per_completion.astype(np.float32),
        components={"iou": per_completion + 0.5},
        advantages=per_completion - 100.0,
        zero_variance=number % 2 == 0,
    )
    tokens = np.broadcast_to(number[:, None, None], (P, G, C))
    return Drawn(records, tokens, per_completion, per_completion % 3 == 0, scores)


def test_on_the_host_a_group_moves_with_all_that_belongs_to_it() -> None:
    found = refilled(drawn(0), drawn(10), np.array([-1, 2, 0, -1]))
    expected = [0, 12, 10, 3]
    assert [record.id for record in found.records] == [str(number) for number in expected]
    np.testing.assert_array_equal(found.tokens[:, 1, 2], expected)
    np.testing.assert_array_equal(found.lengths[:, 0], expected)
    np.testing.assert_array_equal(found.finished[:, 0], [n % 3 == 0 for n in expected])
    np.testing.assert_array_equal(found.scores.components["iou"][:, 1], np.add(expected, 0.5))
    np.testing.assert_array_equal(found.scores.zero_variance, [n % 2 == 0 for n in expected])


def test_all_that_was_sampled_is_put_together() -> None:
    found = together([drawn(0), drawn(10)])
    assert [record.id for record in found.records] == [str(n) for n in (*range(4), *range(10, 14))]
    np.testing.assert_array_equal(found.scores.total[:, 0], [*range(4), *range(10, 14)])


@pytest.mark.parametrize("features", [False, True])
def test_on_the_devices_every_array_of_a_group_moves(features: bool) -> None:
    """Across a mesh of 4 x 2 devices, whose rows lie on different ones."""
    mesh = make_mesh(MeshSection(data=2, fsdp=2, tensor=2), jax.devices()[:8])
    split = jax.sharding.NamedSharding(mesh, PROMPTS)
    whole = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())

    def groups(first: int) -> Groups:
        host = drawn(first)

        def of(*shape: int, dtype: Any = np.int32, sharding: Any = split) -> Any:
            number = np.arange(first, first + P).reshape(P, *[1] * len(shape))
            return jax.device_put(np.broadcast_to(number, (P, *shape)).astype(dtype), sharding)

        shapes = dict.fromkeys(Prompt._fields, (5, 2)) | {"length": ()}
        return Groups(
            Prompt(**{name: of(*shape) for name, shape in shapes.items()}),
            of(6, 3, dtype=np.float32) if features else None,
            Rollout(
                of(G, C, sharding=whole),
                of(G, sharding=whole),
                of(G, C, dtype=np.float32),
                of(G, dtype=bool, sharding=whole),
            ),
            jax.device_put(host.scores, whole),
        )

    source = np.array([-1, 2, 0, -1], np.int32)
    shapes = jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), groups(0)
    )
    program = lower_refill(mesh, shapes).compile()
    found = program(groups(0), groups(10), jax.device_put(source, whole))
    expected = jax.tree.map(
        lambda a, b: np.stack([np.asarray(a)[0], np.asarray(b)[2], np.asarray(b)[0], a[3]]),
        groups(0),
        groups(10),
    )
    assert jax.tree.map(lambda x: x.sharding, found) == jax.tree.map(lambda x: x.sharding, shapes)
    for a, b in zip(*map(jax.tree.leaves, (found, expected)), strict=True):
        np.testing.assert_array_equal(a, b)
