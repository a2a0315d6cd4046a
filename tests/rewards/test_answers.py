"""The host's half: completions become arrays of fixed shape, texts already scored."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import numpy as np
import pytest

from data.records import TASKS, Record
from rewards.answers import Answers, read_answers
from rewards.parse import RewardError, parse

TRUTH = {"mcqa": "A", "gqa": "A", "number": "3.14", "regression": "10", "ocr": "a b", "text": "Yes"}
SPAN = '"start_time": "1", "end_time": "2.5"'
SAID = {
    "mcqa": "<answer>B</answer>",
    "tvg": f"<answer>{{{SPAN}}}</answer>",
    "gqa": f'<answer>{{"option": "B", {SPAN}}}</answer>',
    "number": "<answer>3.141</answer>",
    "regression": "<answer>-2.5</answer>",
    "ocr": "<answer>a c</answer>",
    "text": "<answer>yes.</answer>",
}


def record(task: str, answer: str | None = None) -> Record:
    options = ("red", "green") if task in ("mcqa", "gqa") else ()
    spans = ((1.0, 2.0),) if task in ("tvg", "gqa") else ()
    return Record(f"{task}-0", "a.mp4", task, "What?", options, answer, spans, None)


def read(texts: list[list[str]], tasks: Any, lengths: Any = None) -> Answers:
    records = [record(task, TRUTH.get(task)) for task in tasks]
    group = len(texts[0]) if texts else 0
    lengths = np.ones((len(texts), group), np.int64) if lengths is None else lengths
    return read_answers(texts, records, lengths, thinking=False)


def test_a_batch_is_its_completions_one_by_one() -> None:
    texts = [[SAID[task], "x"] for task in TASKS]
    batch = read(texts, TASKS)
    assert [a.dtype for a in batch] == [bool, np.int32, *[np.float32] * 3, np.int32, np.float32]
    assert [a.shape for a in batch] == [(7, 2), (7, 2), (7, 2, 2), *[(7, 2)] * 4]
    for p, task in enumerate(TASKS):
        for g in range(2):
            single = parse(texts[p][g], task, thinking=False)
            assert batch.format_ok[p, g] == single.format_ok == (g == 0)
            assert batch.choice[p, g] == single.choice
            np.testing.assert_array_equal(batch.span[p, g], (single.start, single.end))


def test_numbers_are_read_and_texts_are_scored() -> None:
    batch = read([[SAID[task], "x"] for task in TASKS], TASKS)
    of = dict(zip(TASKS, batch.number, strict=True))
    np.testing.assert_array_equal(of["number"], np.float32([3.141, np.nan]))
    np.testing.assert_array_equal(of["regression"], np.float32([-2.5, np.nan]))
    assert all(np.isnan(of[task]).all() for task in ("mcqa", "tvg", "gqa", "ocr", "text"))
    match = dict(zip(TASKS, batch.match.tolist(), strict=True))
    assert (match["number"], match["ocr"], match["text"]) == ([1, 0], [0.5, 0], [1, 0])
    assert all(match[task] == [0, 0] for task in ("mcqa", "tvg", "gqa", "regression"))


def test_lengths_are_passed_on() -> None:
    np.testing.assert_array_equal(read([["x", "y"]], ["tvg"], np.array([[7, 9]])).length, [[7, 9]])


def test_an_empty_batch_keeps_its_ranks() -> None:
    assert read([], [], np.zeros((0, 0))).span.shape == (0, 0, 2)
    assert read([[], []], ["tvg", "tvg"]).span.shape == (2, 0, 2)


def test_mistakes_of_the_caller_are_named() -> None:
    with pytest.raises(RewardError, match="found 1 records for 2 prompts"):
        read([[""], [""]], ["tvg"])
    with pytest.raises(RewardError, match="found 2 for prompt 1"):
        read([[""], ["", ""]], ["tvg", "tvg"])
    with pytest.raises(RewardError, match=r"lengths: expected shape \(1, 1\), found \(1, 2\)"):
        read([[""]], ["tvg"], np.ones((1, 2)))
    with pytest.raises(RewardError, match="'ocr-0', answer: expected a text, found none"):
        read_answers([["x"]], [record("ocr")], np.ones((1, 1)), thinking=False)
    with pytest.raises(RewardError, match="'number-0', answer: expected a decimal number, .*'x'"):
        read_answers([["x"]], [record("number", "x")], np.ones((1, 1)), thinking=False)


def test_the_hosts_half_does_not_import_jax() -> None:
    code = (
        "import sys, rewards.answers, rewards.written as w; w.text_score('a', 'a'); "
        "sys.exit('jax' in sys.modules or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
