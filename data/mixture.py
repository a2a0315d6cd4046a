"""Several manifests as one: their records in a row, each with the videos of its own root."""

from __future__ import annotations

import collections
import dataclasses
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from data.probe import Clips, Probe, VideoError, VideoFile
from data.records import Record
from data.sources import Source
from data.storage import Identity


class MixtureError(ValueError):
    """Manifests that cannot be joined."""


class Member(NamedTuple):
    """One of the manifests.

    Attributes:
      manifest: its path, for messages.
      source: its records and videos.
      prefix: what is put in front of its ids.
    """

    manifest: str
    source: Source
    prefix: str = ""


@dataclass(frozen=True)
class MixedClips:
    """The videos of several manifests; a record's `video` is "NUMBER:VIDEO", by its manifest."""

    manifests: tuple[str, ...]
    parts: tuple[Clips, ...]

    def manifest(self, video: str) -> str:
        """The manifest that a video belongs to."""
        return self.manifests[_split(video)[0]]

    def name(self, video: str) -> str:
        number, own = _split(video)
        return self.parts[number].name(own)

    def identities(self, videos: Iterable[str], threads: int) -> dict[str, Identity]:
        by_part: dict[int, list[str]] = collections.defaultdict(list)
        for video in videos:
            number, own = _split(video)
            by_part[number].append(own)
        return {
            _joined(number, own): identity
            for number, some in by_part.items()
            for own, identity in self.parts[number].identities(some, threads).items()
        }

    def fetch(self, video: str) -> VideoFile:
        number, own = _split(video)
        return self.parts[number].fetch(own)

    def probe(
        self, records: Iterable[Record], threads: int, timeout: float = math.inf
    ) -> dict[str, Probe | VideoError]:
        by_part: dict[int, list[Record]] = collections.defaultdict(list)
        for record in records:
            number, own = _split(record.video)
            by_part[number].append(dataclasses.replace(record, video=own))
        found: dict[str, Probe | VideoError] = {}
        for number, some in by_part.items():
            found |= self.parts[number].probe(some, threads, timeout)
        return found


def mix(members: Sequence[Member]) -> Source:
    """The records of all members, in their order, and their videos.

    A lone member without a prefix is its own source, so that a mixture of one is the same as the
    manifest itself.

    Raises:
      MixtureError: an id is in two of the manifests.
    """
    if len(members) == 1 and not members[0].prefix:
        return members[0].source
    records: list[Record] = []
    owner: dict[str, int] = {}
    for number, (manifest, source, prefix) in enumerate(members):
        for record in source.records:
            name, video = prefix + record.id, _joined(number, record.video)
            if owner.setdefault(name, number) != number:
                raise MixtureError(
                    f"the id {name!r} is in two manifests of a mixture, {manifest} and "
                    f"{members[owner[name]].manifest}: give one of them a prefix, such as 'b/'"
                )
            records.append(dataclasses.replace(record, id=name, video=video))
    manifests = tuple(member.manifest for member in members)
    return Source(records, MixedClips(manifests, tuple(m.source.clips for m in members)))


def _joined(number: int, video: str) -> str:
    return f"{number}:{video}"


def _split(video: str) -> tuple[int, str]:
    number, _, own = video.partition(":")
    return int(number), own
