"""`jaxgrpo pack CONFIG OUT`: the manifests and clips of a config as ArrayRecord shards.

A pod reads few large files from a bucket far better than many small ones, and what is packed needs
no probing at the start of a run.
"""

from __future__ import annotations

import shutil
from pathlib import Path

from data.packing import PackError, pack
from data.sources import open_source
from data.storage import gib, is_url
from jaxgrpo.config import Config
from jaxgrpo.inputs import manifest_paths, open_stage

_SHOWN = 5  # rejected clips that are printed


def main(config: Config, out: str) -> None:
    """Packs `data.train` and `data.eval` into OUT/train and OUT/eval, and says how to use them.

    OUT appears whole or not at all.

    Raises:
      PackError: OUT is taken or in a bucket, or none of the clips can be read.
      ManifestError, StorageError: see `data.sources.open_source`.
    """
    folder = Path(out)
    _check_free(out)
    data = config.data
    partial = folder.resolve().with_name(f"{folder.name}.partial")
    partial.parent.mkdir(parents=True, exist_ok=True)
    try:
        partial.mkdir()
    except FileExistsError as error:
        raise PackError(
            f"{partial} exists: another pack to {out} is running, or one was killed; in that case "
            "remove it"
        ) from error
    try:
        manifests = {key.removeprefix("data."): path for key, path in manifest_paths(data).items()}
        manifests = {split: path for split, path in manifests.items() if path}
        for split, path in manifests.items():
            source = open_source(path, data.root, open_stage(data), data.threads, print)
            done = pack(source, partial / split, split, data.shard_mib << 20, data.threads)
            print(
                f"{split}: {done.records} rows about {done.clips} clips, {gib(done.bytes)} in "
                f"{done.shards} shards"
            )
            reasons = list(done.rejected.values())
            if reasons:
                print(f"{len(reasons)} rows whose clip cannot be read; they stay in records.jsonl:")
                print("\n".join(f"  {reason}" for reason in reasons[:_SHOWN]))
        partial.rename(folder)
    except BaseException:
        shutil.rmtree(partial)
        raise
    print(f"wrote {folder}")
    uses = " ".join(f"data.{split}={folder / split}" for split in manifests)
    print(f"next: jaxgrpo train CONFIG {uses}, or copy {folder} to a bucket and name that")


def _check_free(out: str) -> None:
    if is_url(out):
        raise PackError(f"{out}: pack into a local folder, then copy that to the bucket")
    folder = Path(out)
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise PackError(f"{out} exists and is not an empty folder: remove it or name another one")
