"""One result of `jaxgrpo verify`, and how arrays are compared."""

from __future__ import annotations

import enum
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

T = TypeVar("T")


class Status(enum.StrEnum):
    """How a check ended; a warning is a hint that alone proves nothing."""

    PASS = "PASS"
    WARN = "WARN"
    FAIL = "FAIL"
    SKIPPED = "SKIPPED"


class Check(NamedTuple):
    """What was looked at, how it ended, and in one line why; `details` name the culprits."""

    name: str
    status: Status
    summary: str
    details: tuple[str, ...] = ()


class OtherSideError(ValueError):
    """transformers or torch could not do its part, or a file is not theirs."""


def verdict_on(name: str, problems: list[str], good: str, bad: str) -> Check:
    """PASS with `good` where there are no problems, else FAIL with `bad`."""
    if problems:
        return Check(name, Status.FAIL, bad, tuple(problems))
    return Check(name, Status.PASS, good)


def skipped(name: str, reason: str) -> Check:
    return Check(name, Status.SKIPPED, reason)


def ask(what: str, question: Callable[[], T]) -> T:
    """What transformers or torch answers; whatever they raise becomes an `OtherSideError`."""
    try:
        return question()
    except Exception as error:  # theirs, of any kind: it is a finding, not a crash of ours
        text = " ".join(str(error).split())
        raise OtherSideError(f"{what}: {type(error).__name__}: {text[:500]}") from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in a JSON file; an `OtherSideError` names a file that holds none."""
    content = ask(f"{path} is not JSON", lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(content, dict):
        raise OtherSideError(f"{path} holds {type(content).__name__}, expected an object")
    return content


def difference(name: str, ours: np.ndarray, theirs: np.ndarray, tolerance: float) -> str | None:
    """The worst difference of two arrays in one line, or None where it is within the tolerance."""
    if ours.shape != theirs.shape:
        return f"{name}: ours is {list(ours.shape)}, theirs {list(theirs.shape)}"
    if not ours.size:
        return None
    apart = np.abs(ours.astype(np.float64) - theirs.astype(np.float64))
    apart = np.where(np.isnan(apart), np.inf, apart)
    worst = tuple(int(i) for i in np.unravel_index(int(apart.argmax()), apart.shape))
    if apart[worst] <= tolerance:
        return None
    limit = f", tolerance {tolerance:.3g}" if tolerance else ""
    return (
        f"{name}{list(worst)}: ours {_number(ours[worst])}, theirs {_number(theirs[worst])} "
        f"({int((apart > tolerance).sum())} of {apart.size} differ{limit})"
    )


def _number(value: Any) -> str:
    return f"{value:.6g}" if np.issubdtype(np.asarray(value).dtype, np.floating) else f"{value}"
