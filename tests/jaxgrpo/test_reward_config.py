"""The reward section: its defaults, and what it refuses."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from jaxgrpo import config
from jaxgrpo.strict_yaml import ConfigError
from rewards.weights import RewardWeights

OWN = "reward.custom={function: 'mine:half', kind: host}"


def load(tmp_path: Path, *overrides: str) -> config.Config:
    path = tmp_path / "c.yaml"
    path.write_text("{run_dir: r, model: {path: m}, data: {train: t.jsonl}}")
    return config.load(path, overrides)


def test_the_defaults_are_the_papers() -> None:
    section = config.RewardSection()
    assert (section.format, section.iou, section.temporal) == (0.5, 0.5, "iou")
    assert section.length.weight == section.overlong.weight == 0 and section.custom is None


@pytest.mark.parametrize(
    ("override", "says"),
    [
        (
            "reward.temporal=diou",
            "the text 'diou', expected iou or giou or tiou",
        ),
        ("reward.length.min=600", "length: expected 0 <= min <= max, found 600 and 512"),
        ("reward.overlong.cache=0", "overlong: expected a cache"),
        ("reward.custom.function=f", "reward.custom.kind is missing"),
        ("reward.custom={function: f, kind: host}", "expected module:function"),
        ("reward.custom={function: 'a:f', kind: jax}", "expected host or jitted"),
        ("reward.constant_steps=-1", "reward.constant_steps is -1, expected 0 or more"),
    ],
)
def test_a_section_that_cannot_be_is_refused(tmp_path: Path, override: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(tmp_path, override)
    assert says in str(caught.value)


def test_a_users_own_reward_can_be_all_there_is(tmp_path: Path) -> None:
    nothing = [f"reward.{item.name}=0" for item in dataclasses.fields(RewardWeights)]
    load(tmp_path, *nothing, OWN)
    with pytest.raises(ConfigError, match="at least one weight above 0"):
        load(tmp_path, *nothing)
