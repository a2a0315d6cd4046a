"""`jaxgrpo convert KIND IN [IN ...] OUT`: published annotation files as one manifest."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from data.convert import activitynet, benchmarks, charades_sta, next_gqa, temporal_r1, video_r1
from data.convert.conversion import Conversion, summary
from data.convert.reading import ConvertError
from jaxgrpo import strict_yaml
from jaxgrpo.output import check_free

_YAML: Final = (".yaml", ".yml")


@dataclass(frozen=True)
class DatasetEntry:
    """One dataset of a Temporal-R1 YAML file."""

    json_path: str  # from the YAML file's folder
    data_folder: str = ""  # of its videos: below --root, or relative to it
    sampling_strategy: str = "all"


@dataclass(frozen=True)
class DatasetList:
    """A Temporal-R1 YAML file."""

    datasets: tuple[DatasetEntry, ...]


def main(kind: str, inputs: Sequence[str], out: str, options: Mapping[str, Any]) -> None:
    """Writes the manifest OUT and, beside it, the rejected rows; prints what became of all rows.

    Args:
      kind: a format, see `jaxgrpo convert --help`.
      inputs: its files.
      out: the manifest, which must not exist; its name ends in .jsonl.
      options: the kind's own; those that are absent or None have the kind's default.

    Raises:
      ConvertError: a file has another shape, or none of its rows can be used.
      OutputError: OUT exists or is in a bucket.
    """
    if not out.endswith(".jsonl"):
        raise ConvertError(f"OUT is {out}, expected a manifest to write, with a name in .jsonl")
    check_free(out)
    given = {name: value for name, value in options.items() if value is not None}
    done = _convert(kind, [Path(path) for path in inputs], given)
    rejects = done.write(out)
    print(f"{kind}: {done.read:,} rows read, {len(done.records):,} written")
    if told := summary(done):
        print(told)
    if done.rejected:
        print(f"wrote {out}, and the rejected rows to {rejects}")
    else:
        print(f"wrote {out}")
    print(f"next: set data.train or data.eval to {out}, and data.root to the folder of the videos")


def _convert(kind: str, paths: list[Path], given: dict[str, Any]) -> Conversion:
    videos = {"videos": given["videos"]} if "videos" in given else {}
    match kind:
        case "temporal-r1":
            return temporal_r1.convert(_parts(paths, given["root"]), **videos, seed=given["seed"])
        case "video-r1":
            return video_r1.convert(paths, **videos)
        case "charades-sta":
            return charades_sta.convert(paths, _paths(given, "durations"), **videos)
        case "activitynet-captions":
            return activitynet.convert(paths, **videos)
        case "next-gqa":
            spans, names = _paths(given, "spans"), _paths(given, "paths")
            return next_gqa.convert(paths, spans, names, **videos)
        case "mvbench":
            return benchmarks.mvbench(paths, **videos)
        case "video-mme":
            return benchmarks.video_mme(paths, **videos)
        case "tempcompass":
            return benchmarks.tempcompass(paths, **videos)
    raise AssertionError(f"the command line knows a kind {kind!r} that this module does not")


def _paths(given: Mapping[str, Any], name: str) -> list[Path]:
    return [Path(path) for path in given.get(name, ())]


def _parts(paths: Sequence[Path], root: str) -> list[temporal_r1.Part]:
    """The files that the inputs are or, of YAML files, name."""
    parts = []
    for path in paths:
        if path.suffix not in _YAML:
            parts.append(temporal_r1.Part(path))
            continue
        raw = strict_yaml.parse(path.read_bytes(), str(path))
        if not isinstance(raw, dict) or not isinstance(raw.get("datasets"), list):
            raise ConvertError(f"{path}: expected `datasets:` and a list of them")
        for entry in strict_yaml.build(DatasetList, raw, str(path)).datasets:
            folder = _below(root, entry.data_folder, path)
            json_path = path.parent / entry.json_path
            parts.append(temporal_r1.Part(json_path, folder, entry.sampling_strategy))
    return parts


def _below(root: str, folder: str, source: Path) -> str:
    """A folder of videos, relative to the data root."""
    if not os.path.isabs(folder):
        return folder
    inside = os.path.relpath(folder, os.path.abspath(root))
    if inside == os.pardir or inside.startswith(os.pardir + os.sep):
        raise ConvertError(
            f"{source}: data_folder {folder} is not below --root {root}: give as --root the folder "
            "of all videos, which will be data.root"
        )
    return "" if inside == os.curdir else inside
