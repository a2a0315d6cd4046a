"""What a run leaves behind becomes a line, and the committed lines are of arms that there are."""

from __future__ import annotations

import json
from pathlib import Path

from benchmarks.study import arms
from benchmarks.study.__main__ import jobs
from benchmarks.study.results import SCORES, read_results, result_of, write_results

COMMITTED = Path(__file__).resolve().parents[3] / "benchmarks" / "study" / "results.jsonl"


def write_run(out: Path, name: str) -> None:
    """Predictions of two items a test set and task, in another order than their ids', and a run."""
    lines = []
    for test in ("eval", "spliced"):
        for task in ("mcqa", "tvg", "gqa"):
            for number in (2, 1):
                line = {"id": f"{test}-{number}-{task}", "record": {"task": task}}
                line["reward/iou"] = None if task == "mcqa" else 0.1234567 * number
                line["reward/choice"] = None if task == "tvg" else number - 1.0
                lines.append(line)
    curve = dict.fromkeys(SCORES, 0.51239)
    rows = [
        {"step": 0, "split": "eval", **curve},
        {"step": 1, "split": "train", "groups/zero_variance": 0.25},
        {"step": 2, "split": "train", "groups/zero_variance": 0.75},
    ]
    times = [{"job": name, "command": "train", "seconds": 90.0, "code": 0}] * 2
    other = {"job": "other-0", "command": "train", "seconds": 1.0, "code": 0}
    for path, found in (
        (f"eval/{name}/predictions.jsonl", lines),
        (f"runs/{name}/metrics.jsonl", rows),
        ("times.jsonl", [*times, other]),
    ):
        (out / path).parent.mkdir(parents=True, exist_ok=True)
        (out / path).write_text("".join(json.dumps(row) + "\n" for row in found))


def test_a_run_is_its_items_scores_its_curve_and_its_time(tmp_path: Path) -> None:
    write_run(tmp_path, "dual-3")
    found = result_of(tmp_path, "dual", 3)
    assert found.scores["spliced"] == {
        "mcqa/accuracy": [0.0, 1.0],
        "tvg/mIoU": [0.1235, 0.2469],
        "gqa/accuracy": [0.0, 1.0],
        "gqa/mIoU": [0.1235, 0.2469],
    }
    assert found.curves == {"0": dict.fromkeys(SCORES, 0.5124)}
    assert (found.equal, found.seconds) == (0.5, {"train": 180.0})
    assert found.versions.keys() == {"jax", "flax", "optax", "numpy"}


def test_lines_are_read_as_they_were_written_by_seed_and_arm(tmp_path: Path) -> None:
    write_run(tmp_path, "dual-3")
    found = result_of(tmp_path, "dual", 3)
    path = tmp_path / "results.jsonl"
    assert read_results(path) == []
    rows = [found, found._replace(seed=1), found._replace(arm="choice")]
    write_results(path, rows)
    assert read_results(path) == [rows[1], rows[2], rows[0]]


def test_the_committed_results_are_whole_and_of_the_arms() -> None:
    found = read_results(COMMITTED)
    names = [(result.arm, result.seed) for result in found]
    assert names and len(set(names)) == len(names)
    assert set(names) <= {(job.arm.name, job.seed) for job in jobs()}
    for result in found:
        for test in ("eval", "spliced"):
            assert {len(result.scores[test][score]) for score in SCORES} == {arms.TEST_CLIPS}
