"""`jaxgrpo pack CONFIG OUT`: the manifests and clips of a config as ArrayRecord shards.

A pod reads few large files from a bucket far better than many small ones, and what is packed needs
no probing at the start of a run.
"""

from __future__ import annotations

from pathlib import Path

from data.packing import PackError, Summary, pack
from data.sources import open_source
from data.storage import gib
from jaxgrpo.config import Config
from jaxgrpo.inputs import manifest_paths, open_stage
from jaxgrpo.output import check_free, new_directory

_SHOWN = 5  # rejected rows that are printed


def main(config: Config, out: str) -> None:
    """Packs `data.train` and `data.eval` into OUT/train and OUT/eval, and says how to use them.

    OUT appears whole or not at all.

    Raises:
      OutputError: OUT is taken or in a bucket.
      PackError: there is no manifest, or none of its clips can be read.
      ManifestError, StorageError: see `data.sources.open_source`.
    """
    check_free(out)  # before synthetic clips are made
    data = config.data
    manifests = {
        key.removeprefix("data."): path for key, path in manifest_paths(data).items() if path
    }
    if not manifests:
        raise PackError("data.train and data.eval are empty: set one of them to a manifest")
    stage = open_stage(data)
    with new_directory(out, "pack") as folder:
        for split, path in manifests.items():
            source = open_source(path, data.root, stage, data.threads, print)
            done = pack(source, folder / split, split, data.shard_mib << 20, data.threads)
            _report(split, done)
    print(f"wrote {out}")
    uses = [f"data.{split}={Path(out) / split}" for split in manifests]
    uses += ["data.synthetic=null"] if data.synthetic else []
    print(f"next: jaxgrpo train CONFIG {' '.join(uses)}, or copy {out} to a bucket and name that")


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
