"""The batches of this process, from a plan: alike on all processes that feed the same rows.

Where the tensor axis spans hosts, which it does on most TPU slices, several processes feed the same
rows of a batch and each decodes their videos for itself. If one cannot read a video (its disk, its
network), all of them must put the same item in its place: copies of one row that differ would let
the copies of the weights drift apart, and nothing would say so.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Self

from jax.sharding import Mesh

from data.pipeline import Batch, batches
from data.probe import GIVEN_UP, VideoError
from data.records import Record
from data.sampling import Plan
from jaxgrpo.config import DataSection
from jaxgrpo.sharding import gather_objects, process_rows, shares_rows


class Feed(Iterator[Batch]):
    """An iterator of batches; use it in a with statement, on all processes in step.

    Attributes:
      rows: the rows of each batch that are this process's, rising.
    """

    def __init__(
        self,
        mesh: Mesh,
        plan: Plan,
        load: Callable[[int], Any],
        collate: Callable[[list[Any], int], Any],
        records: Sequence[Record],
        data: DataSection,
        *,
        start_step: int,
        num_steps: int,
        given_up: Mapping[int, tuple[str, str]] | None = None,
    ) -> None:
        """Reads steps start_step, ..., start_step + num_steps - 1; see `data.pipeline.batches`.

        Args:
          given_up: item -> kind and message of those whose decoder hung before; not tried again.
        """
        self.rows = process_rows(mesh, plan.prompts)
        self._shared = shares_rows(mesh)
        self._load = load = _Refusing(load, dict(given_up or {}))
        self._read = functools.partial(
            batches,
            plan,
            collate=collate,
            rows=self.rows,
            threads=data.threads,
            ids=[record.id for record in records],
        )
        self._batches = self._read(
            load,
            start_step=start_step,
            num_steps=num_steps,
            workers=data.workers,
            prefetch=data.prefetch,
        )

    def __next__(self) -> Batch:
        batch = next(self._batches)
        return self._agreed(batch) if self._shared else batch

    def _agreed(self, batch: Batch) -> Batch:
        """The batch, read again without what any process with the same rows could not read."""
        while True:
            told = gather_objects([self.rows, batch.items, batch.failures])
            versions = {(tuple(rows), tuple(items)) for rows, items, _ in told}
            if len(versions) == len({rows for rows, _ in versions}):
                return batch
            failed = [failures for rows, _, failures in told if rows == self.rows]
            bad = {item: (kind, message) for part in failed for item, kind, message in part}
            load = _Refusing(self._load, bad)
            with self._read(load, start_step=batch.step, num_steps=1, prefetch=0) as again:
                batch = next(again)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._batches.close()


@dataclasses.dataclass(frozen=True)
class _Refusing:
    """`load`, with items that are bad whatever it would find: item -> kind and message.

    One whose decoder hangs becomes one of them: another look would take as long, and might end
    otherwise than before the run was interrupted.
    """

    load: Callable[[int], Any]
    bad: dict[int, tuple[str, str]]

    def __call__(self, item: int) -> Any:
        if item in self.bad:
            raise VideoError(*self.bad[item])
        try:
            return self.load(item)
        except VideoError as error:
            if error.kind == GIVEN_UP:
                self.bad[item] = (error.kind, error.message)
            raise
