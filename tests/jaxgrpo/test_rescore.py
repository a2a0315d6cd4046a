"""Stored completions under another reward."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from data.records import Record
from jaxgrpo import cli, evaluate, rescore
from jaxgrpo.metrics import MetricsLog
from jaxgrpo.rescore import RescoreError, Stored, read_stored, summary, table
from rewards.options import LengthBand, RewardOptions
from rewards.reward import Reward
from rewards.weights import RewardWeights
from tests.jaxgrpo import tiny_run

MCQA = Record("q1", "a.mp4", "mcqa", "Which?", ("red", "blue"), "B", (), 9.0)
TVG = Record("q2", "a.mp4", "tvg", "When?", (), None, ((2.0, 6.0), (7.0, 8.0)), 9.0, (1.0, 9.5))
OCR = Record("q3", "a.mp4", "ocr", "What?", (), "Stop", (), None, rationale="It says so.")


def tvg(start: float, end: float) -> str:
    return f'<answer>{{"start_time": "{start}", "end_time": "{end}"}}</answer>'


# By prompt, one group each: the right answer, an answer outside of the format, none.
SAID = [
    (MCQA, ["<answer>B</answer>", "I say <answer>B</answer>", "<answer>A</answer>", "B"]),
    (TVG, [tvg(2, 6), "So: " + tvg(2, 8), tvg(1, 9), ""]),
    (OCR, ["<answer>Stop</answer>", "<answer>Go</answer>", "<answer></answer>", "Stop"]),
]
BEFORE = RewardWeights()


def lines_of(
    step: int, reward: Reward, said: Any = SAID, tokens: int = 10, grouped: bool = True
) -> list[dict[str, Any]]:
    """As a run writes them."""
    texts, records = [texts for _, texts in said], [record for record, _ in said]
    lengths = np.full((len(texts), len(texts[0])), tokens)
    total, parts = reward.score(reward.read(texts, records, lengths), reward.truth(records, 2))
    return [
        evaluate.sample(
            evaluate.Prediction(
                record,
                text,
                float(total[p, g]),
                {name: float(part[p, g]) for name, part in parts.items()},
                tokens,
            )
        )
        | ({"row": p, "sample": g} if grouped else {})
        for p, (record, texts) in enumerate(said)
        for g, text in enumerate(texts)
    ]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    log = MetricsLog(tmp_path / "run", tensorboard=False)
    reward = Reward(BEFORE, thinking=False)
    for step in (1, 2):
        log.write_completions(step, "train", lines_of(step, reward))
    log.write_completions(2, "eval", lines_of(2, reward, SAID[:1], grouped=False))
    return tmp_path / "run"


def report(run: Path, weights: RewardWeights, options: RewardOptions | None = None) -> Any:
    _, stored = read_stored(str(run))
    reward = Reward(weights, options or RewardOptions(), thinking=False)
    return summary(rescore.rescore(stored, reward))


def test_the_same_reward_changes_nothing(run: Path) -> None:
    found = report(run, BEFORE)
    assert (found["completions"], found["groups"]) == (28, 6)
    for part in found["components"].values():
        assert part["before"] == part["after"]
    assert found["totals_changed"] == found["groups_reordered"] == found["to_zero"] == 0
    assert found["advantages_turned"] == {"up": 0, "down": 0} and found["examples"] == []


def test_records_survive_being_written_down(run: Path) -> None:
    _, stored = read_stored(str(run))
    assert [x.record for x in stored[:12:4]] == [MCQA, TVG, OCR]
    assert [x.tokens for x in stored] == [10] * 28
    assert len({x.group for x in stored}) == 6 + 4


def test_without_the_format_reward_right_answers_in_any_form_are_worth_the_same(run: Path) -> None:
    found = report(run, RewardWeights(format=0.0))
    # Of the first group's totals 1, 0.5, 0.5, 0 are left 0.5, 0.5, 0, 0.
    assert found["components"]["format"]["before"] == found["components"]["format"]["after"]
    mean = {when: found["components"]["total"][when]["mean"] for when in ("before", "after")}
    form = found["components"]["format"]["before"]["mean"]
    assert mean["before"] - mean["after"] == pytest.approx(0.5 * form)
    # mcqa: 0 above before and after; 1 from the mean to above; 2 from the mean to below.
    # tvg: totals .90, .42, .81, 0 become .40, .42, .31, 0; the mean moves from .53 to .28.
    # ocr: totals 1, .5, 0, 0 become .5, 0, 0, 0; the mean moves from .375 to .125.
    assert found["advantages_turned"] == {"up": 2, "down": 2}
    assert found["turned_lines"] == [6, 10, 18, 22]
    assert (found["from_zero"], found["to_zero"]) == (4, 0)
    assert (found["groups_reordered"], found["groups_with_another_best"]) == (2, 2)


def test_a_reward_that_tells_nothing_apart_leaves_no_advantages(run: Path) -> None:
    off = RewardWeights(format=0, choice=0, iou=1, number=0, regression=0, ocr=0, text=0)
    found = report(run, off)
    assert found["components"]["total"]["before"]["equal_groups"] == 0
    assert found["components"]["total"]["after"]["equal_groups"] == pytest.approx(4 / 6)
    assert found["to_zero"] == 2 * (2 + 4)


def test_a_component_of_one_reward_only_has_one_side(run: Path) -> None:
    found = report(run, BEFORE, RewardOptions("giou", LengthBand(0.5, 1, 10)))["components"]
    assert found["length"]["before"] == {"mean": None, "equal_groups": None}
    assert found["length"]["after"]["mean"] > 0
    assert found["temporal"]["before"]["mean"] is None


def test_the_examples_are_those_that_change_most(run: Path) -> None:
    examples = report(run, RewardWeights(choice=2.0))["examples"]
    assert [x["after"] - x["before"] for x in examples] == [1.5] * 5
    assert examples[0] == {
        "id": "q1",
        "question": "Which?",
        "truth": "B (blue)",
        "completion": "<answer>B</answer>",
        "before": 1.0,
        "after": 2.5,
    }


def test_the_table_names_every_component(run: Path) -> None:
    text = table(report(run, RewardWeights(format=0.0)))
    for part in ("total", "format", "choice", "iou", "of 6 groups 2 are reordered"):
        assert part in text
    assert "2 turn positive, 2 negative, 0 vanish, 4 appear" in text
    assert "turned: the completions of lines 6, 10, 18, 22\n" in text
    assert "regression" not in text  # no question has it


def test_without_whole_groups_means_are_all_there_is(tmp_path: Path) -> None:
    reward = Reward(BEFORE, thinking=False)
    lines = lines_of(1, reward, grouped=False)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (tmp_path / "predictions.jsonl").write_text(text)  # as `jaxgrpo eval` writes them
    found = report(tmp_path, RewardWeights(format=0.0))
    assert found["groups"] == 0 and found["totals_changed"] == 6
    assert found["components"]["total"]["after"]["equal_groups"] is None
    assert "log.samples=-1" in table(found)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "holds neither completions.jsonl nor predictions.jsonl"),
        ("", "is empty"),
        ('{"step": 1, "id": "a", "completion": "x"}\n', r"jsonl:1 has no field 'record'"),
        ('{"record": \n', "jsonl:1 is not a completion"),
        ("[]\n", "jsonl:1 is not a completion"),
    ],
)
def test_what_cannot_be_scored_again_is_named(
    tmp_path: Path, content: str | None, says: str
) -> None:
    if content is not None:
        (tmp_path / "completions.jsonl").write_text(content)
    with pytest.raises(RescoreError, match=says):
        read_stored(str(tmp_path))


@pytest.mark.parametrize(
    ("field", "value", "says"),
    [
        ("completion", 5, "completion: expected str, found 5"),
        ("tokens", 10**30, "tokens: expected 0 or more"),
        ("row", [1], r"row: expected int, found \[1\]"),
        ("reward/total", float("inf"), "reward/total: expected a number, found inf"),
        ("record", {"video": "a.mp4", "task": "tvg", "spans": [["a", "b"]]}, "field 'spans'"),
        ("record", {"video": "a.mp4", "task": "nothing"}, "field 'task'"),
    ],
)
def test_a_value_that_no_run_writes_is_named(
    run: Path, field: str, value: object, says: str
) -> None:
    path = run / "completions.jsonl"
    first, *others = path.read_text().splitlines()
    path.write_text("\n".join([json.dumps(json.loads(first) | {field: value}), *others, ""]))
    with pytest.raises(RescoreError, match=f"jsonl:1 is not a completion as a run .*{says}"):
        read_stored(str(run))


def test_lines_of_two_runs_in_one_file_are_noticed(run: Path) -> None:
    MetricsLog(run, tensorboard=False, resume_step=2).write_completions(
        1, "train", lines_of(1, Reward(BEFORE, thinking=False), SAID[::-1])
    )
    with pytest.raises(RescoreError, match="step 1, row 0 are about several questions"):
        report(run, BEFORE)


def test_a_torn_last_line_is_left_out(run: Path) -> None:
    with open(run / "completions.jsonl", "a") as file:
        file.write('{"step": 3, "id": "q1"')
    assert len(read_stored(str(run))[1]) == 28


def test_the_command_prints_a_table_or_json(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("{run_dir: r, model: {path: m}, data: {train: t.jsonl, thinking: false}}")
    assert cli.main(["rescore", str(run), str(path), "reward.format=0"]) == 0
    assert capsys.readouterr().out.startswith(f"28 completions of {run / 'completions.jsonl'}\n")
    assert cli.main(["rescore", str(run), str(path), "reward.format=0", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["completions"], found["advantages_turned"]) == (28, {"up": 2, "down": 2})


def test_a_real_run_scores_as_it_did(tmp_path_factory: pytest.TempPathFactory) -> None:
    """What training and evaluation wrote down is what the same reward says of the texts."""
    reference = tiny_run.reference(tiny_run.workplace(tmp_path_factory.getbasetemp()))
    _, stored = read_stored(str(reference))
    result = rescore.rescore(stored, Reward(BEFORE, thinking=False))
    assert result.before.keys() == result.after.keys()
    for name, before in result.before.items():
        np.testing.assert_allclose(result.after[name], before, atol=1e-6, err_msg=name)
    assert len({x.group for x in stored if len(x.group) == 2}) == tiny_run.STEPS * 4
    assert isinstance(stored[0], Stored)
