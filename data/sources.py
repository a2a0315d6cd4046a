"""Where a manifest's videos are: files in a folder, objects in a bucket, or records of a packed
dataset (ArrayRecord shards that `jaxgrpo pack` wrote). Training is the same from each.

    FOLDER/train/records.jsonl      the manifest; each row's field `packed` says where its clip is
                                    and what it claims, so that nothing is probed at a start
    FOLDER/train/*.array_record-*   the clips, a TFDS dataset with dataset_info.json, features.json

A dataset that was packed without clips has only their rows and what they claim.
"""

from __future__ import annotations

import functools
import math
import posixpath
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final, NamedTuple

from data.probe import Clips, Encoded, Probe, VideoError, VideoFile, finding, probe_all
from data.records import ManifestError, Record, read_manifest, read_rows
from data.staging import Stage
from data.storage import (
    Identity,
    StorageError,
    cache_folder,
    digest,
    fetch,
    gib,
    identify,
    identify_all,
    is_url,
    join,
    list_files,
    read,
)

RECORDS: Final = "records.jsonl"  # of a packed dataset
PACKED: Final = "packed"  # the field of its rows


class Source(NamedTuple):
    """A manifest's records and their videos."""

    records: list[Record]
    clips: Clips


def open_source(
    manifest: str, root: str, stage: Stage | None, threads: int, say: Callable[[str], None]
) -> Source:
    """Reads a manifest and finds out where its videos are. No video is opened.

    Args:
      manifest: a JSONL file, or the folder of a packed dataset. In a bucket, the first is what ends
        in ".jsonl".
      root: the folder or address that a JSONL manifest's videos are relative to, and those of a
        dataset that was packed without clips.
      stage: where what a bucket gives is kept, if anywhere. A packed dataset in a bucket is fetched
        to it, whole, before this returns: ArrayRecord reads local files only.
      threads: files asked for at once.
      say: told what is fetched, and where to.

    Raises:
      ManifestError: the manifest, or the packed dataset, cannot be used.
      StorageError: a bucket cannot be used, or the stage is missing or too small.
    """
    if is_url(manifest) and not manifest.endswith(".jsonl"):
        files = _packed_files(manifest)
        folder = _staged(manifest, files, stage, threads, say)
        return _open_packed(folder, manifest, files, _files(root, stage))
    if not is_url(manifest) and Path(manifest).is_dir():
        return _open_packed(Path(manifest), manifest, {}, _files(root, stage))
    records = read_manifest(manifest, root)
    return Source(records, _files(root, stage))


def _files(root: str, stage: Stage | None) -> Clips:
    return BucketClips(root, stage) if is_url(root) else FolderClips(root)


# ---- a folder ----


@dataclass(frozen=True)
class FolderClips:
    """Videos below a local folder."""

    root: str

    def name(self, video: str) -> str:
        return str(Path(self.root, video))

    def identities(self, videos: Iterable[str], threads: int) -> dict[str, Identity]:
        def look(video: str) -> Identity | None:
            try:
                stat = Path(self.root, video).stat()
            except OSError:
                return None
            return Identity(stat.st_size, str(stat.st_mtime_ns))

        videos = list(videos)
        with ThreadPoolExecutor(max(1, threads), thread_name_prefix="identify") as pool:
            found = dict(zip(videos, pool.map(look, videos), strict=True))
        return {video: identity for video, identity in found.items() if identity}

    def fetch(self, video: str) -> Path:
        return Path(self.root, video)

    def probe(
        self, records: Iterable[Record], threads: int, timeout: float = math.inf
    ) -> dict[str, Probe | VideoError]:
        return probe_all(records, self, threads, Path(self.root, ".probes.json"), timeout)


# ---- a bucket ----


@dataclass(frozen=True)
class BucketClips:
    """Videos below an address: each is read whole, from the stage if it is there.

    What a video is known to be, it is for the whole run: if it is replaced meanwhile, it fails.
    """

    root: str
    stage: Stage | None
    _known: dict[str, Identity] = field(default_factory=dict, compare=False, repr=False)

    def name(self, video: str) -> str:
        return join(self.root, video)

    def identities(self, videos: Iterable[str], threads: int) -> dict[str, Identity]:
        videos = list(videos)
        unknown = [video for video in videos if video not in self._known]
        self._known.update(identify_all(self.root, unknown, threads))
        return {video: self._known[video] for video in videos if video in self._known}

    def fetch(self, video: str) -> Encoded:
        url = self.name(video)
        try:
            identity = self._known.get(video) or identify(url)
            data = self.stage.get(url, identity) if self.stage else None
            if data is None:
                data = read(url, identity)
                if self.stage:
                    self.stage.put(url, identity, data)
        except FileNotFoundError as error:
            raise VideoError("missing", f"{url}: there is no such object") from error
        except StorageError as error:
            raise VideoError("unreachable", str(error)) from error
        return Encoded(url, data)

    def probe(
        self, records: Iterable[Record], threads: int, timeout: float = math.inf
    ) -> dict[str, Probe | VideoError]:
        """Reads every video once, which fills the stage; findings are kept there or in the cache.

        Raises:
          StorageError: the bucket cannot be used.
        """
        folder = self.stage.folder if self.stage else cache_folder()
        cache = folder / "probes" / f"{digest(self.root.rstrip('/'))}.json"
        return probe_all(records, self, threads, cache, timeout)


# ---- a packed dataset ----


class Packed(NamedTuple):
    """Where a video is in a packed dataset: its shard, its number in all of them, its bytes."""

    shard: str
    clip: int
    bytes: int


@dataclass(frozen=True)
class PackedClips:
    """Videos in ArrayRecord shards of a local folder.

    Attributes:
      folder: holds the shards.
      origin: the folder or address that the user named.
      places: by video; those that could not be read when it was packed are not in it.
      findings: by video, as the probe cache holds them.
      remote: of a dataset that came from a bucket, what each file is.
    """

    folder: Path
    origin: str
    places: dict[str, Packed]
    findings: dict[str, dict[str, Any]]
    remote: dict[str, Identity]

    def name(self, video: str) -> str:
        return f"{video} in {self.origin}"

    def identities(self, videos: Iterable[str], threads: int) -> dict[str, Identity]:
        return {
            video: Identity(place.bytes, f"{place.shard} {place.clip} {self._written(place.shard)}")
            for video in videos
            if (place := self.places.get(video))
        }

    def fetch(self, video: str) -> Encoded:
        place = self.places.get(video)
        if place is None:
            raise VideoError("missing", f"{self.name(video)}: is not among the packed clips")
        try:
            return self._read(video, place)
        except VideoError:
            if not self.remote:
                raise
        # A staged shard is damaged or gone: fetched again, once in each process.
        with _mending:
            _data_source.cache_clear()
            try:
                return self._read(video, place)  # another thread or process was faster
            except VideoError:
                _fetch_again(self.origin, str(self.folder), place.shard, self.remote[place.shard])
            return self._read(video, place)

    def probe(
        self, records: Iterable[Record], threads: int, timeout: float = math.inf
    ) -> dict[str, Probe | VideoError]:
        return {
            record.id: finding(self.findings[record.video], self.name(record.video))
            for record in records
        }

    def _written(self, shard: str) -> int:
        """When a shard was written, in ns; 0 for one that is gone."""
        try:
            return (self.folder / shard).stat().st_mtime_ns
        except OSError:
            return 0

    def _read(self, video: str, place: Packed) -> Encoded:
        try:
            element = _data_source(str(self.folder))[place.clip]
        except (RuntimeError, ValueError, OSError) as error:  # ArrayRecord's and protobuf's
            raise VideoError(
                "unreadable",
                f"{self.name(video)}: shard {self.folder / place.shard} is damaged: {error}",
            ) from error
        data: bytes = element["data"]
        if element["video"].decode() != video or len(data) != place.bytes:
            raise VideoError(
                "unreadable",
                f"{self.name(video)}: clip {place.clip} of the shards is another one: "
                f"{RECORDS} and the shards are of two datasets",
            )
        return Encoded(self.name(video), data)


@dataclass(frozen=True)
class ProbedClips:
    """Videos below a root, of a dataset that was packed without them.

    Attributes:
      files: the videos.
      findings: by video, as the probe cache holds them, with the file's bytes; of a file that has
        another size now they are not believed.
    """

    files: Clips
    findings: dict[str, dict[str, Any]]

    def name(self, video: str) -> str:
        return self.files.name(video)

    def identities(self, videos: Iterable[str], threads: int) -> dict[str, Identity]:
        return self.files.identities(videos, threads)

    def fetch(self, video: str) -> VideoFile:
        return self.files.fetch(video)

    def probe(
        self, records: Iterable[Record], threads: int, timeout: float = math.inf
    ) -> dict[str, Probe | VideoError]:
        records = list(records)
        now = self.identities({record.video for record in records}, threads)
        known = {
            video
            for video, identity in now.items()
            if self.findings[video].get("bytes") == identity.size
        }
        others = [record for record in records if record.video not in known]
        found = self.files.probe(others, threads, timeout) if others else {}
        return found | {
            record.id: finding(self.findings[record.video], self.name(record.video))
            for record in records
            if record.video in known
        }


def _check_info(folder: Path, origin: str) -> None:
    """Raises a `ManifestError` where TFDS cannot tell what is in the shards: none could be read."""
    import tensorflow_datasets as tfds  # not above: most runs have no packed data

    try:
        splits = len(tfds.builder_from_directory(str(folder)).info.splits)
    except Exception as error:  # TFDS passes on what its parsers raise
        raise ManifestError(
            f"{origin}: dataset_info.json or features.json cannot be read ({error}): copy the "
            "folder again"
        ) from error
    if splits != 1:
        raise ManifestError(
            f"{origin}/dataset_info.json: expected one split, found {splits}: copy the folder again"
        )


@functools.lru_cache(maxsize=8)
def _data_source(folder: str) -> Any:
    """The clips, by their number. Its readers are shared by all threads of the process."""
    import tensorflow_datasets as tfds  # not above: most runs have no packed data

    builder = tfds.builder_from_directory(folder)
    (split,) = builder.info.splits
    return builder.as_data_source(split=split)


_mending = threading.Lock()


@functools.cache
def _fetch_again(url: str, folder: str, shard: str, identity: Identity) -> None:
    """Replaces a shard in the stage by a new copy, the first time that it is called for it.

    Raises:
      VideoError: it cannot be had.
    """
    target = Path(folder, shard)
    try:
        target.unlink(missing_ok=True)
        fetch(join(url, shard), identity, target)
    except StorageError as error:
        raise VideoError("unreachable", str(error)) from error
    _data_source.cache_clear()


def _open_packed(folder: Path, origin: str, remote: dict[str, Identity], files: Clips) -> Source:
    if not (folder / RECORDS).is_file():
        raise ManifestError(
            f"{origin}: expected a JSONL manifest, or a folder that `jaxgrpo pack` wrote; found a "
            f"folder without {RECORDS}"
        )
    rows = read_rows(folder / RECORDS, ".", PACKED)
    places: dict[str, Packed] = {}
    findings: dict[str, dict[str, Any]] = {}
    for record, packed in rows:
        try:
            finding(packed, record.video)
            findings[record.video] = packed
            if "shard" in packed:
                place = Packed(packed["shard"], packed["clip"], packed["bytes"])
                if tuple(map(type, place)) != (str, int, int):
                    raise TypeError(f"expected a text and two whole numbers, found {place}")
                places[record.video] = place
        except (KeyError, TypeError) as error:
            raise ManifestError(
                f"{origin}/{RECORDS}: record {record.id!r} has no valid field {PACKED!r} "
                f"({error!r}): pack the dataset again"
            ) from error
    for shard in sorted({place.shard for place in places.values()}):
        if not (folder / shard).is_file():
            raise ManifestError(f"{origin}: the shard {shard} is missing: copy the folder again")
    clips: Clips = PackedClips(folder, origin, places, findings, remote)
    if places:
        _check_info(folder, origin)
    else:
        clips = ProbedClips(files, findings)
    return Source([record for record, _ in rows], clips)


def _packed_files(url: str) -> dict[str, Identity]:
    """The files of a packed dataset in a bucket."""
    listed = list_files(url)
    if RECORDS not in listed:
        found = f"{len(listed)} other files" if listed else "no files"
        raise StorageError(
            f"{url}: expected a manifest whose name ends in .jsonl, or a folder that `jaxgrpo "
            f"pack` wrote, with {RECORDS}; found {found}; check the bucket and the folder"
        )
    return {
        name: identity
        for name, identity in listed.items()
        if name in (RECORDS, "dataset_info.json", "features.json") or ".array_record-" in name
    }


def _staged(
    url: str,
    files: dict[str, Identity],
    stage: Stage | None,
    threads: int,
    say: Callable[[str], None],
) -> Path:
    """The local copy of a packed dataset in a bucket."""
    if stage is None:
        size = gib(sum(identity.size for identity in files.values()))
        raise StorageError(
            f"{url} is a packed dataset of {size}, which is read from local disk: set "
            "data.stage to a local folder, and data.stage_gib to what it may hold"
        )
    return stage.packed(url, posixpath.basename(url.rstrip("/")), files, threads, say)
