"""The keys of a mixture."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import yaml

from data.records import TASKS
from jaxgrpo import config as configs
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.mixture_config import (
    ManifestSection,
    MixtureSection,
    OnlineSection,
    TaskWeightsSection,
)


def make(data: str) -> Config:
    raw = {"run_dir": "r", "model": {"path": "m"}, "data": yaml.safe_load(data)}
    return configs.from_dict(raw)


TWO = "{mixture: [{manifest: a.jsonl, root: x, weight: 2}, {manifest: b.jsonl, prefix: b/}]}"


def test_a_mixture_is_a_list_of_manifests() -> None:
    data = make(TWO).data
    assert data.mixture == (
        MixtureSection("a.jsonl", "x", weight=2.0),
        MixtureSection("b.jsonl", None, "b/", 1.0),
    )
    assert make("{eval_mixture: [{manifest: a}]}").data.eval_mixture == (ManifestSection("a"),)


def test_every_task_can_have_a_weight() -> None:
    assert [field.name for field in dataclasses.fields(TaskWeightsSection)] == list(TASKS)
    assert make("{train: a, task_weights: {tvg: 2}}").data.task_weights.tvg == 2.0


def test_online_sampling_is_a_section_or_nothing() -> None:
    assert make("{train: a}").data.online is None
    assert make("{train: a, online: {}}").data.online == OnlineSection()
    assert make("{train: a, online: {floor: 1, round: 6}}").data.online == OnlineSection(6, floor=1)


def test_a_config_with_a_mixture_is_written_and_read_back(tmp_path: Path) -> None:
    config = make(TWO)
    (tmp_path / "c.yaml").write_text(configs.to_yaml(config))
    assert configs.load(tmp_path / "c.yaml") == config
    assert configs.from_dict(configs.to_dict(config)) == config


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("{mixture: [{weight: 1}]}", "data.mixture[0].manifest is missing"),
        ("{mixture: [{manifest: ''}]}", "manifest is empty"),
        ("{mixture: [{manifest: a, wight: 1}]}", "unknown key data.mixture[0].wight"),
        ("{mixture: [a.jsonl]}", "data.mixture[0] is the text 'a.jsonl', expected a section"),
        ("{mixture: [{manifest: a, weight: 0}]}", "weight of a is 0, expected more than 0: to"),
        ("{mixture: [{manifest: a, weight: -1}]}", "leave out the manifest"),
        ("{eval_mixture: [{manifest: a, weight: 1}]}", "unknown key data.eval_mixture[0].weight"),
        ("{train: a, task_weights: {tvg: 0}}", "data.task_weights.tvg is 0, expected more than 0"),
        ("{train: a, task_weights: {tgv: 1}}", "did you mean 'tvg'"),
        ("{train: a, online: {round: 0}}", "data.online.round is 0, expected 1 or more"),
        ("{train: a, online: {floor: 0}}", "floor is 0.0, expected more than 0 and at most 1"),
        ("{train: a, online: {memory: 1.5}}", "memory is 1.5, expected more than 0 and at most 1"),
        ("{train: a, online: {most: 0.5}}", "data.online.most is 0.5, expected 1 or more"),
        ("{train: a, online: {flor: 1}}", "did you mean 'floor'"),
        ("{train: a, mixture: [{manifest: b}]}", "data.train and data.mixture are both set"),
        ("{eval: a, eval_mixture: [{manifest: b}]}", "data.eval and data.eval_mixture are both"),
        ("{synthetic: {}, mixture: [{manifest: b}]}", "data.synthetic and data.mixture are both"),
        ("{}", "no data: set data.train"),
    ],
)
def test_a_mistake_is_named(data: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(data)
    assert expected in str(caught.value)


def test_a_run_goes_on_with_other_roots_but_not_with_other_weights() -> None:
    before = make(TWO)
    configs.check_resume(before, make(TWO.replace("root: x", "root: gs://b/x")))
    for old, new, key in (
        ("weight: 2", "weight: 3", "data.mixture[0].weight: saved 2.0, now 3.0"),
        ("b.jsonl", "c.jsonl", "data.mixture[1].manifest"),
        (", {manifest: b.jsonl, prefix: b/}", "", "data.mixture: saved"),
        ("]}", "], task_weights: {gqa: 3}}", "data.task_weights.gqa"),
    ):
        with pytest.raises(ConfigError) as caught:
            configs.check_resume(before, make(TWO.replace(old, new)))
        assert key in str(caught.value)
