"""How cost grows: the points of the sweeps, and what is said of the committed figures."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest

from benchmarks import growth
from benchmarks.grpo.ours import settings
from benchmarks.grpo.workload import raw_config
from jaxgrpo.flops import Step, rollout_flops, update_flops
from models.attention_backend import Backend
from models.qwen2_5_vl.config import ModelConfig

FIGURES: dict[str, Any] = json.loads((Path(growth.__file__).parent / "growth.json").read_text())


def test_the_sweeps_are_those_that_were_promised() -> None:
    tokens = [growth.workload_at("video tokens", n).video.patches // 4 for n in (256, 8192)]
    assert tokens == [256, 8192]
    assert growth.workload_at("completions", 32).group == 32
    assert growth.workload_at("completion tokens", 16).length == 16
    for sweep, values in growth.SWEEPS.items():
        assert list(FIGURES["sweeps"][sweep]) == [str(value) for value in values]
        assert growth.BASE in [growth.workload_at(sweep, value) for value in values]


@pytest.mark.parametrize("sweep", growth.SWEEPS)
def test_the_flops_of_the_figures_are_the_formulas(sweep: str) -> None:
    config = ModelConfig.from_dict(raw_config("32m"), source="32m")
    for value, point in FIGURES["sweeps"][sweep].items():
        workload = growth.workload_at(sweep, int(value))
        section = settings(workload, Path()).model
        step = Step(
            workload.prompt(0).size,
            *(1, workload.group, workload.length, section.logit_chunk),
            backend=Backend(chunk=section.attention_chunk),
            remat=section.remat,
        )
        ours = rollout_flops(config, step).total + update_flops(config, step).total
        assert sum(point["flops"].values()) == ours
        assert point["repeated_flops"] == growth.repeated_flops(workload, config)
        assert point["repeated_flops"] > 1.5 * ours


def test_one_more_completion_costs_its_own_tokens() -> None:
    """And not another prompt, of 1,100 tokens to its 64."""
    seconds, by_flops = growth.one_more(FIGURES)
    assert 0.5 < seconds / by_flops < 1.5
    middle = FIGURES["sweeps"]["completions"][str(growth.BASE.group)]
    assert seconds < 0.05 * middle["seconds"]["step"]


def test_a_straight_line_has_the_slope_that_is_said() -> None:
    points = {
        str(group): {"seconds": {"step": 1.0 + 0.1 * group}, "flops": {"all": 10 + 2 * group}}
        for group in (2, 8, 32)
    }
    seconds, by_flops = growth.one_more({"sweeps": {"completions": points}})
    assert seconds == pytest.approx(0.1)
    assert by_flops == pytest.approx(2 * 1.8 / 26)


def test_table_and_picture_show_every_point(tmp_path: Path) -> None:
    table = growth.table(FIGURES)
    assert table.count("\n| ") - 2 * len(growth.SWEEPS) + 1 == sum(map(len, growth.SWEEPS.values()))
    growth.plot(FIGURES, tmp_path / "growth.png")
    assert matplotlib.image.imread(tmp_path / "growth.png").shape[1] > 1000
