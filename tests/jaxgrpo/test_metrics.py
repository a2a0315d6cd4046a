"""What a run writes down."""

from __future__ import annotations

import json
import math
import re
import struct
import sys
import time
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tensorboardX.proto.event_pb2 import Event, SessionLog

from jaxgrpo.metrics import (
    CompileCounter,
    MetricsError,
    MetricsLog,
    Progress,
    plot_curves,
    read_metrics,
)


def strict(path: Path) -> list[dict[str, Any]]:
    """The lines, read by a parser that refuses NaN, as other languages' do."""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = path.read_text(encoding="utf-8")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def steps(path: Path) -> list[int]:
    return [line["step"] for line in strict(path)]


def write_run(run_dir: Path, last: int, resume: int | None = None) -> None:
    with MetricsLog(run_dir, resume, tensorboard=False) as log:
        for step in range((resume or 0) + 1, last + 1):
            log.write(step, "train", {"reward/total": step / 7})
            log.write_completions(step, "train", [{"completion": f"at {step}", "reward/total": 1}])


def test_a_line_holds_step_split_and_flat_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write(0, "eval", {"tvg/mIoU": np.float64(0.25), "items": 3})
        log.write(1, "train", {"kl": jnp.float32(0.5), "compilations": np.int64(4)})
    assert strict(tmp_path / "metrics.jsonl") == [
        {"step": 0, "split": "eval", "tvg/mIoU": 0.25, "items": 3},
        {"step": 1, "split": "train", "kl": 0.5, "compilations": 4},
    ]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf, jnp.float32("nan"), None])
def test_what_is_not_a_finite_number_is_null(tmp_path: Path, value: Any) -> None:
    with MetricsLog(tmp_path, tensorboard=True) as log:
        log.write(1, "train", {"reward/iou": value, "kl": 0.0})
    line = {"step": 1, "split": "train", "reward/iou": None, "kl": 0.0}
    assert strict(tmp_path / "metrics.jsonl") == [line]


@pytest.mark.parametrize("text", ["<think>é\n\u2028</think>\x00", "lone \ud800 half", "視頻"])
def test_any_completion_is_kept_on_one_line(tmp_path: Path, text: str) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write_completions(3, "train", [{"id": "a", "completion": text, "reward/iou": 0.5}])
    (line,) = read_metrics(tmp_path / "completions.jsonl")
    assert line == {"step": 3, "split": "train", "id": "a", "completion": text, "reward/iou": 0.5}


def test_completions_are_readable_as_they_stand(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        log.write_completions(3, "train", [{"completion": "視頻"}])
    assert "視頻" in (tmp_path / "completions.jsonl").read_text(encoding="utf-8")


def test_lines_are_in_the_file_at_once(tmp_path: Path) -> None:
    log = MetricsLog(tmp_path, tensorboard=False)
    log.write(1, "train", {"kl": 1.0})
    assert steps(tmp_path / "metrics.jsonl") == [1]
    log.close()


def test_a_new_run_starts_with_empty_files(tmp_path: Path) -> None:
    write_run(tmp_path, 4)
    write_run(tmp_path, 2)
    assert steps(tmp_path / "metrics.jsonl") == [1, 2]
    assert steps(tmp_path / "completions.jsonl") == [1, 2]


@given(last=st.integers(1, 6), saved=st.integers(0, 6), torn=st.integers(0, 60))
def test_a_resumed_run_leaves_the_same_lines_as_one_never_killed(
    tmp_path_factory: pytest.TempPathFactory, last: int, saved: int, torn: int
) -> None:
    """Killed after `last` steps, with a line torn in the middle; the checkpoint is of `saved`."""
    saved = min(saved, last)
    whole, killed = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("killed")
    write_run(whole, 7)
    write_run(killed, last)
    for name in ("metrics.jsonl", "completions.jsonl"):
        with open(killed / name, "ab") as file:
            file.write(
                f'{{"step": {last + 1}, "split": "train", "reward/total": 1.'.encode()[:torn]
            )
    write_run(killed, 7, resume=saved)
    for name in ("metrics.jsonl", "completions.jsonl"):
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.parametrize("line", ["{torn", "[1]", '{"split": "train"}', '{"step": "1"}'])
def test_damage_before_the_last_line_is_named(tmp_path: Path, line: str) -> None:
    (tmp_path / "metrics.jsonl").write_text(f'{{"step": 1, "split": "train"}}\n{line}\n')
    with pytest.raises(MetricsError, match=r"metrics.jsonl:2 .*remove that line"):
        MetricsLog(tmp_path, 1, tensorboard=False)


def test_only_process_0_writes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    write_run(tmp_path, 3)
    assert list(tmp_path.iterdir()) == []


def test_tensorboard_gets_the_same_numbers(tmp_path: Path) -> None:
    with MetricsLog(tmp_path) as log:
        log.write(1, "train", {"reward/iou": 0.25, "kl": math.nan})
        log.write(1, "eval", {"tvg/mIoU": 0.5})
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/reward/iou" in content
    assert b"eval/tvg/mIoU" in content
    assert b"train/kl" not in content  # a NaN would be a point at nowhere
    assert np.float32(0.25).tobytes() in content


def events(file: Path) -> Iterator[Any]:
    """The events of a TensorBoard file: records of length, checksum, event, checksum."""
    content, at = file.read_bytes(), 0
    while at < len(content):
        (length,) = struct.unpack_from("<Q", content, at)
        yield Event.FromString(content[at + 12 : at + 12 + length])
        at += length + 16


def shown_by_tensorboard(folder: Path) -> list[tuple[str, int]]:
    """(tag, step) of all points; the start of a session at a step hides those from that step on."""
    points: list[tuple[str, int]] = []
    for event in (event for file in sorted(folder.iterdir()) for event in events(file)):
        if event.session_log.status == SessionLog.START:
            points = [(tag, step) for tag, step in points if step < event.step]
        points += [(value.tag, event.step) for value in event.summary.value]
    return points


def test_a_resumed_run_has_each_step_once_in_tensorboard(tmp_path: Path) -> None:
    for resume, last in ((None, 5), (3, 6)):
        with MetricsLog(tmp_path, resume) as log:
            for step in range((resume or 0) + 1, last + 1):
                log.write(step, "train", {"kl": 0.5})
        time.sleep(1.1)  # the files are named by the second
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    shown = shown_by_tensorboard(tmp_path / "tensorboard")
    assert shown == [("train/kl", step) for step in range(1, 7)]


# ---- Weights & Biases: a stand-in with the calls that we make, which its 0.31 has ----


class FakeServer:
    """What a server of W&B keeps: per run id its lines by number, as `resume="allow"` finds it."""

    def __init__(self) -> None:
        self.runs: dict[str, dict[int, dict[str, Any]]] = {}
        self.started: list[dict[str, Any]] = []
        self.exit_codes: list[int] = []
        self.refuses = False

    def module(self) -> types.ModuleType:
        wandb = types.ModuleType("wandb")

        class Error(Exception):
            pass

        def init(**options: Any) -> FakeRun:
            if self.refuses:
                raise Error("no API key")
            assert options["resume"] == "allow"
            self.started.append(options)
            return FakeRun(self, self.runs.setdefault(options["id"], {}))

        wandb.Error, wandb.init = Error, init  # type: ignore[attr-defined]
        return wandb


class FakeRun:
    def __init__(self, server: FakeServer, lines: dict[int, dict[str, Any]]) -> None:
        self.server, self.lines = server, lines
        self.step = max(lines, default=-1) + 1

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, data: dict[str, Any], step: int, commit: bool) -> None:
        assert commit and step >= self.step  # W&B warns and drops the line
        self.lines[step] = data
        self.step = step + 1

    def finish(self, exit_code: int) -> None:
        self.server.exit_codes.append(exit_code)


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> FakeServer:
    server = FakeServer()
    monkeypatch.setitem(sys.modules, "wandb", server.module())
    return server


def log_to_wandb(run_dir: Path, last: int, resume: int | None = None) -> None:
    with MetricsLog(run_dir, resume, tensorboard=False, wandb="videos", config={"seed": 3}) as log:
        if resume is None:
            log.write(0, "eval", {"tvg/mIoU": 0.25})
        for step in range((resume or 0) + 1, last + 1):
            log.write(step, "train", {"kl": step / 4, "reward/iou": None})
            if step % 2 == 0:
                log.write(step, "eval", {"tvg/mIoU": step / 8})


def test_a_resumed_run_goes_on_at_wandb_with_each_line_once(
    tmp_path: Path, server: FakeServer
) -> None:
    log_to_wandb(tmp_path / "whole", 6)
    log_to_wandb(tmp_path / "killed", 5)
    log_to_wandb(tmp_path / "killed", 6, resume=3)
    whole, killed = server.runs.values()  # two ids, not three
    assert killed == whole
    assert [line["step"] for line in whole.values()] == [0, 1, 2, 2, 3, 4, 4, 5, 6, 6]
    assert whole[2 * 4] == {"step": 4, "train/kl": 1.0}
    assert whole[2 * 4 + 1] == {"step": 4, "eval/tvg/mIoU": 0.5}
    first = server.started[0]
    assert (first["project"], first["name"]) == ("videos", "whole")
    assert first["config"] == {"seed": 3} and server.exit_codes == [0, 0, 0]


def test_a_run_that_fails_is_a_failed_run_at_wandb(tmp_path: Path, server: FakeServer) -> None:
    with pytest.raises(ZeroDivisionError), MetricsLog(tmp_path, tensorboard=False, wandb="videos"):
        _ = 1 / 0
    assert server.exit_codes == [1]


def test_only_process_0_logs_to_wandb(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    log_to_wandb(tmp_path, 2)
    assert server.started == [] and list(tmp_path.iterdir()) == []


def test_wandb_that_is_missing_or_refuses_is_a_mistake_with_its_mend(
    tmp_path: Path, server: FakeServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.refuses = True
    with pytest.raises(MetricsError, match=r"(?s)log.wandb.*no API key.*WANDB_MODE=offline"):
        log_to_wandb(tmp_path, 1)
    monkeypatch.setitem(sys.modules, "wandb", None)  # as if it were not installed
    with pytest.raises(MetricsError, match=r"pip install -e '.\[wandb\]'"):
        log_to_wandb(tmp_path, 1)


def test_the_bar_shows_reward_iou_kl_speed_and_time_left(
    capsys: pytest.CaptureFixture[str],
) -> None:
    progress = Progress("GRPO", 10, done=4)
    metrics = {"reward/total": 0.5, "reward/iou": 0.25, "kl": 0.001, "groups": 3}
    progress.update(metrics | {"throughput/tokens_per_second": jnp.float32(1234.5)})
    progress.print("a note")
    progress.close()
    shown = capsys.readouterr().err
    assert "a note" in shown
    last = shown.split("\r")[-1]
    for part in ("GRPO", "5/10", "reward=0.5", "IoU=0.25", "KL=0.001", "tokens/s=1,234"):
        assert part in last
    assert re.search(r"\[\d+:\d+<\d+:\d+, ", last)  # [time taken<time left, steps/s


def test_the_bar_leaves_out_what_is_not_defined(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress("SFT", 2)
    progress.update({"loss": 2.0, "reward/iou": math.nan})
    progress.close()
    last = capsys.readouterr().err.split("\r")[-1]
    assert "loss=2" in last
    assert "IoU" not in last


def test_compilations_are_counted_by_program() -> None:
    @jax.jit
    def double(x: jax.Array) -> jax.Array:
        return 2 * x

    inputs = [np.zeros(3, np.float32), np.zeros(4, np.float32), np.zeros(3, np.float32)]
    with CompileCounter() as counter:
        for x in inputs:
            double(x)
    assert counter.counts["jit(double)"] == 2
    before = counter.total
    double(np.zeros(5, np.float32))
    assert counter.total == before  # closed


def test_the_curves_are_drawn(tmp_path: Path) -> None:
    with MetricsLog(tmp_path, tensorboard=False) as log:
        for step in range(5):
            iou = math.nan if step == 2 else step / 5
            log.write(step, "train", {"reward/total": step / 5, "reward/iou": iou, "kl": 0.1})
            log.write(step, "eval", {"tvg/mIoU": 0.3})
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    picture = cv2.imread(str(tmp_path / "curves.png"))
    assert picture is not None
    assert picture.shape[0] > 500
    assert len(np.unique(picture.reshape(-1, 3), axis=0)) > 50


def test_curves_of_an_empty_run_are_an_empty_picture(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    plot_curves(tmp_path / "metrics.jsonl", tmp_path / "curves.png")
    assert cv2.imread(str(tmp_path / "curves.png")) is not None
