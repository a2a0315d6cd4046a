"""Packing: a manifest and its clips become a TFDS dataset of ArrayRecord shards.

An element is a clip, its bytes as they were, with the rows of the manifest that ask about it. (Not
an element per row: the five questions of a video would store it five times.) Without clips it has
the rows and what probing found, and the clips stay where they are. Shards are made one by
one in the manifest's order; TFDS's `GeneratorBasedBuilder` would shuffle them through temporary
files, for which it needs TensorFlow beyond 1 GB.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import io
import json
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np
import tensorflow_datasets as tfds
from tqdm import tqdm

from data.probe import Clips, Encoded, Probe, VideoError, check_file, probe
from data.records import Record, row_of, write_atomically
from data.sources import PACKED, RECORDS, Source
from data.storage import gib

# An element is a protobuf message, and those end at 2 GiB; the rows and names need a little.
_LARGEST: Final = (1 << 31) - (1 << 24)


class PackError(ValueError):
    """A dataset that cannot be packed."""


class Summary(NamedTuple):
    """What was packed; `rejected` holds per record id why its video cannot be used.

    `clips` are those that can be used, packed or not; `bytes` are those of the shards.
    """

    records: int
    clips: int
    bytes: int
    shards: int
    rejected: dict[str, str]


class JaxgrpoClips(tfds.core.ShardBasedBuilder):
    """The TFDS builder of one split, from generators of elements, one per shard."""

    VERSION = tfds.core.Version("1.0.0")
    code_path = None  # TFDS would look for checksums there, with a package it does not require

    def __init__(
        self, split: str, shards: Sequence[Callable[[], Iterator[Any]]], data_dir: Path
    ) -> None:
        self._split = split
        self._shards = shards
        super().__init__(data_dir=str(data_dir), file_format="array_record")

    def _info(self) -> tfds.core.DatasetInfo:
        features = tfds.features.FeaturesDict(
            {
                "video": tfds.features.Text(),  # its path in the manifest
                "data": tfds.features.Tensor(
                    shape=(), dtype=np.object_
                ),  # the file's bytes, or none
                "records": tfds.features.Sequence(tfds.features.Text()),  # rows, JSON
            }
        )
        return tfds.core.DatasetInfo(builder=self, description=__doc__, features=features)

    def _shard_iterators_per_split(self, dl_manager: Any) -> Mapping[str, Sequence[Any]]:
        return {self._split: self._shards}


def pack(
    source: Source, out: Path, split: str, shard_bytes: int, threads: int, *, clips: bool = True
) -> Summary:
    """Writes a packed dataset that `data.sources.open_source` opens to the same records.

    Args:
      source: records and clips; a clip that cannot be read or probed stays outside of the shards,
        and the rows about it say why.
      out: the folder to make; what is in it after an error is not to be used.
      split: its name in TFDS.
      shard_bytes: a shard ends before the clip with which it would be larger.
      threads: clips read at once.
      clips: whether to pack the clips; without them the dataset is opened with their root.

    Raises:
      PackError: no clip can be read, or the disk is too small.
      StorageError: a bucket cannot be used.
    """
    rows: dict[str, list[Record]] = {}
    for record in source.records:
        rows.setdefault(record.video, []).append(record)
    identities = source.clips.identities(rows, threads)
    sizes = {video: identities[video].size if video in identities else 0 for video in rows}
    out.mkdir(parents=True)
    total, free = sum(sizes.values()), shutil.disk_usage(out).free
    if clips and total > free:
        raise PackError(f"{out}: the clips are {gib(total)}, but the disk has {gib(free)} left")
    read = functools.partial(_loaded, source.clips, threads)
    lengths = sizes
    if not clips:
        probes = source.clips.probe(source.records, threads)
        read = functools.partial(_probed, {v: probes[asked[0].id] for v, asked in rows.items()})
        lengths = {video: sum(map(len, map(_line, asked))) for video, asked in rows.items()}

    findings: dict[str, dict[str, Any]] = {}
    packed = 0
    progress = tqdm(total=len(rows), desc=split, unit="clip", disable=None)

    def elements(shard: int, videos: list[str]) -> Iterator[tuple[int, dict[str, Any]]]:
        nonlocal packed
        for video, data, found in read(videos):
            progress.update()
            if isinstance(found, VideoError):
                message = found.message.removeprefix(f"{source.clips.name(video)}: ")
                findings[video] = {"error": {"kind": found.kind, "message": message}}
                continue
            place = {"shard": shard, "clip": packed, "bytes": len(data)}
            findings[video] = place if clips else {"bytes": sizes[video]}
            findings[video] |= {"probe": dataclasses.asdict(found)}
            lines = [_line(record) for record in rows[video]]
            yield packed, {"video": video, "data": data, "records": lines}
            packed += 1

    shards = [
        functools.partial(elements, number, videos)
        for number, videos in enumerate(_in_shards(lengths, shard_bytes))
    ]
    with progress:
        names = _build(out, split, shards)
    rejected = {
        record.id: f"{record.id}: {source.clips.name(record.video)}: {error['message']}"
        for record in source.records
        if (error := findings[record.video].get("error"))
    }
    if not packed:
        reason = next(iter(rejected.values()))
        raise PackError(f"none of the {len(rows)} clips can be read; the first:\n{reason}")
    _write_rows(out, source.records, findings, names)
    size = sum((out / name).stat().st_size for name in names)
    return Summary(len(source.records), packed, size, len(names), rejected)


def _build(out: Path, split: str, shards: Sequence[Callable[[], Iterator[Any]]]) -> list[str]:
    """Lets TFDS write the shards, and returns their names."""
    scratch = out / "tfds"
    builder = JaxgrpoClips(split, shards, scratch)
    with contextlib.redirect_stdout(io.StringIO()):  # TFDS says that it downloads
        builder.download_and_prepare()
    names = sorted(builder.info.splits[split].filenames)
    for path in Path(builder.data_dir).iterdir():
        path.rename(out / path.name)
    shutil.rmtree(scratch)
    return names


def _write_rows(
    out: Path, records: Sequence[Record], findings: dict[str, dict[str, Any]], names: list[str]
) -> None:
    """Writes the manifest, each row with what is known about its video."""
    lines = []
    for record in records:
        found = findings[record.video]
        if "shard" in found:
            found = found | {"shard": names[found["shard"]]}
        lines.append(json.dumps(row_of(record) | {PACKED: found}, ensure_ascii=False) + "\n")
    write_atomically(out / RECORDS, "".join(lines))


def _line(record: Record) -> str:
    return json.dumps(row_of(record), ensure_ascii=False)


def _in_shards(sizes: Mapping[str, int], most: int) -> list[list[str]]:
    """The videos, in order, in groups of at most `most` bytes (or of one video)."""
    shards: list[list[str]] = [[]]
    filled = 0
    for video, size in sizes.items():
        if shards[-1] and filled + size > most:
            shards.append([])
            filled = 0
        shards[-1].append(video)
        filled += size
    return shards


def _probed(
    found: Mapping[str, Probe | VideoError], videos: Sequence[str]
) -> Iterator[tuple[str, bytes, Probe | VideoError]]:
    """As `_loaded`, with no bytes."""
    return ((video, b"", found[video]) for video in videos)


def _loaded(
    clips: Clips, threads: int, videos: Sequence[str]
) -> Iterator[tuple[str, bytes, Probe | VideoError]]:
    """Each video's bytes and what it claims, in order, read a little ahead."""

    def load(video: str) -> tuple[str, bytes, Probe | VideoError]:
        try:
            file = clips.fetch(video)
            if not isinstance(file, Encoded):
                check_file(Path(file))
                file = Encoded(clips.name(video), Path(file).read_bytes())
            if len(file.data) > _LARGEST:
                raise VideoError(
                    "unreadable", f"{file}: {gib(len(file.data))}; a packed clip has at most 2 GiB"
                )
            return video, file.data, probe(file)
        except VideoError as error:
            return video, b"", error

    ahead: collections.deque[Future[tuple[str, bytes, Probe | VideoError]]] = collections.deque()
    with ThreadPoolExecutor(max(1, threads), thread_name_prefix="pack") as pool:
        for video in videos:
            ahead.append(pool.submit(load, video))
            if len(ahead) > threads:
                yield ahead.popleft().result()
        while ahead:
            yield ahead.popleft().result()
