"""`jaxgrpo select`: k completions of every item, kept whatever happens, and the rules over them."""

from __future__ import annotations

import dataclasses
import json
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.records import read_manifest
from jaxgrpo import select
from jaxgrpo.config import ConfigError
from jaxgrpo.inputs import measure
from jaxgrpo.load import open_processor
from jaxgrpo.metrics import CompileCounter
from jaxgrpo.reward_config import RewardSection
from jaxgrpo.select_config import BudgetSection
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace

FILES = ("completions.jsonl", "groups.jsonl", "selected.jsonl")
SAMPLES = 3


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


def overrides(place: Workplace) -> list[str]:
    return [
        *tiny_run.started(place),
        *tiny_run.mixed(place),
        f"select.samples={SAMPLES}",
        "select.batch=4",
        "rollout.temperature=1.3",
    ]


@pytest.fixture(scope="module")
def whole(place: Workplace) -> Path:
    """What an undisturbed run leaves."""

    def make(folder: Path) -> None:
        finished = tiny_run.run(place, "select", folder, *overrides(place))
        (folder / "printed.txt").write_text(finished.out)

    return tiny_run.once(place.folder / "selected", make)


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_item_has_all_its_completions_with_rewards_and_answers(
    place: Workplace, whole: Path
) -> None:
    names = {record.id for record in read_manifest(place.clips / "mixed.jsonl", place.clips)}
    groups = lines(whole / "groups.jsonl")
    failed = {group["id"] for group in groups if "failed" in group}
    assert failed == {"cut"}  # found when it is decoded; "notes" is no video at all
    assert {group["id"] for group in groups} == names - {"notes"}
    assert len(groups) == len(names) - 1
    completions = lines(whole / "completions.jsonl")
    assert len(completions) == SAMPLES * (len(groups) - 1)
    for group in groups:
        mine = [line for line in completions if line["id"] == group["id"]]
        if group["id"] in failed:
            assert not mine and group["failed"].startswith("truncated: ")
            continue
        assert [line["sample"] for line in mine] == list(range(SAMPLES))
        totals = [line["reward/total"] for line in mine]
        assert group["mean"] == pytest.approx(np.mean(totals))
        assert group["std"] == pytest.approx(np.std(totals), abs=1e-7)
        for line in mine:
            assert line["answer"]["format"] == (line["reward/format"] == 1.0)
            if group["task"] == "mcqa":
                right = line["answer"].get("choice") == line["record"]["answer"]
                assert line["reward/choice"] == float(right)


def test_kept_are_the_items_whose_rewards_disagree(place: Workplace, whole: Path) -> None:
    kept = {row["id"] for row in lines(whole / "selected.jsonl")}
    for group in lines(whole / "groups.jsonl"):
        if "failed" not in group:
            sometimes = 0 < group.get("mean/choice", 0.0) < 1
            assert (group["id"] in kept) == (sometimes or group.get("std/iou", 0.0) > 0)
    assert kept and len(kept) < len(lines(whole / "groups.jsonl"))
    read = read_manifest(whole / "selected.jsonl", place.clips)
    originals = {r.id: r for r in read_manifest(place.clips / "mixed.jsonl", place.clips)}
    assert [originals[record.id] for record in read] == read
    assert (whole / "difficulty.png").stat().st_size > 5_000
    printed = (whole / "printed.txt").read_text()
    assert "of it generation" in printed and f"data.keep={whole}/selected.jsonl" in printed


def test_a_run_killed_at_any_point_ends_as_one_left_alone(place: Workplace, whole: Path) -> None:
    """What a kill may leave: whole batches, a part of the next, torn lines."""
    killed = place.folder / "select_killed"
    metrics = lines(whole / "metrics.jsonl")
    batches = metrics[-1]["step"]
    for done, torn in ((0, 30), (2, 55), (batches, 0)):
        shutil.rmtree(killed, ignore_errors=True)
        killed.mkdir()
        for name in ("config.yaml", "select.json"):
            text = (whole / name).read_text().replace(str(whole), str(killed))
            (killed / name).write_text(text)
        for name in ("completions.jsonl", "groups.jsonl"):
            found = lines(whole / name)
            kept = [json.dumps(x, ensure_ascii=False) for x in found if x["step"] <= done + 1]
            text = "".join(f"{line}\n" for line in kept)
            (killed / name).write_text(text[: len(text) - torn])
        text = "".join(json.dumps(x) + "\n" for x in metrics[:done])
        (killed / "metrics.jsonl").write_text(text + '{"step": ')
        tiny_run.run(place, "select", killed, *overrides(place))
        for name in FILES:
            assert (killed / name).read_bytes() == (whole / name).read_bytes(), (done, name)


def test_a_process_killed_again_and_again_ends_as_one_left_alone(
    place: Workplace, whole: Path
) -> None:
    """By SIGKILL: at random moments, when a batch is being written down, when the rules begin."""
    killed = place.folder / "select_shot"
    arguments = [str(place.config), f"run_dir={killed}", tiny_run.remembering(place)]
    rng = np.random.default_rng(6)
    last = len(lines(whole / "metrics.jsonl"))
    codes = []
    for batches in (0, 0, 1, last - 2, last):
        process = tiny_run.start("select", *arguments, *overrides(place))
        if not batches:
            time.sleep(rng.uniform(1, 10))
        while process.poll() is None and count_of(killed / "metrics.jsonl") < batches:
            time.sleep(0.002)
        process.kill()
        tiny_run.wait(process)
        codes.append(process.returncode)
        assert batches == last or not (killed / "selected.jsonl").exists()
    assert codes[2:4] == [-signal.SIGKILL] * 2
    tiny_run.run(place, "select", killed, *overrides(place))
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes(), name


def count_of(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def test_two_processes_select_as_one(place: Workplace, whole: Path) -> None:
    shared = place.folder / "select_shared"
    tiny_run.run_processes(place, 2, shared, *overrides(place), command="select")
    for name in FILES:
        found, expected = lines(shared / name), lines(whole / name)
        for mine, theirs in zip(found, expected, strict=True):
            assert mine.keys() == theirs.keys()
            for key, value in theirs.items():
                if isinstance(value, float):
                    value = pytest.approx(value, abs=1e-6)
                assert mine[key] == value, (name, theirs["id"], key)


def test_other_rules_need_no_model(
    place: Workplace, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    text = (again / "config.yaml").read_text().replace(str(whole), str(again))
    (again / "config.yaml").write_text(text)
    changed = [f"run_dir={again}", *overrides(place), "select.budget={tvg: 1, mcqa: 0, gqa: 0}"]
    changed += ["optim.learning_rate=1"]  # no sample depends on it
    with CompileCounter() as compilations:
        select.main(tiny_run.load_config(place, *changed))
    assert not compilations.total
    [kept] = lines(again / "selected.jsonl")
    groups = [g for g in lines(again / "groups.jsonl") if g["task"] == "tvg" and "std" in g]
    spreads = {group["id"]: group["std/iou"] for group in groups}
    assert spreads[kept["id"]] == max(spreads.values())
    out = capsys.readouterr().out
    assert "only the rules are applied again" in out and "beyond the budget" in out
    assert "2 items are not kept, their videos cannot be used:" in out
    assert "  notes: unreadable: " in out and "  cut: truncated: " in out
    for name in ("completions.jsonl", "groups.jsonl"):
        assert (again / name).read_bytes() == (whole / name).read_bytes()


def test_scores_without_a_weight_have_no_say() -> None:
    group = {"id": "a", "task": "gqa", "mean": 0.5, "std": 0.1}
    for name, mean, std in (("format", 1, 0.5), ("choice", 1, 0), ("iou", 0.5, 0.1)):
        group |= {f"mean/{name}": mean, f"std/{name}": std}
    both = select.sampled(group, RewardSection())
    assert (both.means, both.stds) == ({"choice": 1, "iou": 0.5}, {"choice": 0, "iou": 0.1})
    assert select.sampled(group, RewardSection(iou=0.0)).stds == {"choice": 0}
    assert select.sampled(group, RewardSection(choice=0.0)).stds == {"iou": 0.1}
    other = group | {"mean/temporal": 0.3, "std/temporal": 0.2}
    assert select.sampled(other, RewardSection()).continuous == ["temporal"]
    assert not select.sampled(other, RewardSection(iou=0.0)).continuous


def test_rules_that_keep_nothing_leave_no_item_and_say_so(
    place: Workplace, whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    again = tmp_path / "again"
    shutil.copytree(whole, again)
    config = tiny_run.load_config(place, f"run_dir={again}", *overrides(place))
    section = dataclasses.replace(config.select, budget=BudgetSection(0, 0, 0, ocr=5))
    select.main(dataclasses.replace(config, select=section))
    assert (again / "selected.jsonl").read_text() == ""
    said = capsys.readouterr().out
    assert "warning: no item is kept" in said
    assert "warning: select.budget names tasks that no item has: ocr\n" in said


def test_other_samples_need_another_folder(place: Workplace, whole: Path, tmp_path: Path) -> None:
    for change in ("select.samples=4", "seed=4", "select.batch=2", "rollout.temperature=1"):
        config = tiny_run.load_config(place, f"run_dir={whole}", *overrides(place), change)
        with pytest.raises(ConfigError, match=change.partition("=")[0]):
            select.main(config)
    config = tiny_run.load_config(place, f"run_dir={tiny_run.cold_start(place)}", *overrides(place))
    with pytest.raises(ConfigError, match="holds a run of 'jaxgrpo sft': choose another run_dir"):
        select.main(config)


# ---- what training does with it ----


def test_training_takes_only_what_was_kept(place: Workplace, whole: Path) -> None:
    def items(keep: Path) -> list[str]:
        config = tiny_run.load_config(place, *tiny_run.mixed(place), f"data.keep={keep}")
        measured, _ = measure(config, open_processor(config), train=True, evaluation=True)
        assert len(measured["data.eval"].usable) > 3
        return [record.id for record, _ in measured["data.train"].usable]

    kept = [row["id"] for row in lines(whole / "selected.jsonl")]
    assert sorted(items(whole / "selected.jsonl")) == sorted(kept)
