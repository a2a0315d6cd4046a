"""Refilling a step: groups whose rewards are all equal make room for others (dynamic sampling).

They teach nothing. With `rollout.refills` a step samples further prompts, and the groups of theirs
whose rewards differ take the places of those that do not, until all P teach or the refills are used
up (DAPO, arXiv 2503.14476, section 3.2). All hosts decide alike: they hold the same rewards.

Legend: P prompts, G completions per prompt, C completion tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import Mesh, PartitionSpec
from jax.stages import Lowered

from data.records import Record
from jaxgrpo.programs import Scores
from jaxgrpo.rollout import Rollout
from jaxgrpo.sharding import jit_on, shape_on
from models.qwen2_5_vl.processor import Prompt


class Groups(NamedTuple):
    """P prompts with their completions and what those earned, on the devices; leading axis P."""

    prompt: Prompt
    features: Array | None  # of a frozen vision tower
    rollout: Rollout
    scores: Scores


class Drawn(NamedTuple):
    """The same on the host, and on every process: whole batches; leading axis P."""

    records: Sequence[Record]
    tokens: np.ndarray  # int32[P, G, C]
    lengths: np.ndarray  # int32[P, G]
    finished: np.ndarray  # bool[P, G]
    scores: Scores


def places(equal: Any, newly_equal: Any) -> np.ndarray:
    """Which of the new groups takes the place of each one held, int32[P]; -1: none.

    Args:
      equal: bool[P], the groups held whose rewards are all equal.
      newly_equal: bool[P], the same of the new ones.

    Example: held [ok, equal, ok, equal] and new [equal, ok, ok, ok] give [-1, 1, -1, 2].
    """
    source = np.full(len(equal), -1, np.int32)
    free, offered = np.flatnonzero(equal), np.flatnonzero(~newly_equal)
    count = min(len(free), len(offered))
    source[free[:count]] = offered[:count]
    return source


def refilled(held: Drawn, new: Drawn, source: np.ndarray) -> Drawn:
    """`held` with the new groups in their `places`."""
    records = [
        new.records[place] if place >= 0 else record
        for place, record in zip(source, held.records, strict=True)
    ]
    arrays = jax.tree.map(lambda a, b: _rows(np, a, b, source), held[1:], new[1:])
    return Drawn(records, *arrays)


def together(batches: Sequence[Drawn]) -> Drawn:
    """All groups of several batches, one after another."""
    records = [record for batch in batches for record in batch.records]
    arrays = jax.tree.map(lambda *parts: np.concatenate(parts), *(batch[1:] for batch in batches))
    return Drawn(records, *arrays)


def lower_refill(mesh: Mesh, groups: Groups) -> Lowered:
    """Lowers (held, new, places int32[P]) -> the groups held, refilled; the first is donated.

    Args:
      groups: shapes with shardings.
    """

    def refill(held: Groups, new: Groups, source: Array) -> Groups:
        refilled: Groups = jax.tree.map(lambda a, b: _rows(jnp, a, b, source), held, new)
        return refilled

    shardings: Any = jax.tree.map(lambda x: x.sharding, groups)
    source = shape_on(mesh, PartitionSpec(), groups.scores.total.shape[:1], np.int32)
    program = jit_on(mesh, refill, donate_argnums=0, out_shardings=shardings)
    return program.lower(groups, groups, source)


def _rows(numpy: Any, held: Any, new: Any, source: Any) -> Any:
    """Row p of `new` at place source[p], of `held` where that is -1; `numpy` is NumPy or jax's."""
    taken = (source >= 0).reshape(-1, *[1] * (held.ndim - 1))
    return numpy.where(taken, new[source], held)
