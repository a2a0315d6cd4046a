"""`jaxgrpo pack CONFIG OUT`: the manifests of a config, with their clips, as ArrayRecord shards.

A pod reads few large files from a bucket far better than many small ones, and what is packed needs
no probing at the start of a run.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path

from data.packing import PackError, Summary, pack
from data.sources import open_source
from data.storage import gib
from jaxgrpo import strict_yaml
from jaxgrpo.config import Config, DataSection
from jaxgrpo.inputs import open_stage
from jaxgrpo.mixture import manifests, place
from jaxgrpo.mixture_config import ManifestSection
from jaxgrpo.output import check_free, new_directory

_SHOWN = 5  # rejected rows that are printed


def main(config: Config, out: str, clips: bool = True) -> None:
    """Packs `data.train` and `data.eval` into OUT/train and OUT/eval, and says how to use them.

    Of a mixture each manifest is packed by itself, into OUT/train-0 and so on. OUT appears whole or
    not at all.

    Args:
      config: its `data` section.
      out: the folder to make.
      clips: whether the clips are packed too; else they stay where they are.

    Raises:
      OutputError: OUT is taken or in a bucket.
      PackError: there is no manifest, or none of its clips can be read.
      ManifestError, StorageError: see `data.sources.open_source`.
    """
    check_free(out)  # before synthetic clips are made
    data = config.data
    named = {key: parts for key, parts in manifests(data).items() if parts}
    if not named:
        raise PackError("data.train and data.eval are empty: set one of them to a manifest")
    stage = open_stage(data)
    uses = []
    with new_directory(out, "pack") as folder:
        for key, parts in named.items():
            split = key.removeprefix("data.")
            names = [split] if len(parts) == 1 else [f"{split}-{i}" for i in range(len(parts))]
            for name, part in zip(names, parts, strict=True):
                source = open_source(*place(part, data), stage, data.threads, print)
                size = data.shard_mib << 20
                _report(name, pack(source, folder / name, split, size, data.threads, clips=clips))
            uses.append(_use(data, key, parts, [str(Path(out) / name) for name in names]))
    print(f"wrote {out}")
    uses += ["data.synthetic=null"] if data.synthetic else []
    print(f"next: jaxgrpo train CONFIG {' '.join(uses)}, or copy {out} to a bucket and name that")


def _use(
    data: DataSection, key: str, parts: Sequence[ManifestSection], packed: Sequence[str]
) -> str:
    """The override that names the packed folders in the place of their manifests."""
    mixture = {"data.train": "mixture", "data.eval": "eval_mixture"}[key]
    if not data.__dict__[mixture]:
        return f"{key}={packed[0]}"
    sections = [
        strict_yaml.plain(dataclasses.replace(part, manifest=folder))
        for part, folder in zip(parts, packed, strict=True)
    ]
    return f"'data.{mixture}={json.dumps(sections)}'"  # JSON is YAML


def _report(split: str, done: Summary) -> None:
    print(
        f"{split}: {done.records} rows about {done.clips} clips, {gib(done.bytes)} in "
        f"{done.shards} shards"
    )
    reasons = list(done.rejected.values())
    if reasons:
        print(f"{len(reasons)} rows whose clip cannot be read; they stay in records.jsonl:")
        more = len(reasons) - _SHOWN
        print("\n".join(f"  {reason}" for reason in reasons[:_SHOWN]))
        print(f"  ... and {more} more\n" if more > 0 else "", end="")
