"""Supervised runs: they learn the targets, are resumed bit for bit, and refuse what cannot work."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxgrpo import cli
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace

STEPS = 16  # of the cold start


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


@pytest.fixture(scope="module")
def cold_start(place: Workplace) -> Path:
    return tiny_run.cold_start(place)


def test_the_targets_are_learnt(cold_start: Path) -> None:
    lines = tiny_run.lines(cold_start, "train")
    assert [line["step"] for line in lines] == list(range(1, STEPS + 1))
    losses = [line["loss"] for line in lines]
    assert losses[0] > 4.0 and losses[-1] < 0.5  # nats a token; log(512) is 6.2
    evaluations = tiny_run.lines(cold_start, "eval")
    assert [line["step"] for line in evaluations] == [3, 6, 9, 12, 15, 16]
    assert evaluations[-1]["format"] >= 0.5


def test_nothing_compiles_after_the_first_step(cold_start: Path) -> None:
    """init, publish, the step, greedy decoding and its score, each once, and random weights."""
    assert {line["compilations"] for line in tiny_run.lines(cold_start, "train")} == {6}


def test_a_run_killed_while_it_saves_ends_as_one_never_killed(
    place: Workplace, cold_start: Path
) -> None:
    run_dir = place.folder / "killed_sft"
    overrides = tiny_run.COLD_START
    tiny_run.run(place, "sft", run_dir, *overrides, kill="checkpoint:8")
    tiny_run.run(place, "sft", run_dir, *overrides)
    tiny_run.assert_same_bits(tiny_run.state_of(run_dir), tiny_run.state_of(cold_start))
    found, expected = (tiny_run.lines(folder) for folder in (run_dir, cold_start))
    assert tiny_run.without_times(found) == tiny_run.without_times(expected)


def test_train_does_not_go_on_with_an_sft_run(
    place: Workplace, cold_start: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = {path: path.read_bytes() for path in cold_start.glob("*.*")}
    arguments = [str(place.config), f"run_dir={cold_start}", *tiny_run.COLD_START]
    assert cli.main(["train", *arguments]) == 2
    message = capsys.readouterr().err
    assert f"{cold_start} holds a run of `jaxgrpo sft`" in message
    assert "choose another run_dir" in message
    assert {path: path.read_bytes() for path in cold_start.glob("*.*")} == before


def test_a_target_that_does_not_fit_is_named_before_anything_is_compiled(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # Batches of eight: this process has eight devices.
    overrides = [f"run_dir={tmp_path}", "sft.batch=8", "eval.batch=8", "rollout.max_new_tokens=20"]
    assert cli.main(["sft", str(place.config), *overrides]) == 2
    message = capsys.readouterr().err
    assert "record 'train-00001-tvg': its target is " in message
    assert "rollout.max_new_tokens (20)" in message


def test_a_batch_that_micro_batches_do_not_divide_is_refused(
    place: Workplace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    overrides = [f"run_dir={tmp_path}", "sft.batch=9", "optim.accumulate=2"]
    assert cli.main(["sft", str(place.config), *overrides]) == 2
    message = capsys.readouterr().err
    assert "optim.accumulate is 2" in message and "sft.batch (9)" in message
