"""The prompt asks for the scored format, and the target earns the largest reward there is."""

from __future__ import annotations

import dataclasses
import json
import random
from itertools import pairwise

import numpy as np
import pytest

from data.prompts import PromptError, best_single_span, question_text, target_text
from data.records import CHOICE_TASKS, SPAN_TASKS, TASKS, Record
from rewards.answers import read_answers
from rewards.dual import dual_reward, truth_arrays
from rewards.parse import parse
from rewards.weights import RewardWeights

Spans = tuple[tuple[float, float], ...]

RECORD = Record(
    id="a-0",
    video="a.mp4",
    task="gqa",
    question="What is opened?",
    options=("door", "window"),
    answer="B",
    spans=((3.5, 7.0),),
    duration=30.0,
    clip=None,
)


ANSWERS = {
    "number": "-3.50",
    "regression": "0",
    "ocr": "Stop  at\nthe <b> sign",
    "text": "She opens it.",
}


def of(task: str, spans: Spans = RECORD.spans) -> Record:
    record = dataclasses.replace(RECORD, task=task, spans=spans)
    return dataclasses.replace(record, answer=ANSWERS[task]) if task in ANSWERS else record


def reward(text: str, record: Record, thinking: bool) -> tuple[float, float]:
    """The total reward of a completion and its IoU."""
    answers = read_answers([[text]], [record], np.ones((1, 1)), thinking=thinking)
    truth = truth_arrays([record], max_spans=max(1, len(record.spans)))
    total, parts = dual_reward(answers, truth, RewardWeights(0.5, 1.0, 2.0))
    return float(total[0, 0]), float(parts["iou"][0, 0])


# --- question -------------------------------------------------------------------------------------


def test_a_multiple_choice_prompt_in_full() -> None:
    assert question_text(of("mcqa"), thinking=False) == (
        "What is opened?\n"
        "A. door\n"
        "B. window\n"
        "Answer with the letter of the right option inside <answer></answer>."
    )


def test_a_grounding_prompt_in_full() -> None:
    assert question_text(of("tvg"), thinking=True) == (
        "What is opened?\n"
        "Think inside <think></think>, then answer with when this happens in the video, in "
        'seconds, as <answer>{"start_time": "s", "end_time": "s"}</answer>.'
    )


def test_prompts_of_numbers_and_texts_in_full() -> None:
    asked = {
        task: question_text(of(task), False).removeprefix("What is opened?\n") for task in ANSWERS
    }
    assert asked == {
        "number": "Answer with the number, in digits, inside <answer></answer>.",
        "regression": "Answer with your estimate, one number in digits, inside <answer></answer>.",
        "ocr": "Answer with the text that the video shows, word for word, inside "
        "<answer></answer>.",
        "text": "Answer in your own words inside <answer></answer>.",
    }


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_the_prompt_shows_the_tags_and_keys_that_are_scored(task: str, thinking: bool) -> None:
    text = question_text(of(task), thinking)
    assert text.count("<answer>") == text.count("</answer>") == 1
    assert text.count("<think></think>") == int(thinking)
    assert ("A. door\nB. window\n" in text) == (task in CHOICE_TASKS)
    content = text.partition("<answer>")[2].partition("</answer>")[0]
    target = target_text(of(task), thinking).partition("<answer>")[2].partition("</answer>")[0]
    if task not in SPAN_TASKS:
        assert content == ""
    else:
        assert list(json.loads(content)) == list(json.loads(target))


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize("task", TASKS)
def test_repeating_the_prompts_own_example_earns_nothing(task: str, thinking: bool) -> None:
    text = question_text(of(task), thinking)
    example = text[text.index("<answer>") : text.index("</answer>") + len("</answer>")]
    answer = parse(f"<think></think>{example}" if thinking else example, task, thinking=thinking)
    assert not answer.format_ok and answer.choice == -1 and np.isnan(answer.start)
    assert answer.text is None


# --- target ---------------------------------------------------------------------------------------


def test_targets_in_full() -> None:
    span = '"start_time": "3.5", "end_time": "7.0"'
    assert target_text(of("mcqa"), thinking=False) == "<answer>B</answer>"
    reasoned = dataclasses.replace(of("tvg"), rationale="It opens.")
    answer = f"<answer>{{{span}}}</answer>"
    assert target_text(reasoned, thinking=True) == f"<think>It opens.</think>{answer}"
    assert target_text(reasoned, thinking=False) == answer
    assert target_text(of("tvg"), thinking=True) == f"<think></think>{answer}"
    assert target_text(of("number"), thinking=True) == "<think></think><answer>-3.50</answer>"
    assert target_text(of("gqa"), thinking=False) == f'<answer>{{"option": "B", {span}}}</answer>'


@pytest.mark.parametrize("thinking", [True, False])
@pytest.mark.parametrize(
    ("task", "most"),
    [("mcqa", 1.5), ("tvg", 2.5), ("gqa", 3.5), *((task, 1.0) for task in ANSWERS)],
)
def test_the_target_earns_the_largest_reward(task: str, most: float, thinking: bool) -> None:
    for spans in (((3.5, 7.0),), ((0.0, 0.1),), ((12.25, 130.75),), ((3.0, 5.0), (4.0, 7.0))):
        record = dataclasses.replace(of(task, spans), rationale="It opens.")
        text = target_text(record, thinking)
        assert reward(text, record, thinking)[0] == pytest.approx(most, abs=1e-5)


@pytest.mark.parametrize(
    ("span", "written"),
    [
        ((3.0, 7.0), ("3.0", "7.0")),
        ((3.25, 7.0), ("3.25", "7.00")),
        ((1 / 3, 22 / 3), ("0.33", "7.33")),
        ((3.14159, 99.97), ("3.14", "99.97")),
        ((0.001, 0.004), ("0.001", "0.004")),
    ],
)
def test_times_have_no_more_decimals_than_they_need(
    span: tuple[float, float], written: tuple[str, str]
) -> None:
    text = target_text(of("tvg", (span,)), thinking=False)
    fields = json.loads(text.removeprefix("<answer>").removesuffix("</answer>"))
    assert (fields["start_time"], fields["end_time"]) == written


def test_rounding_costs_at_most_a_few_thousandths_of_the_iou() -> None:
    rng = random.Random(0)
    for _ in range(50):
        start = rng.uniform(0, 1000)
        record = of("tvg", ((start, start + 10 ** rng.uniform(-1, 3)),))
        assert reward(target_text(record, thinking=False), record, thinking=False)[1] > 0.995


def iou_on_a_grid(prediction: tuple[int, int], truth: Spans) -> float:
    """Counts unit cells: exact for whole seconds."""
    cells = np.arange(20) + 0.5
    true = np.any([(s < cells) & (cells < e) for s, e in truth], axis=0)
    predicted = (prediction[0] < cells) & (cells < prediction[1])
    return (true & predicted).sum() / (true | predicted).sum()


def test_of_several_spans_the_target_names_the_best_single_stretch() -> None:
    assert best_single_span(((0, 4), (5, 9), (50, 51))) == (0, 9)
    assert best_single_span(((0, 2), (10, 14))) == (10, 14)
    assert best_single_span(((1, 2), (0, 10))) == (0, 10)
    rng = random.Random(1)
    for _ in range(40):
        ends = sorted(rng.sample(range(20), 6))
        spans = tuple((float(s), float(e)) for s, e in list(pairwise(ends))[::2])
        spans += ((spans[1][0], spans[1][0] + 1.0),)  # overlapping, out of order
        best = max(iou_on_a_grid((s, e), spans) for s in range(20) for e in range(s + 1, 20))
        record = of("tvg", spans)
        found = reward(target_text(record, thinking=False), record, thinking=False)[1]
        assert found == pytest.approx(best, abs=1e-5)


def test_mistakes_are_named() -> None:
    unknown = dataclasses.replace(RECORD, task="vqa")
    with pytest.raises(
        PromptError, match="record 'a-0', task: expected one of mcqa, tvg, gqa, number"
    ):
        question_text(unknown, thinking=True)
    with pytest.raises(PromptError, match="record 'a-0', task"):
        target_text(unknown, thinking=True)
    with pytest.raises(PromptError, match="holds '</think>'"):
        target_text(dataclasses.replace(RECORD, rationale="a</think>b"), thinking=True)
    with pytest.raises(PromptError, match="answer: expected an option's letter"):
        target_text(dataclasses.replace(RECORD, answer=None), thinking=False)
    with pytest.raises(PromptError, match="answer: expected a text, found none"):
        target_text(dataclasses.replace(of("ocr"), answer=None), thinking=False)
    with pytest.raises(PromptError, match="spans: expected at least one"):
        target_text(of("tvg", ()), thinking=False)
