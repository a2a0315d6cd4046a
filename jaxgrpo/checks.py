"""What the sections of the configuration check their values with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final

from jaxgrpo.strict_yaml import ConfigError

RESUMABLE: Final = {"resumable": True}


def check(key: str, value: Any, holds: bool, expected: str) -> None:
    """Raises `ConfigError` about a key and its value unless it `holds`."""
    if not holds:
        raise ConfigError(f"{key} is {value!r}, expected {expected}")


def at_least(name: str, section: Any, **minimums: int) -> None:
    """Raises `ConfigError` about the first key of the section below its minimum."""
    for key, minimum in minimums.items():
        value = section.__dict__[key]
        check(f"{name}.{key}", value, value >= minimum, f"{minimum} or more")


def above_zero(name: str, section: Any, *keys: str) -> None:
    """Raises `ConfigError` about the first of the keys that is not above 0."""
    for key in keys:
        value = section.__dict__[key]
        check(f"{name}.{key}", value, value > 0, "more than 0")


def accepted_by(library: Callable[..., Any], name: str, section: Any) -> None:
    """Makes of a section the object that a run will make of it, whose limits are the section's."""
    try:
        library(**section.__dict__)
    except ValueError as error:
        raise ConfigError(f"{name}: {error}") from error
