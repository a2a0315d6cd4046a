"""The dual reward: what each task earns, and that no completion escapes its bounds."""

from __future__ import annotations

import dataclasses
import json
import random
import re
import string
from typing import Any

import jax
import numpy as np
import pytest

from data.records import TASKS, Record
from rewards.answers import Answers, read_answers
from rewards.dual import Truth, dual_reward, truth_arrays
from rewards.parse import RewardError
from rewards.weights import RewardWeights

NAN = np.nan
OPTIONS = ("red", "green", "blue", "white")
WEIGHTS = RewardWeights(
    format=0.5, choice=1.0, iou=2.0, number=3.0, regression=4.0, ocr=5.0, text=6.0
)
ANSWERS = {
    "mcqa": "B",
    "gqa": "B",
    "number": "-3.50",
    "regression": "10",
    "ocr": "Stop at the sign",
    "text": "She opens the door.",
}
VIDEO = ["mcqa", "tvg", "gqa"]  # the paper's tasks


def record(task: str, /, **fields: Any) -> Record:
    return dataclasses.replace(
        Record(
            id=f"{task}-0",
            video="a.mp4",
            task=task,
            question="Which?",
            options=OPTIONS if task in ("mcqa", "gqa") else (),
            answer=ANSWERS.get(task),
            spans=((2.0, 4.0), (6.0, 10.0)) if task in ("tvg", "gqa") else (),
            duration=30.0,
            clip=None,
        ),
        **fields,
    )


def read(texts: list[list[str]], tasks: list[str], thinking: bool = False) -> Answers:
    lengths = np.ones((len(texts), len(texts[0])))
    return read_answers(texts, [record(task) for task in tasks], lengths, thinking=thinking)


def score(
    texts: list[list[str]], tasks: list[str], weights: RewardWeights = WEIGHTS
) -> tuple[np.ndarray, dict[str, np.ndarray]]:
    truth = truth_arrays([record(task) for task in tasks], max_spans=3)
    total, parts = dual_reward(read(texts, tasks), truth, weights)
    return np.asarray(total), {name: np.asarray(part) for name, part in parts.items()}


def test_each_task_earns_the_weighted_sum_of_the_components_it_has() -> None:
    span = '"start_time": "2", "end_time": "6"'  # 2 s of the 6 true ones, in a union of 8
    texts = [
        ["<answer>B</answer>", "B: <answer>B</answer>", "<answer>C</answer>"],
        [f"<answer>{{{span}}}</answer>", f"-<answer>{{{span}}}</answer>", "<answer>B</answer>"],
        [
            f'<answer>{{"option": "B", {span}}}</answer>',
            f'<answer>{{"option": "A", {span}}}</answer>',
            "",
        ],
    ]
    total, parts = score(texts, VIDEO)
    np.testing.assert_array_equal(parts["format"], [[1, 0, 1], [1, 0, 0], [1, 1, 0]])
    np.testing.assert_array_equal(parts["choice"], [[1, 1, 0], [NAN, NAN, NAN], [1, 0, 0]])
    np.testing.assert_allclose(parts["iou"], [[NAN] * 3, [0.25, 0.25, 0], [0.25, 0.25, 0]])
    np.testing.assert_allclose(total, [[1.5, 1, 0.5], [1, 0.5, 0], [2, 1, 0]])
    assert total.dtype == np.float32


def test_numbers_and_texts_earn_their_format_and_how_near_they_are() -> None:
    said = {
        "number": ["-3.501", "3.50", "about 3"],
        "regression": ["9", "-10", "ten"],
        "ocr": ["stop at the sign", "at the", ""],
        "text": ["She opens the door", "he opens a door", ""],
    }
    texts = [[f"<answer>{answer}</answer>" for answer in answers] for answers in said.values()]
    total, parts = score(texts, list(said))
    nan = [NAN] * 3
    np.testing.assert_array_equal(parts["format"], [[1, 1, 0]] * 4)
    np.testing.assert_array_equal(parts["number"], [[1, 0, 0], nan, nan, nan])
    np.testing.assert_allclose(parts["regression"], [nan, [0.9, 0, 0], nan, nan])
    np.testing.assert_allclose(parts["ocr"], [nan, nan, [0.75, 0.5, 0], nan])
    # "he opens a door": 2 of 4 words, no pair, a common subsequence of 2
    np.testing.assert_allclose(parts["text"], [nan, nan, nan, [1, 1 / 3, 0]], rtol=1e-6)
    assert np.isnan([parts["choice"], parts["iou"]]).all()
    best = [3, 4 * 0.9, 5 * 0.75, 6]
    np.testing.assert_allclose(total[:, 0], 0.5 + np.array(best), rtol=1e-6)
    np.testing.assert_array_equal(total[:, 2], [0] * 4)


def test_nanmean_averages_a_component_over_the_tasks_that_have_it() -> None:
    right = '<answer>{"option": "B", "start_time": "6", "end_time": "10"}</answer>'
    _, parts = score([[right], ["x"], [right]], ["gqa", "tvg", "mcqa"])
    assert np.nanmean(parts["choice"]) == 0.5
    assert np.nanmean(parts["iou"]) == pytest.approx((4 / 6 + 0) / 2)


def test_the_default_weights_are_the_papers_for_grounding() -> None:
    text = '<answer>{"start_time": "2.0", "end_time": "6.0"}</answer>'
    total, parts = score([[text]], ["tvg"], RewardWeights())
    assert total == pytest.approx(0.5 * parts["iou"] + 0.5)


def test_a_reversed_or_empty_span_earns_no_more_than_its_format() -> None:
    spans = [("6.0", "2.0"), ("3.0", "3.0")]
    texts = [f'<answer>{{"start_time": "{s}", "end_time": "{e}"}}</answer>' for s, e in spans]
    total, parts = score([texts], ["tvg"])
    np.testing.assert_array_equal(parts["iou"], [[0, 0]])
    np.testing.assert_array_equal(total, [[WEIGHTS.format] * 2])


def test_several_answers_earn_nothing() -> None:
    total, _ = score([["<answer>B</answer><answer>B</answer>"]], ["mcqa"])
    assert total == 0


def test_a_letter_beyond_the_options_is_not_right() -> None:
    _, parts = score([["<answer>Z</answer>"]], ["mcqa"])
    assert parts["choice"] == 0


def test_a_component_that_the_task_lacks_adds_nothing_even_if_its_truth_is_there() -> None:
    text = '<answer>{"option": "B", "start_time": "2", "end_time": "4"}</answer>'
    truth = truth_arrays([record("gqa")], max_spans=2)
    truth = truth._replace(task=np.array([TASKS.index("regression")]))
    total, _ = dual_reward(read([[text]], ["gqa"]), truth, WEIGHTS)
    assert total == WEIGHTS.format


def test_jit_gives_the_same_rewards() -> None:
    texts = [["<answer>B</answer>", "x"], ['<answer>{"start_time":2,"end_time":9}</answer>', "x"]]
    answers = read(texts, ["mcqa", "tvg"])
    truth = truth_arrays([record("mcqa"), record("tvg")], max_spans=2)
    plain = dual_reward(answers, truth, WEIGHTS)
    jitted = jax.jit(dual_reward, static_argnames="weights")(answers, truth, weights=WEIGHTS)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), jitted, plain)


# --- ground truth ---------------------------------------------------------------------------------


def test_truth_keeps_what_the_task_scores_and_pads_the_rest() -> None:
    records = [
        record("mcqa", spans=((1.0, 2.0),)),  # present, but mcqa does not score spans
        record("tvg", answer="A", options=OPTIONS),
        record("gqa", answer="D"),
    ]
    truth = truth_arrays(records, max_spans=3)
    np.testing.assert_array_equal(truth.choice, [1, -1, 3])
    np.testing.assert_array_equal(truth.task, [0, 1, 2])
    assert np.isnan(truth.number).all()
    padded = [[2, 4], [6, 10], [NAN, NAN]]
    np.testing.assert_array_equal(truth.spans, np.float32([np.full((3, 2), NAN), padded, padded]))
    assert [a.dtype for a in truth] == [np.int32, np.int32, *[np.float32] * 3]


def test_the_truth_of_numbers_and_texts() -> None:
    truth = truth_arrays([record(task) for task in TASKS[3:]], max_spans=1)
    np.testing.assert_array_equal(truth.number, np.float32([-3.5, 10, NAN, NAN]))
    np.testing.assert_array_equal(truth.choice, [-1] * 4)
    assert np.isnan(truth.spans).all()


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (record("mcqa", task="vqa"), "task: expected one of mcqa, tvg, .*, found 'vqa'"),
        (record("number", answer="1e3"), "expected a decimal number, found '1e3'"),
        (record("regression", answer=None), "expected a decimal number, found None"),
        (record("mcqa", answer="E"), "one of its 4 options, found 'E'"),
        (record("gqa", answer=None), "one of its 4 options, found None"),
        (record("tvg", spans=()), r"expected 1 to 2 \(max_spans\), found 0"),
        (record("tvg", spans=((0.0, 1.0),) * 3), r"expected 1 to 2 \(max_spans\), found 3"),
        (record("tvg", spans=((4.0, 2.0),)), r"found \[4.0, 2.0\]"),
        (record("tvg", spans=((2.0, 2.0),)), r"found \[2.0, 2.0\]"),
        (record("tvg", spans=((-1.0, 2.0),)), r"found \[-1.0, 2.0\]"),
        (record("tvg", spans=((1.0, NAN),)), r"found \[1.0, nan\]"),
        (record("tvg", spans=((1.0, 1e39),)), r"found \[1.0, 1e\+39\]"),
    ],
)
def test_a_bad_record_is_named(bad: Record, message: str) -> None:
    with pytest.raises(RewardError, match=f"record '{bad.id}'.*{message}"):
        truth_arrays([bad], max_spans=2)


def test_shapes_that_disagree_are_refused() -> None:
    answers = read([["x"], ["x"]], ["tvg", "tvg"])
    truth = truth_arrays([record("tvg")], max_spans=2)
    with pytest.raises(RewardError, match=r"truth.task: expected shape \(2,\)"):
        dual_reward(answers, truth, WEIGHTS)
    with pytest.raises(RewardError, match=r"answers.span: expected shape \(2, 1, 2\)"):
        dual_reward(answers._replace(span=answers.span[:, 0]), truth, WEIGHTS)


# --- fuzzing: 20,000 completions against a slow and obvious scorer --------------------------------


class Pieces:
    """Completions of every kind: well formed, damaged in one place, or adversarial."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def time(self) -> str:
        plain = f"{self.rng.uniform(0, 12):.{self.rng.randint(0, 3)}f}"
        hostile = [
            "NaN", "nan", "inf", "-Infinity", "1e309", "1e1", "-3.5", "٣.٥", "07", ".5", "5.",
            "1_0", "3.5s", "1.2.3", "9" * 400, "0." + "0" * 17 + "1", "999999", "1000000", "null",
            "", "{}", "B",
        ]  # fmt: skip
        value = plain if self.rng.random() < 0.9 else self.rng.choice(hostile)
        return value if self.rng.random() < 0.2 else f'"{value}"'

    def letter(self) -> str:
        if self.rng.random() < 0.85:
            return self.rng.choice("ABCD")
        return self.rng.choice(
            ["b", "(B)", "B.", "Z", "Ｂ", "", "AB", "\\u0042", "blue", "7", "null"]
        )

    def content(self, task: str) -> str:
        if task == "mcqa":
            return self.letter()
        members = [f'"start_time": {self.time()}', f'"end_time": {self.time()}']
        if task == "gqa":
            members.insert(0, f'"option": "{self.letter()}"')
        damage = self.rng.random()
        if damage < 0.04:
            members.append(self.rng.choice(members))
        elif damage < 0.08:
            members.pop(self.rng.randrange(len(members)))
        elif damage < 0.12:
            members.append(self.rng.choice(['"note": "x"', '"end_time": "9"', "", '"option": "B"']))
        elif damage < 0.2:
            self.rng.shuffle(members)
        return "{" + self.rng.choice([", "] * 8 + [",\n\t", " "]).join(members) + "}"

    def completion(self, task: str, thinking: bool) -> str:
        asked = task if self.rng.random() < 0.95 else self.rng.choice(VIDEO)
        parts = ["<answer>", self.content(asked), "</answer>"]
        if thinking != (self.rng.random() < 0.05):
            thought = self.rng.choice(["", "It opens.", "<b>", "x\n" * 50, "<answer", "\x00٣ 𝟛"])
            parts = ["<think>", thought, "</think>", self.rng.choice(["", "\n", " "]), *parts]
        for _ in range(self.rng.choice([0] * 6 + [1, 1, 2, 3])):
            at = self.rng.randrange(len(parts) + 1)
            match self.rng.choice(["insert", "delete", "repeat", "swap", "cut"]):
                case "insert":
                    hostile = ["<think>", "</think>", "<answer>", "</answer>", "<answer>B</answer>"]
                    parts.insert(
                        at, self.rng.choice([*hostile, "x", "\u00a0", "\n", "<", "\ud800"])
                    )
                case "delete":
                    del parts[at : at + 1]
                case "repeat":
                    parts[at:at] = parts[max(at - 3, 0) : at]
                case "swap":
                    parts[at : at + 2] = parts[at : at + 2][::-1]
                case "cut":
                    whole = "".join(parts)
                    parts = [whole[: self.rng.randrange(len(whole) + 1)]]
        return "".join(parts)


def plain_time(value: Any) -> float | None:
    if not isinstance(value, str) or not value or set(value) - set("0123456789."):
        return None
    whole, point, fraction = value.partition(".")
    if not 1 <= len(whole) <= 6 or (whole[0] == "0" and len(whole) > 1) or "." in fraction:
        return None
    return float(value) if not point or 1 <= len(fraction) <= 18 else None


def oracle_answer(text: str, task: str) -> tuple[str | None, float, float] | None:
    """The letter and the times, read with the standard library's JSON parser."""
    if re.findall("</?answer>", text) != ["<answer>", "</answer>"]:
        return None
    content = re.split("</?answer>", text)[1]
    if task == "mcqa":
        letter = content.strip(" \t\r\n")
        return (letter, NAN, NAN) if letter in list(string.ascii_uppercase) else None
    if "\\" in content or not content.strip().startswith("{"):
        return None
    try:
        pairs = json.loads(content, object_pairs_hook=list, parse_int=str, parse_float=str)
    except ValueError:
        return None
    keys = ["end_time", "start_time"] if task == "tvg" else ["end_time", "option", "start_time"]
    if sorted(key for key, _ in pairs) != keys:
        return None
    fields = dict(pairs)
    start, end = plain_time(fields["start_time"]), plain_time(fields["end_time"])
    if start is None or end is None:
        return None
    letter = fields.get("option")
    if task == "gqa" and letter not in list(string.ascii_uppercase):
        return None
    return letter, start, end


def oracle_format(text: str, thinking: bool) -> bool:
    pieces = re.split("(</?(?:think|answer)>)", text)
    tags = (["<think>", "</think>"] if thinking else []) + ["<answer>", "</answer>"]
    return pieces[1::2] == tags and not "".join(pieces[0::4]).strip(" \t\r\n")


def oracle_parts(text: str, task: str, thinking: bool) -> tuple[float, float, float]:
    """format, choice and IoU against the answer B and the spans [2, 4] and [6, 10]."""
    answer = oracle_answer(text, task)
    if answer is None:
        return 0.0, NAN if task == "tvg" else 0.0, NAN if task == "mcqa" else 0.0
    letter, start, end = answer
    overlap = sum(max(min(end, e) - max(start, s), 0) for s, e in ((2, 4), (6, 10)))
    iou = overlap / (end - start + 6 - overlap) if end > start else 0.0
    return (
        float(oracle_format(text, thinking)),
        NAN if task == "tvg" else float(letter == "B"),
        NAN if task == "mcqa" else iou,
    )


@pytest.mark.parametrize("thinking", [True, False])
def test_ten_thousand_completions_earn_what_the_oracle_says(thinking: bool) -> None:
    prompts, group = 102, 100
    tasks = [VIDEO[p % 3] for p in range(prompts)]
    pieces = Pieces(seed=int(thinking))
    texts = [[pieces.completion(task, thinking) for _ in range(group)] for task in tasks]
    truth: Truth = truth_arrays([record(task) for task in tasks], max_spans=3)
    total, parts = dual_reward(read(texts, tasks, thinking), truth, WEIGHTS)

    expected = np.array(
        [[oracle_parts(text, task, thinking) for text in row] for row, task in zip(texts, tasks)]
    )
    for i, name in enumerate(["format", "choice", "iou"]):
        np.testing.assert_allclose(parts[name], expected[..., i], atol=2e-6, err_msg=name)
        assert 0.02 < np.nanmean(expected[..., i]) < 0.98  # the fuzz reaches both outcomes
    weights = np.array([WEIGHTS.format, WEIGHTS.choice, WEIGHTS.iou])
    np.testing.assert_allclose(total, np.nansum(expected * weights, -1), atol=1e-5)
    most = np.where(np.isnan(expected), 0, weights).sum(-1)
    assert np.isfinite(total).all() and (total >= 0).all() and (total <= most).all()
