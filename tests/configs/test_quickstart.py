"""The README's first command, cut short: the embedded default in a process of its own."""

from __future__ import annotations

from pathlib import Path

import pytest

from jaxgrpo import config
from tests.jaxgrpo import tiny_run

CONFIG = tiny_run.ROOT / "configs" / "quickstart.yaml"


@pytest.fixture(scope="module")
def short(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """The run directory after two steps, and what the run printed."""
    place = tiny_run.workplace(tmp_path_factory.getbasetemp())
    folder = tmp_path_factory.mktemp("quickstart")
    finished = tiny_run.wait(
        tiny_run.start(
            *("train", str(CONFIG), tiny_run.remembering(place)),
            *(f"run_dir={folder / 'run'}", f"data.root={folder / 'clips'}"),
            *("data.synthetic.train_clips=12", "data.synthetic.eval_clips=12"),
            *("train.steps=2", "eval.batch=12"),
        )
    )
    assert finished.code == 0, finished.out
    return folder / "run", finished.out


def test_it_prints_a_table_with_baselines_and_what_to_do_next(short: tuple[Path, str]) -> None:
    run, printed = short
    table = printed[printed.index("before ") :]
    for row in [
        "tvg/mIoU",
        "tvg/mIoU_constant_span",
        "tvg/mIoU_swapped_videos",
        "tvg/R1@0.5",
        "mcqa/accuracy",
        "gqa/accuracy",
        "gqa/mIoU",
        "gqa/acc_at_iou0.5",
        "format",
    ]:
        assert f"\n{row} " in table
    assert f"jaxgrpo export {run} {run}-hf" in table


def test_its_metrics_have_the_documented_names(short: tuple[Path, str]) -> None:
    names = [
        "step",
        "reward/total",
        "reward/format",
        "reward/choice",
        "reward/iou",
        "groups/zero_variance",
        "kl",
        "entropy",
        "completion/length",
        "time/rollout",
        "time/update",
        "time/data_wait",
        "compilations",
    ]
    steps = tiny_run.lines(short[0], "train")
    assert [line["step"] for line in steps] == [1, 2]
    assert all(line.keys() >= set(names) for line in steps)
    assert (short[0] / "curves.png").is_file()


def test_the_shipped_model_knows_the_formats_and_sees_colors(short: tuple[Path, str]) -> None:
    """Random weights of its shape score 0 in all of these."""
    before = tiny_run.lines(short[0], "eval")[0]
    assert before["step"] == 0
    assert before["format"] >= 0.8
    assert before["gqa/accuracy"] > before["gqa/accuracy_constant_letter"]


@pytest.mark.parametrize("devices", [1, 2, 4, 8])
def test_its_batches_divide_over_a_hosts_devices(devices: int) -> None:
    """As `mesh: {data: -1}` shares them out."""
    loaded = config.load(CONFIG)
    assert loaded.mesh.data == -1
    assert loaded.rollout.prompts % devices == loaded.eval.batch % devices == 0
