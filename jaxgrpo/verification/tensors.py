"""The weights as they lie on disk: complete, finite, unchanged, like their siblings."""

from __future__ import annotations

import collections
import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final, NamedTuple

import numpy as np

from jaxgrpo import fingerprint
from jaxgrpo.fingerprint import Fingerprint, FingerprintError
from jaxgrpo.verification.checks import Check, Status, skipped, verdict_on
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.tensor_files import Tensor, TensorFiles, WeightError
from models.qwen2_5_vl.weights import model_tensors

WEIGHTS: Final = "weights"
HUB: Final = "hub hashes"
FINGERPRINT: Final = "fingerprint"
PLAUSIBILITY: Final = "plausibility"

_THREADS: Final = 4  # each holds one tensor
_CHUNK: Final = 1 << 22  # values looked at in float32 at once
_SIBLINGS: Final = 4  # layers from which on a median means something
# Times that a root mean square may be off: norms of trained models span two orders of magnitude,
# matrices of one kind less than one.
_NORM_RANGE: Final = 64.0
_SIBLING_RANGE: Final = 16.0
_DIGEST: Final = re.compile(r"[0-9a-f]{40}([0-9a-f]{24})?")  # git's SHA-1 of a blob, or SHA-256


class Seen(NamedTuple):
    """One tensor, read once."""

    sha256: str
    not_finite: int
    first_not_finite: int | None  # its index in row-major order
    rms: float
    constant: bool


def look(tensors: Mapping[str, Tensor]) -> dict[str, Seen]:
    """Reads every tensor."""
    with ThreadPoolExecutor(_THREADS) as pool:
        return dict(zip(tensors, pool.map(_look, tensors.values()), strict=True))


def _look(tensor: Tensor) -> Seen:
    with TensorFiles() as files:
        values = files.read(tensor)
    flat = values.reshape(-1)
    bad, first, squares = 0, None, 0.0
    for start in range(0, flat.size, _CHUNK):
        part = flat[start : start + _CHUNK].astype(np.float32)
        finite = np.isfinite(part)
        if not finite.all():
            bad += int((~finite).sum())
            first = start + int(np.argmin(finite)) if first is None else first
            part = np.where(finite, part, 0)
        squares += float(np.square(part, dtype=np.float64).sum())
    return Seen(
        sha256=fingerprint.array_sha256(values),
        not_finite=bad,
        first_not_finite=first,
        rms=(squares / max(flat.size, 1)) ** 0.5,
        constant=flat.size > 0 and bool((flat == flat[0]).all()),
    )


def check(directory: Path, config: ModelConfig) -> Iterator[Check]:
    """Everything that can be said without computing with the weights."""
    yield hub(directory)
    try:
        tensors = model_tensors(directory, config)
        seen = look(tensors)
    except (WeightError, FileNotFoundError) as error:
        yield Check(WEIGHTS, Status.FAIL, str(error))
        for name in (FINGERPRINT, PLAUSIBILITY):
            yield skipped(name, "the weights cannot be read")
        return
    yield _finite(tensors, seen)
    try:
        yield compare(fingerprint.read(directory), directory, seen)
    except FingerprintError as error:
        yield Check(FINGERPRINT, Status.FAIL, str(error))
    yield plausible(tensors, seen)


def _finite(tensors: Mapping[str, Tensor], seen: Mapping[str, Seen]) -> Check:
    problems = []
    for name, one in seen.items():
        if one.first_not_finite is not None:
            place = np.unravel_index(one.first_not_finite, tensors[name].shape)
            where = [int(i) for i in place]
            problems.append(
                f"{name} in {tensors[name].file.name}: {one.not_finite} values are not finite, "
                f"the first at {where}"
            )
    kinds = collections.Counter(str(tensor.dtype) for tensor in tensors.values())
    types = ", ".join(f"{count} {kind}" for kind, count in kinds.items())
    good = f"all {len(tensors)} tensors of config.json, with their shapes, finite ({types})"
    return verdict_on(WEIGHTS, problems, good, "not all values are finite")


# ---- hashes ----


def hub(directory: Path) -> Check:
    """Files against the hub's own hashes, which its cache and its download folders keep."""
    expected = hub_hashes(directory)
    if not expected:
        return skipped(HUB, "the files do not lie as huggingface_hub downloads them")
    with ThreadPoolExecutor(_THREADS) as pool:
        found = list(pool.map(_hub_hash, expected, expected.values()))
    problems = [
        f"{path.name}: hash {digest}, the hub's is {expected[path]}: download it again"
        for path, digest in zip(expected, found, strict=True)
        if digest != expected[path]
    ]
    good = f"{len(expected)} files have the hashes that the hub gave them"
    return verdict_on(HUB, problems, good, "other files than those on the hub")


def hub_hashes(directory: Path) -> dict[Path, str]:
    """The hub's hash of each file: its blob's name in the cache, or a download's metadata.

    Large files have a SHA-256, others git's SHA-1.
    """
    found: dict[Path, str] = {}
    kept = directory / ".cache" / "huggingface" / "download"
    for path in sorted(directory.iterdir()):
        metadata = kept / f"{path.name}.metadata"  # the commit, the hash, the time
        if path.is_symlink() and path.resolve().parent.name == "blobs":
            digest = path.resolve().name
        elif metadata.is_file():
            digest = metadata.read_text(encoding="utf-8").splitlines()[1].strip()
        else:
            continue
        if _DIGEST.fullmatch(digest):
            found[path] = digest
    return found


def _hub_hash(path: Path, expected: str) -> str:
    if len(expected) == 64:
        return fingerprint.file_sha256(path)
    content = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def compare(expected: Fingerprint | None, directory: Path, seen: Mapping[str, Seen]) -> Check:
    """The directory against the fingerprint that was written with it."""
    if expected is None:
        return skipped(
            FINGERPRINT,
            f"there is no {fingerprint.FILE}, which `jaxgrpo export` writes: without it nothing "
            "here can tell two tensors of one shape that have changed places, or a changed value "
            "in config.json, since transformers would read them alike",
        )
    problems = _moved(expected.tensors, {name: one.sha256 for name, one in seen.items()})
    files = fingerprint.files(directory)
    for name, digest in expected.files.items():
        if name not in files:
            problems.append(f"{name} is missing")
        elif files[name] != digest:
            problems += _changed_file(directory, name, expected)
    unknown = [f"{name} was not there" for name in files if name not in expected.files]
    if problems:
        summary = "the directory is not as it was when its fingerprint was taken"
        return Check(FINGERPRINT, Status.FAIL, summary, (*problems, *unknown))
    good = (
        f"{len(expected.tensors)} tensors and {len(expected.files)} files are unchanged (SHA-256)"
    )
    return Check(FINGERPRINT, Status.WARN if unknown else Status.PASS, good, tuple(unknown))


def _moved(expected: Mapping[str, str], found: Mapping[str, str]) -> list[str]:
    """A line for each tensor whose bytes are others, and whose bytes they are if that is known."""
    wrong = [name for name in expected if found.get(name, expected[name]) != expected[name]]
    owner = {digest: name for name, digest in expected.items()}
    owner |= {expected[name]: name for name in wrong}  # of equal tensors, the one that is missed
    problems = []
    done: set[str] = set()
    for name in wrong:
        other = owner.get(found[name])
        if name in done:
            continue
        if other is None:
            problems.append(f"{name}: other bytes than were written")
        elif found.get(other) == expected[name]:
            problems.append(
                f"{name} and {other} have changed places: each holds the other's content"
            )
            done.add(other)
        else:
            problems.append(f"{name} holds the content of {other}")
    problems += [f"{name} has no fingerprint" for name in found if name not in expected]
    return problems


def _changed_file(directory: Path, name: str, expected: Fingerprint) -> list[str]:
    if name != "config.json":
        return [f"{name}: other content than was written"]
    now = json.loads((directory / name).read_text(encoding="utf-8"))
    before, after = _leaves(expected.config), _leaves(now)
    changed = [
        f"config.json: {key} is {after.get(key, 'missing')}, was {before.get(key, 'missing')}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    ]
    return changed or [f"{name}: the same values, written otherwise"]


def _leaves(value: Any, prefix: str = "") -> dict[str, Any]:
    """Dotted names of a JSON object's values; {"a": {"b": 1}} -> {"a.b": 1}."""
    leaves: dict[str, Any] = {}
    for key, part in value.items():
        name = f"{prefix}{key}"
        leaves |= _leaves(part, f"{name}.") if isinstance(part, dict) else {name: part}
    return leaves


# ---- plausibility ----


def plausible(tensors: Mapping[str, Tensor], seen: Mapping[str, Seen]) -> Check:
    """Hints that a tensor is not what its name says: none of them proves anything.

    Biases are left out: those of keys differ by orders of magnitude between layers.
    """
    hints = []
    for name, one in seen.items():
        matrix = len(tensors[name].shape) > 1
        if matrix and one.constant:
            hints.append(f"{name} holds one value only")
        norm = not matrix and name.endswith("weight")
        if norm and not 1 / _NORM_RANGE < one.rms < _NORM_RANGE:
            hints.append(f"{name}: root mean square {one.rms:.3g}; norms lie around 1")
    by_content = collections.defaultdict(list)
    for name, one in seen.items():
        if not one.constant:
            by_content[one.sha256].append(name)
    hints += [
        f"{' and '.join(names)} hold the same values"
        for names in by_content.values()
        if len(names) > 1
    ]
    hints += _outliers(seen)
    good = f"root mean squares within {_SIBLING_RANGE:g} times those of sibling layers, no copies"
    if hints:
        return Check(PLAUSIBILITY, Status.WARN, "unusual values (only a hint)", tuple(hints))
    return Check(PLAUSIBILITY, Status.PASS, good)


def _outliers(seen: Mapping[str, Seen]) -> Iterator[str]:
    siblings = collections.defaultdict(list)
    for name in seen:
        if name.endswith("weight"):
            siblings[re.sub(r"\.\d+\.", ".{n}.", name)].append(name)
    for names in siblings.values():
        median = float(np.median([seen[name].rms for name in names]))
        for name in names if len(names) >= _SIBLINGS and median else ():
            ratio = seen[name].rms / median
            if not 1 / _SIBLING_RANGE < ratio < _SIBLING_RANGE:
                yield (
                    f"{name}: root mean square {seen[name].rms:.3g}, {ratio:.3g} times the median "
                    f"of its {len(names)} layers"
                )
