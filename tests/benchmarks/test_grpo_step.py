"""The comparison's sides compute the same, and its figures are those of the steps."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import grpo_step
from benchmarks.grpo import ours, pytorch
from benchmarks.grpo.workload import WORKLOADS, Workload, write_model
from models.qwen2_5_vl.positions import Grid

SMALL = Workload("100k", Grid(2, 8, 6), 12, 4, 3, "float32", remat=False)


@pytest.fixture(scope="module")
def lines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[dict[str, Any]]]:
    directory: Path = tmp_path_factory.mktemp("model")
    write_model(SMALL.model, SMALL.dtype, directory)
    return {
        "ours": list(ours.run(SMALL, directory, 1)),
        "usual": list(pytorch.run(SMALL, directory, 1, "usual")),
        "best": list(pytorch.run(SMALL, directory, 1, "best")),
    }


def test_all_sides_find_the_same_gradient(lines: dict[str, list[dict[str, Any]]]) -> None:
    first = {side: found[0] for side, found in lines.items()}
    grpo_step.check_gradients(first, "float32")
    wrong = first | {"best": {"grad_norm": first["best"]["grad_norm"] * 1.01}}
    with pytest.raises(SystemExit, match="the sides do not compute the same"):
        grpo_step.check_gradients(wrong, "float32")


def test_text_alone_is_for_the_trainers_that_take_no_videos(tmp_path: Path) -> None:
    assert grpo_step.sides_of(SMALL) == ("ours", "usual", "best")
    text = SMALL._replace(video=None, text=20)
    assert grpo_step.sides_of(text) == ("ours", "trl", "tunix")
    write_model(text.model, text.dtype, tmp_path)
    known, step = ours.run(text, tmp_path, 1)
    assert len(text.prompt(0).tokens) == 20 and known["grad_norm"] > 0 and step["step"] > 0


def test_a_side_that_cannot_be_imported_is_named_with_the_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(grpo_step.NEEDED, "trl", "import no_such_library")
    why = grpo_step.missing("trl", sys.executable)
    assert why == "ModuleNotFoundError: No module named 'no_such_library'"
    assert grpo_step.missing("ours", sys.executable) is None


def test_the_phases_of_a_step_are_the_step(lines: dict[str, list[dict[str, Any]]]) -> None:
    for _, step in lines.values():
        phases = [step[name] for name in ("rollout", "rewards", "update") if name in step]
        assert step["step"] == pytest.approx(sum(phases)) and step["gib"] > 0


def test_disturbed_steps_are_left_out_while_others_remain() -> None:
    steps = [
        {"rollout": 1.0, "update": 2.0, "step": 3.0, "others": 0.0, "gib": 1.0},
        {"rollout": 5.0, "update": 5.0, "step": 10.0, "others": 0.5, "gib": 2.0},
    ]
    found = grpo_step.summary(steps)
    assert found["seconds"] == {"rollout": 1.0, "update": 2.0, "step": 3.0}
    assert found["disturbed"] == 1 and found["peak_gib"] == 2.0
    assert grpo_step.summary(steps[1:])["seconds"]["step"] == 10.0


def test_the_workloads_are_of_the_stated_sizes() -> None:
    for name, tokens, of_video in [
        ("cpu-1024", 1100, 1024),
        ("cpu-2048", 2150, 2048),
        ("text-512", 512, 0),
        ("gpu-3b-2048", 2150, 2048),
        ("gpu-3b-8192", 8294, 8192),
    ]:
        prompt = WORKLOADS[name].prompt(0)
        assert len(prompt.tokens) == tokens and (prompt.vision_index >= 0).sum() == of_video
