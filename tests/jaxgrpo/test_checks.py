"""The checks that sections of the configuration share."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from jaxgrpo.checks import above_zero, accepted_by, at_least, check
from jaxgrpo.strict_yaml import ConfigError

SECTION = SimpleNamespace(steps=0, rate=0.0)


def test_a_value_that_does_not_hold_is_named_with_what_was_expected() -> None:
    check("a.b", 3, True, "3")
    with pytest.raises(ConfigError, match="^a.b is 'x', expected y or z$"):
        check("a.b", "x", False, "y or z")


def test_minimums_are_allowed_and_less_is_not() -> None:
    at_least("a", SECTION, steps=0)
    with pytest.raises(ConfigError, match="^a.steps is 0, expected 1 or more$"):
        at_least("a", SECTION, steps=1)
    with pytest.raises(ConfigError, match="^a.rate is 0.0, expected more than 0$"):
        above_zero("a", SECTION, "rate")


def test_a_librarys_own_limits_are_the_sections() -> None:
    def library(steps: int, rate: float) -> None:
        raise ValueError(f"no rate of {rate} for {steps} steps")

    with pytest.raises(ConfigError, match="^a: no rate of 0.0 for 0 steps$"):
        accepted_by(library, "a", SECTION)
