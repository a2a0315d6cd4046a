"""The run directory: what it remembers, and what it refuses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from data.pipeline import Batch, Failure
from data.records import read_manifest
from jaxgrpo import config as configs
from jaxgrpo import run_dir
from jaxgrpo.checkpoint import Command, abstract
from jaxgrpo.config import Config, ConfigError
from jaxgrpo.run_dir import RunDir, is_run, read_config
from jaxgrpo.update import TrainState
from tests.jaxgrpo import tiny_run
from tests.jaxgrpo.tiny_run import Workplace


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Workplace:
    return tiny_run.workplace(tmp_path_factory.getbasetemp())


def config_of(place: Workplace, run_dir: Path, *overrides: str) -> Config:
    return tiny_run.load_config(place, f"run_dir={run_dir}", *overrides)


def state(value: float) -> TrainState:
    zero = jnp.zeros((), jnp.int32)
    return TrainState({"w": jnp.full(3, value)}, (zero,), zero)


ROWS = [1, 2]


def batch_with(failures: list[Failure]) -> Batch:
    return Batch(step=0, bucket=0, items=[11, 12], failures=failures, prompts=None)


def test_processes_tell_each_other_of_a_batch(
    place: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    records = read_manifest(place.clips / "mixed.jsonl", place.clips)
    others = [[False, [0, 3], [10, 13], [(4, "empty: e.mp4: nothing")]]]
    others += [[True, [1, 2], [11, 12], [(5, "truncated: cut.mp4: ends early")]]]
    with RunDir(config_of(place, tmp_path / "run"), "train") as run:
        monkeypatch.setattr(run_dir, "gather_objects", lambda mine: [others[0], mine, others[1]])
        failures = [Failure(5, "truncated", "cut.mp4: ends early")]
        noted = run.note(batch_with(failures), ROWS, records)
        assert noted.items == [10, 11, 12, 13]
        assert noted.failed == [4, 5]
        assert len(noted.lines) == 2 and set(run.failures) == {records[4].id, "cut"}
        assert run.stopping


def test_a_new_run_starts_with_nothing(place: Workplace, tmp_path: Path) -> None:
    with RunDir(config_of(place, tmp_path / "run"), "train") as run:
        assert run.first_step == 0
        assert (run.excluded, run.failures) == ({}, {})


def test_a_run_remembers_its_state_and_its_bad_videos(place: Workplace, tmp_path: Path) -> None:
    config = config_of(place, tmp_path / "run")
    records = read_manifest(place.clips / "mixed.jsonl", place.clips)
    with RunDir(config, "train") as run:
        run.keep_to({}, [], {"data.train/notes": "notes: unreadable: not a video"})
        failures = [Failure(5, "truncated", "cut.mp4: ends early")]
        noted = run.note(batch_with(failures), ROWS, records)
        assert noted.lines == ["replaced cut: truncated: cut.mp4: ends early"]
        assert run.note(batch_with(failures), ROWS, records).lines == []  # no news any more
        run.save(2, state(2.0))
    with RunDir(config, "train") as run:
        assert run.first_step == 2
        assert run.excluded == {"data.train/notes": "notes: unreadable: not a video"}
        assert run.failures == {"cut": "truncated: cut.mp4: ends early"}
        assert run.note(batch_with(failures), ROWS, records).lines == []
        found = run.restore(abstract(state(0.0)))
        np.testing.assert_array_equal(found.params["w"], [2.0, 2.0, 2.0])


def test_a_run_lists_its_bad_videos_by_kind(place: Workplace, tmp_path: Path) -> None:
    records = read_manifest(place.clips / "mixed.jsonl", place.clips)
    with RunDir(config_of(place, tmp_path / "run"), "train") as run:
        assert run.bad_videos() == ""
        run.keep_to(
            {}, [], {f"data.train/{x}": f"{x}: unreadable: {x}.mp4: no" for x in ("b", "a:b")}
        )
        run.note(batch_with([Failure(5, "truncated", "cut.mp4: ends early")]), ROWS, records)
        assert run.bad_videos() == (
            "3 items had videos that could not be used:\n  truncated: cut\n  unreadable: a:b, b"
        )


def test_hung_decoders_are_remembered_as_items(place: Workplace, tmp_path: Path) -> None:
    config = config_of(place, tmp_path / "run")
    records = read_manifest(place.clips / "mixed.jsonl", place.clips)
    with RunDir(config, "train") as run:
        hung = Failure(2, "timeout", "a.mp4: no progress within 1 s")
        failures = [hung, Failure(5, "truncated", "cut.mp4: ends early")]
        run.note(batch_with(failures), ROWS, records)
        run.save(2, state(2.0))
    with RunDir(config, "train") as run:
        assert run.given_up(records) == {2: ("timeout", "a.mp4: no progress within 1 s")}
        assert run.given_up(records[3:]) == {}


def test_lines_after_the_checkpoint_are_cut(place: Workplace, tmp_path: Path) -> None:
    config = config_of(place, tmp_path / "run")
    with RunDir(config, "train") as run:
        run.write(0, "eval", {"format": 0.25, "items": 4})
        for step in (1, 2):
            run.write(step, "train", {"loss": 1.0 / step})
        run.save(2, state(2.0))
        run.write(3, "train", {"loss": 9.0})
        run.write_completions(3, "train", [{"id": "a"}])
    with RunDir(config, "train") as run:
        assert [line["step"] for line in tiny_run.lines(run.path)] == [0, 1, 2]
        assert (run.path / "completions.jsonl").read_text() == ""
        assert run.scores(step=0) == {"format": 0.25}
        assert run.scores(step=2) == {}


def test_the_whole_config_stands_in_the_folder(place: Workplace, tmp_path: Path) -> None:
    config = config_of(place, tmp_path / "run", "seed=11")
    with RunDir(config, "train") as run:
        assert configs.load(run.path / "config.yaml") == config
        run.save(1, state(1.0))
    assert is_run(tmp_path / "run") and read_config(tmp_path / "run") == config


def test_a_run_without_a_checkpoint_has_no_config_to_read(place: Workplace, tmp_path: Path) -> None:
    with RunDir(config_of(place, tmp_path / "run"), "train"):
        pass
    with pytest.raises(ConfigError, match="holds no checkpoint yet"):
        read_config(tmp_path / "run")
    assert not is_run(tmp_path)


@pytest.mark.parametrize("command, key", [("train", "train.steps"), ("sft", "sft.steps")])
def test_an_end_before_the_checkpoint_is_refused(
    place: Workplace, tmp_path: Path, command: Command, key: str
) -> None:
    with RunDir(config_of(place, tmp_path / "run"), command) as run:
        run.save(5, state(1.0))
    with pytest.raises(ConfigError, match=f"already at step 5, past {key}=4: raise {key}"):
        RunDir(config_of(place, tmp_path / "run", f"{key}=4"), command)
    with RunDir(config_of(place, tmp_path / "run", f"{key}=5"), command) as run:
        assert run.first_step == 5


def test_another_command_and_another_config_are_refused(place: Workplace, tmp_path: Path) -> None:
    with RunDir(config_of(place, tmp_path / "run"), "train") as run:
        run.save(1, state(1.0))
    with pytest.raises(ConfigError, match="holds a run of `jaxgrpo train`"):
        RunDir(config_of(place, tmp_path / "run"), "sft")
    with pytest.raises(ConfigError, match=r"grpo.clip_low: saved 0.2, now 0.1"):
        RunDir(config_of(place, tmp_path / "run", "grpo.clip_low=0.1"), "train")


# ---- the plan that a run keeps to ----

PLAN = {
    "items": "3 with digest abc",
    "bucket sizes": [{"tokens": 80}],
    "spans of an item at most": 1,
}


@pytest.mark.parametrize(
    "plan, base, says",
    [
        (
            PLAN | {"items": "2 with digest d"},
            [4],
            "items: 3 with digest abc then, 2 with digest d",
        ),
        (PLAN | {"bucket sizes": [{"tokens": 81}]}, [4], "bucket sizes: .*80.* then, .*81.* now"),
        (PLAN | {"spans of an item at most": 2}, [4], "spans of an item at most: 1 then, 2 now"),
        (PLAN, [5], r"model.path, steps of its checkpoints: \[4\] then, \[5\] now"),
    ],
)
def test_a_run_with_another_plan_is_refused(
    place: Workplace, tmp_path: Path, plan: dict[str, object], base: list[int], says: str
) -> None:
    config = config_of(place, tmp_path / "run")
    with RunDir(config, "train") as run:
        run.keep_to(PLAN, [4], {"data.train/a": "a: gone"})
        run.save(1, state(1.0))
    excluded = {"data.train/a": "a: gone", "data.train/b": "b: cut", "data.eval/c": "c: cut"}
    with RunDir(config, "train") as run, pytest.raises(ConfigError, match=says) as refusal:
        run.keep_to(plan, base, excluded)
    assert "cannot be read now: b: cut" in str(refusal.value)
    assert "a: gone" not in str(refusal.value) and "c: cut" not in str(refusal.value)
    with RunDir(config, "train") as run:
        run.keep_to(PLAN, [4], {"data.train/a": "a: gone"})


# ---- before the first checkpoint ----


def test_another_run_does_not_take_the_place_of_one_without_a_checkpoint(
    place: Workplace, tmp_path: Path
) -> None:
    config = config_of(place, tmp_path / "run")
    with RunDir(config, "train") as run:
        run.write(0, "eval", {"format": 0.25})
    before = {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")}
    assert len(before) == 2
    with pytest.raises(ConfigError, match="seed: saved 3, now 4"):
        RunDir(config_of(place, tmp_path / "run", "seed=4"), "train")
    with pytest.raises(ConfigError, match="holds a run of `jaxgrpo train`"):
        RunDir(config, "sft")
    assert {path: path.read_bytes() for path in (tmp_path / "run").glob("*.*")} == before
    with RunDir(config_of(place, tmp_path / "run", "train.steps=9"), "train"):
        assert tiny_run.lines(tmp_path / "run") == []  # the same run, from its start


def test_a_start_that_wrote_no_score_may_be_mended(place: Workplace, tmp_path: Path) -> None:
    with RunDir(config_of(place, tmp_path / "run"), "train"):
        pass
    mended = config_of(place, tmp_path / "run", "data.buckets=[200]")
    with RunDir(mended, "train") as run:
        assert configs.load(run.path / "config.yaml") == mended


# ---- several hosts ----


def as_process(index: int, monkeypatch: pytest.MonkeyPatch, others: Callable[[Any], list]) -> None:
    """This process is one of two, whose words `others` makes of this one's."""
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    monkeypatch.setattr(run_dir, "gather_objects", others)
    monkeypatch.setattr(run_dir, "_SEEN_WITHIN", 0.1)


def test_a_folder_that_hosts_do_not_share_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each would keep a part of every checkpoint."""
    as_process(1, monkeypatch, lambda mine: [mine if isinstance(mine, str) else True, mine])
    with pytest.raises(ConfigError, match=r"process 1 does not find in .*one folder that all"):
        run_dir._check_shared(tmp_path)


def test_a_folder_that_hosts_share_is_left_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    as_process(0, monkeypatch, lambda mine: [mine, mine])
    run_dir._check_shared(tmp_path)
    assert list(tmp_path.iterdir()) == []


# ---- the best checkpoint ----


def test_the_best_score_must_be_one_that_the_evaluation_has(
    place: Workplace, tmp_path: Path
) -> None:
    best = ("checkpoint.best=tvg/mIoU", "eval.every=4")
    with RunDir(config_of(place, tmp_path / "run", *best), "train") as run:
        run.check_best({"tvg", "mcqa"})
        with pytest.raises(ConfigError, match="asks tvg questions nowhere: .* mcqa, format or"):
            run.check_best({"mcqa"})
        for step, score in ((4, 0.5), (8, 0.1), (12, 0.2), (16, 0.3)):
            run.write(step, "eval", {"tvg/mIoU": score})
            run.save(step, state(step))
    assert {path.name for path in (run.path / "checkpoints").iterdir()} == {"4", "12", "16"}
