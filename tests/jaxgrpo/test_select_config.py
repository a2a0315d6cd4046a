"""The keys of `jaxgrpo select`."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from data.records import TASKS
from jaxgrpo import config as configs
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.select_config import BudgetSection


def make(select: str) -> Config:
    raw = {"run_dir": "r", "model": {"path": "m"}, "data": {"train": "a"}}
    return configs.from_dict(raw | {"select": yaml.safe_load(select)})


def test_every_task_can_have_a_budget() -> None:
    assert [field.name for field in dataclasses.fields(BudgetSection)] == list(TASKS)
    assert make("{budget: {tvg: 5}}").select.budget.tvg == 5


def test_rules_may_change_and_samples_may_not() -> None:
    before = make("{}")
    rules = "{right: [0.1, 0.9], spread: 0.1, share: 0.5, budget: {tvg: 1}, order: random}"
    configs.check_resume(before, make(rules))
    for other in ("{samples: 4}", "{batch: 4}"):
        with pytest.raises(ConfigError, match=r"select\.(samples|batch)"):
            configs.check_resume(before, make(other))


@pytest.mark.parametrize(
    ("select", "expected"),
    [
        ("{samples: 1}", "select.samples is 1, expected 2 or more"),
        ("{right: [1, 0]}", "select.right is [1.0, 0.0], expected two shares, rising"),
        ("{right: [0.5]}", "two shares"),
        ("{share: 0}", "select.share is 0.0, expected more than 0 and at most 1"),
        ("{spread: -1}", "select.spread is -1.0, expected 0 or more"),
        ("{budget: {tvg: -1}}", "select.budget.tvg is -1, expected 0 or more"),
        ("{order: least}", "select.order is the text 'least', expected spread or random"),
        ("{budget: {tgv: 1}}", "did you mean 'tvg'"),
    ],
)
def test_mistakes_are_named(select: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(select)
    assert expected in str(caught.value)
