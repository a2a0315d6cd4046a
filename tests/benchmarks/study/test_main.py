"""The study's runs: commands that the program takes, chunks that go on, failures that are named."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from benchmarks.study import __main__ as study
from benchmarks.study import arms
from benchmarks.study.results import read_results, result_of
from data.records import Record
from jaxgrpo.config import Config, load
from tests.benchmarks.study.test_results import write_run


def configs(job: study.Job, out: Path) -> Iterator[tuple[str, Config]]:
    for command, path, *overrides in study.commands(out, job):
        yield command, load(path, overrides)


def arm(name: str) -> study.Job:
    [found] = [arm for arm in arms.ARMS if arm.name == name]
    return study.Job(found, 3)


def test_every_command_is_a_valid_config_and_ends_in_the_evaluation(tmp_path: Path) -> None:
    for job in study.jobs():
        names = [command for command, _ in configs(job, tmp_path)]
        expected = [job.arm.command, "eval"] if job.arm.command else ["eval"]
        selects = job.arm.items in ("selected", "drawn")
        assert names == (["select"] if selects else []) + expected


def test_an_arm_trains_on_its_items_and_is_evaluated_on_both_sets(tmp_path: Path) -> None:
    (_, selection), (_, train), (_, evaluation) = configs(arm("selected"), tmp_path)
    assert selection.select.budget.tvg == 80 and train.seed == 3
    assert train.data.keep == f"{selection.run_dir}/selected.jsonl"
    assert train.data.train.endswith("plain.jsonl") and train.train.steps == 160
    assert evaluation.model.path == train.run_dir
    sets = [manifest.manifest for manifest in evaluation.data.eval_mixture]
    assert sets == [f"{tmp_path}/data/{name}.jsonl" for name in ("eval", "spliced")]


def test_half_of_the_labels_are_wrong_for_selection_and_training_and_none_for_evaluation(
    tmp_path: Path,
) -> None:
    (_, selection), (_, train), (_, evaluation) = configs(arm("noisy-drawn"), tmp_path)
    assert selection.data.train == train.data.train == f"{tmp_path}/data/noisy.jsonl"
    assert selection.select.order == "random"
    sets = [manifest.manifest for manifest in evaluation.data.eval_mixture]
    assert sets == [f"{tmp_path}/data/{name}.jsonl" for name in ("eval", "spliced")]


def test_rewards_differ_as_the_arms_say(tmp_path: Path) -> None:
    def weights(name: str) -> tuple[float, float, float]:
        [(_, train), _] = configs(arm(name), tmp_path)
        assert train.data.keep == f"{tmp_path}/data/gqa.jsonl"
        return train.reward.format, train.reward.choice, train.reward.iou

    assert weights("choice") == (0.5, 0.5, 0)
    assert weights("iou") == (0.5, 0, 0.5)
    assert weights("dual") == (0.5, 0.5, 0.5)


def test_small_arms_hold_equally_many_of_each_task_drawn_by_seed() -> None:
    records = [
        Record(f"{task}-{i}", "a.mp4", task, "", (), None, (), None)
        for task in arms.TASKS
        for i in range(50)
    ]
    first, again, other = (study.drawn(records, 30, seed) for seed in (0, 0, 1))
    tasks = [record.task for record in first]
    assert first == again != other and len(set(first)) == 30
    assert all(tasks.count(task) == 10 for task in arms.TASKS)


def test_predictions_that_a_kill_cut_short_are_not_done(tmp_path: Path) -> None:
    job = arm("dual")
    path = tmp_path / "eval" / job.name / "predictions.jsonl"
    assert not study.is_done(tmp_path, job)
    path.parent.mkdir(parents=True)
    path.write_text("{}\n" * (6 * arms.TEST_CLIPS - 1))
    assert not study.is_done(tmp_path, job)
    path.write_text("{}\n" * 6 * arms.TEST_CLIPS)
    assert study.is_done(tmp_path, job)


def test_when_the_time_is_up_nothing_begins(tmp_path: Path) -> None:
    study.Runner(tmp_path, tmp_path / "results.jsonl", minutes=-1, count=1).run(arm("dual"))
    assert list(tmp_path.iterdir()) == []


def test_a_finished_run_adds_its_line_and_one_that_has_a_line_is_not_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "results.jsonl"
    write_run(tmp_path, "dual-3")
    monkeypatch.setattr(study, "is_done", lambda out, job: True)
    study.Runner(tmp_path, path, minutes=-1, count=1).run(arm("dual"))
    assert read_results(path) == [result_of(tmp_path, "dual", 3)]

    ran: list[str] = []
    monkeypatch.setattr(study, "write_data", lambda out: None)
    monkeypatch.setattr(study.Runner, "run", lambda self, job: ran.append(job.name))
    monkeypatch.setattr("sys.argv", ["study", str(tmp_path)])
    study.main()
    assert ran == [job.name for job in study.jobs() if job.name != "dual-3"]
    assert f"1 of {len(ran) + 1} runs are there" in capsys.readouterr().out


def test_a_command_that_fails_is_named_with_its_log(tmp_path: Path) -> None:
    runner = study.Runner(tmp_path, tmp_path / "results.jsonl", minutes=1, count=1)
    with pytest.raises(SystemExit, match="dual-3: jaxgrpo train failed: see .*dual-3-train.log"):
        runner.run(arm("dual"))
    assert "expected a JSONL manifest" in (tmp_path / "logs" / "dual-3-train.log").read_text()
    line = json.loads((tmp_path / "times.jsonl").read_text())
    assert line["job"] == "dual-3" and line["code"] == 2
    assert not runner.results.exists()
