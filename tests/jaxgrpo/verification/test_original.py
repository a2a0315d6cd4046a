"""Positions and window order of transformers' own code, and where torch is looked for."""

from __future__ import annotations

import importlib.util
from typing import Any

import numpy as np
import pytest

from jaxgrpo.verification import original, prompts
from jaxgrpo.verification.checks import OtherSideError, Status
from jaxgrpo.verification.prompts import LIMITS, Inputs
from models.qwen2_5_vl.processor import Processor
from tests.jaxgrpo.verification.directories import TINY
from tests.jaxgrpo.verification.test_prompts import noise


@pytest.fixture(scope="module")
def given() -> Inputs:
    return prompts.inputs(Processor.load(TINY, LIMITS), noise(40, 90, 150, 0.65))


def test_positions_are_those_of_the_release(given: Inputs) -> None:
    check = original.positions(TINY, given)
    assert (check.status, check.details) == (Status.PASS, ())


def test_how_newer_transformers_differs_is_said(given: Inputs) -> None:
    check = original.positions(TINY, given)
    after = given.prompt.length - np.flatnonzero(given.prompt.vision_index >= 0)[-1] - 1
    assert f"newer rule would move the {after} tokens after the video" in check.summary


@pytest.mark.parametrize("axis", [0, 1, 2], ids=["t", "h", "w"])
def test_a_position_that_differs_is_named(axis: int, given: Inputs) -> None:
    positions = given.prompt.positions.copy()
    positions[200, axis] += 1
    check = original.positions(
        TINY, given._replace(prompt=given.prompt._replace(positions=positions))
    )
    assert check.status is Status.FAIL
    (told,) = check.details
    assert told.startswith(f"positions[200, {axis}]: ours {positions[200, axis]}, theirs ")


def test_another_window_order_is_named(given: Inputs) -> None:
    index = given.prompt.vision_index.copy()
    first = np.flatnonzero(index >= 0)[0]
    index[[first, first + 1]] = index[[first + 1, first]]
    check = original.positions(
        TINY, given._replace(prompt=given.prompt._replace(vision_index=index))
    )
    assert check.status is Status.FAIL
    assert check.details[0].startswith("window order[0]: ours 1, theirs 0 (2 of ")


def test_a_model_that_transformers_cannot_load_is_told(given: Inputs, tmp_path: Any) -> None:
    with pytest.raises(OtherSideError, match="transformers' model: "):
        original.run(tmp_path, given, "float32")


def test_a_missing_torch_is_told_with_the_mend(monkeypatch: pytest.MonkeyPatch) -> None:
    assert original.missing() is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert original.missing() == "torch is not installed: pip install torch"
