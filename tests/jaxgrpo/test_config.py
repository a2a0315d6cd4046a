"""The configuration tree: defaults, ranges, files, and what may change when a run resumes."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

from jaxgrpo import config
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.data_config import SyntheticSection

MINIMAL = {"run_dir": "runs/a", "model": {"path": "models/tiny"}, "data": {"train": "train.jsonl"}}


def make(*overrides: str) -> Config:
    raw: dict[str, Any] = json.loads(json.dumps(MINIMAL))
    for assignment in overrides:
        config.strict_yaml.override(raw, assignment)
    return config.from_dict(raw, source="test")


def test_the_defaults_are_those_of_the_papers_script() -> None:
    c = make()
    assert (c.rollout.prompts, c.rollout.group, c.rollout.temperature) == (16, 8, 1.0)
    assert (c.optim.learning_rate, c.optim.weight_decay, c.optim.clip_norm) == (1e-6, 1e-2, 1.0)
    assert (c.grpo.kl, c.grpo.entropy, c.grpo.clip_low, c.grpo.clip_high) == (0.01, 0.001, 0.2, 0.2)
    assert (c.data.min_pixels, c.data.total_pixels, c.data.buckets[-1]) == (3136, 1_605_632, 4096)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("rollout.group=1", "rollout.group is 1, expected 2 or more: a group of one has no advan"),
        ("compilation_cache='{rundir}/x'", "compilation_cache is '{rundir}/x', expected a folder"),
        ("rollout.temperature=0", "rollout.temperature is 0.0, expected more than 0"),
        ("rollout.top_p=0", "rollout.top_p is 0.0, expected more than 0 and at most 1"),
        ("rollout.top_p=1.5", "rollout.top_p is 1.5"),
        ("rollout.top_k=-1", "rollout.top_k is -1, expected 0 or more"),
        ("rollout.max_new_tokens=0", "rollout.max_new_tokens is 0"),
        ("grpo.clip_low=1.2", "grpo.clip_low is 1.2, expected more than 0 and at most 1"),
        ("grpo.kl=-0.1", "grpo.kl is -0.1, expected 0 or more"),
        ("grpo.aggregation=mean", "expected sequence or token or constant"),
        (
            "reward={format: 0, choice: 0, iou: 0, number: 0, regression: 0, ocr: 0, text: 0}",
            "expected at least one weight above 0",
        ),
        ("optim.b2=1", "optim.b2 is 1.0, expected at least 0 and below 1"),
        ("optim.accumulate=3", "optim.accumulate is 3, expected a divisor of rollout.prompts (16)"),
        ("data.buckets=[2048, 1024]", "data.buckets is [2048, 1024], expected numbers of prompt"),
        ("data.buckets=[]", "data.buckets is [], expected"),
        ("data.buckets=[0, 8]", "data.buckets is [0, 8], expected"),
        ("reward.iou=2e6", "reward: weight 'iou': expected a number from 0 to 1e6, found 2000000"),
        ("reward.choice=-1", "reward: weight 'choice': expected a number from 0 to 1e6, found -1"),
        ("data.min_frames=1", "data.min_frames is 1, expected 2 or more"),
        ("data.max_frames=2", "data.max_frames is 2, expected 4 or more"),
        ("data.max_pixels=10", "data.max_pixels is 10, expected 3136 or more"),
        ("data.synthetic={}", "data.synthetic and data.train are both set"),
        ("data.train=''", "no data: set data.train"),
        ("mesh.data=0", "mesh.data is 0, expected -1 (the rest)"),
        ("checkpoint.keep=0", "checkpoint.keep is 0"),
        (
            "checkpoint.best=tvg/miou",
            "checkpoint.best is the text 'tvg/miou', expected tvg/mIoU or tvg/R1@0.3",
        ),
        ("checkpoint={best: format, every: 40}", "eval.every is 50, expected a multiple of"),
        ("checkpoint.hash_gib=-1", "checkpoint.hash_gib is -1.0, expected 0 or more"),
        ("eval.max_new_tokens=0", "eval.max_new_tokens is 0"),
        ("seed=-1", "seed is -1"),
        ("model.path=''", "model.path is '', expected a model directory or a hub id"),
        ("rollout.gruop=4", "unknown key rollout.gruop (did you mean 'group'?)"),
    ],
)
def test_a_value_that_cannot_be_run_is_refused_by_name(override: str, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        make(override)
    assert expected in str(caught.value)


@pytest.mark.parametrize("section", ["{eval_clips: 0}", "{seed: -1}", "{seconds: [2.0, 9.0]}"])
def test_clips_that_cannot_be_made_are_refused_before_anything_is(section: str) -> None:
    with pytest.raises(ConfigError, match="data.synthetic: "):
        make("data.train=''", f"data.synthetic={section}")


def test_a_file_and_overrides_make_one_config(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("run_dir: runs/a\nmodel: {path: m}\ndata:\n  synthetic: {train_clips: 9}\n")
    c = config.load(path, ["data.synthetic.seed=4", "optim.learning_rate=2e-6", "run_dir=runs/b"])
    assert c.data.synthetic == SyntheticSection(train_clips=9, seed=4)
    assert (c.optim.learning_rate, c.run_dir) == (2e-6, "runs/b")


def test_the_whole_tree_survives_yaml_and_json(tmp_path: Path) -> None:
    c = make("data.train=''", "data.synthetic={}", "eval.max_new_tokens=5", "data.buckets=[8]")
    (tmp_path / "all.yaml").write_text(config.to_yaml(c))
    assert config.load(tmp_path / "all.yaml") == c
    assert config.from_dict(json.loads(json.dumps(config.to_dict(c)))) == c


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (b"", "run_dir is missing"),
        (b"- 1", "expected `key: value` lines"),
        (b"\xff\xfe\x00", "YAML"),
    ],
)
def test_a_file_that_is_no_config_is_named(tmp_path: Path, content: bytes, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_bytes(content)
    with pytest.raises(ConfigError) as caught:
        config.load(path)
    assert expected in str(caught.value)
    assert "run.yaml" in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nowhere.yaml does not exist"):
        config.load(tmp_path / "nowhere.yaml")


def test_the_configs_of_the_clone_are_valid() -> None:
    paths = sorted((Path(__file__).parents[2] / "configs").glob("*.yaml"))
    assert paths
    for path in paths:
        config.load(path, ["run_dir=runs/test"])


def test_diff_names_the_keys_that_differ() -> None:
    before, after = make(), make("grpo.kl=0", "train.steps=7", "data.train=''", "data.synthetic={}")
    assert [(d.key, d.before, d.after, d.resumable) for d in config.diff(before, after)] == [
        ("data.train", "train.jsonl", "", False),
        ("data.synthetic", None, config.to_dict(after)["data"]["synthetic"], False),
        ("grpo.kl", 0.01, 0.0, False),
        ("train.steps", 500, 7, True),
    ]
    assert config.diff(before, make()) == []


@pytest.mark.parametrize(
    "override",
    [
        "run_dir=runs/moved",
        "train.steps=900",
        "sft.steps=900",
        "eval.every=7",
        "checkpoint.keep=9",
        "mesh={data: 1, fsdp: 4, tensor: 2}",
        "log.tensorboard=false",
        "data.threads=1",
        "data.workers=2",
        "data.prefetch=5",
    ],
)
def test_how_long_how_often_and_where_may_change_on_resume(override: str) -> None:
    config.check_resume(make(), make(override))


def test_what_is_learnt_may_not_change_on_resume() -> None:
    with pytest.raises(ConfigError) as caught:
        config.check_resume(make(), make("grpo.kl=0", "seed=3", "train.steps=9"))
    assert str(caught.value).splitlines() == [
        "runs/a holds a run of another config:",
        "  seed: saved 0, now 3",
        "  grpo.kl: saved 0.01, now 0.0",
        "To go on with that run put these keys back; to start another choose a new run_dir.",
    ]


def test_only_these_keys_are_resumable() -> None:
    """A new key is not resumable unless someone says so here as well."""
    found = set()
    for section, value in make().__dict__.items():
        for leaf in dataclasses.fields(value) if dataclasses.is_dataclass(value) else ():
            if "resumable" in leaf.metadata:
                found.add(f"{section}.{leaf.name}")
    found |= {item.name for item in dataclasses.fields(Config) if "resumable" in item.metadata}
    assert found == {
        *("run_dir", "eval", "checkpoint", "mesh", "log", "compilation_cache", "profile"),
        "model.attention",
        *(
            "data.root",
            "data.shard_mib",
            "data.stage",
            "data.stage_gib",
            "data.frame_store",
            "data.frame_store_gib",
            "data.timeout",
            "data.threads",
            "data.workers",
            "data.prefetch",
        ),
        *("select.right", "select.spread", "select.share", "select.budget"),
        "select.order",
        *("train.steps", "train.max_nonfinite_steps", "sft.steps", "reward.constant_steps"),
    }
