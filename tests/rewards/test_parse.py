"""What the parser reads, and what it refuses to read."""

from __future__ import annotations

import subprocess
import sys
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from data.records import LONGEST_TEXT, TAGS, TASKS
from rewards.parse import Answer, RewardError, parse

SPAN = '"start_time": "3.5", "end_time": "7.0"'
GOOD = {
    "mcqa": "<answer>B</answer>",
    "tvg": f"<answer>{{{SPAN}}}</answer>",
    "gqa": f'<answer>{{"option": "B", {SPAN}}}</answer>',
    "number": "<answer>-3.50</answer>",
    "regression": "<answer>1200</answer>",
    "ocr": "<answer>Stop  at\nthe sign</answer>",
    "text": "<answer>She opens the door.</answer>",
}
CHOICE = {"mcqa": 1, "gqa": 1}
TIMES = {"tvg": (3.5, 7.0), "gqa": (3.5, 7.0)}
TEXT = {
    "number": "-3.50",
    "regression": "1200",
    "ocr": "Stop  at\nthe sign",
    "text": "She opens the door.",
}


def tvg(start: str, end: str = '"7.0"') -> Answer:
    content = f'{{"start_time": {start}, "end_time": {end}}}'
    return parse(f"<think>x</think><answer>{content}</answer>", "tvg", thinking=True)


def has_no_answer(answer: Answer) -> bool:
    times = np.isnan(answer.start) and np.isnan(answer.end)
    return answer.choice == -1 and times and answer.text is None


def has_good_answer(answer: Answer, task: str) -> bool:
    expected = TIMES.get(task, (np.nan, np.nan))
    times = np.array_equal((answer.start, answer.end), expected, equal_nan=True)
    return times and answer.choice == CHOICE.get(task, -1) and answer.text == TEXT.get(task)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "thought",
    ["<think>It opens.</think>", "\n<think></think> \t\r\n", "<think>\n<b>é𝟛</b></think>"],
)
def test_the_scored_format_is_read_with_thinking(task: str, thought: str) -> None:
    answer = parse(thought + GOOD[task] + "\n", task, thinking=True)
    assert answer.format_ok
    assert has_good_answer(answer, task)


@pytest.mark.parametrize("task", TASKS)
def test_without_thinking_the_format_is_the_answer_alone(task: str) -> None:
    alone = parse(f" {GOOD[task]}\n", task, thinking=False)
    assert alone.format_ok and has_good_answer(alone, task)
    thought = parse(f"<think>x</think>{GOOD[task]}", task, thinking=False)
    assert not thought.format_ok and has_good_answer(thought, task)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "frame",
    [
        "{}",  # no thought at all
        "<think>x{}",
        "x</think>{}",
        "</think>x<think>{}",
        "<think>x</think>{}<think>y</think>",
        "{}<think>x</think>",
        "<think>{}</think>",
        "<think><think>x</think>{}",
        "<think><think>x</think></think>{}",
        "<think>x</think></think>{}",
        "<think>x</think>Answer: {}",
        "Hm. <think>x</think>{}",
        "<think>x</think>{}<|im_start|>",
        "<think>x</think>{}.",
        "<think>x</think>\u00a0{}",  # Unicode white space is text
        "<THINK>x</THINK>{}",
        "< think >x</think>{}",
    ],
)
def test_text_around_a_single_answer_costs_the_format_but_not_the_answer(
    task: str, frame: str
) -> None:
    answer = parse(frame.replace("{}", GOOD[task]), task, thinking=True)
    assert not answer.format_ok
    assert has_good_answer(answer, task)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "frame",
    [
        "{0}{0}",  # two answers, even if equal
        "<think>{0}</think>{0}",
        "<think>x</think>{0}<answer>",
        "<think>x</think></answer>{0}",
        "<think>x</think><answer>{0}</answer>",
    ],
)
def test_several_answers_are_no_answer(task: str, frame: str) -> None:
    answer = parse(frame.format(GOOD[task]), task, thinking=True)
    assert not answer.format_ok
    assert has_no_answer(answer)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "3",
        "<answer>",
        "</answer>B<answer>",
        "<answer>B",
        "</answer>3<answer>",
        "<answer>3",
        "<think>x</think><answer></answer>",
        "<think>x</think><answer> \t\r\n</answer>",
        "<think>x</think><ANSWER>B</ANSWER>",
        "<think>x</think>&lt;answer&gt;B&lt;/answer&gt;",
    ],
)
def test_text_without_an_answer_has_none(task: str, text: str) -> None:
    answer = parse(text, task, thinking=True)
    assert not answer.format_ok
    assert has_no_answer(answer)


@pytest.mark.parametrize("task", ["mcqa", "tvg", "gqa", "number", "regression"])
@pytest.mark.parametrize(
    "text",
    [
        "<think>x</think><answer>null</answer>",
        "<think>x</think><answer>[]</answer>",
        "<think>x</think><answer>{}</answer>",
        "\ud800\x00<answer>\udfff</answer>",
    ],
)
def test_what_is_not_the_kind_of_answer_that_was_asked_for_is_none(task: str, text: str) -> None:
    answer = parse(text, task, thinking=True)
    assert not answer.format_ok
    assert has_no_answer(answer)


@pytest.mark.parametrize(
    "letter",
    ["b", "(B)", "B.", "B)", "AB", "A, B", "A B", "1", "", "Ｂ", "Β", "В", "B\u00a0", "door"],
)
def test_a_letter_is_one_upper_case_ascii_letter(letter: str) -> None:
    mcqa = parse(f"<think>x</think><answer>{letter}</answer>", "mcqa", thinking=True)
    assert not mcqa.format_ok and has_no_answer(mcqa)
    gqa_text = f'<think>x</think><answer>{{"option": "{letter}", {SPAN}}}</answer>'
    gqa = parse(gqa_text, "gqa", thinking=True)
    assert not gqa.format_ok and has_no_answer(gqa)


def test_every_letter_has_its_index() -> None:
    found = [parse(f"<answer>\n{c}\t</answer>", "mcqa", thinking=False).choice for c in "AZ"]
    assert found == [0, 25]


@pytest.mark.parametrize(
    ("number", "seconds"),
    [
        ("0", 0.0),
        ("7", 7.0),
        ("3.50", 3.5),
        ("999999", 999999.0),
        ("0.123456789012345678", 0.123456789),
    ],
)
def test_times_are_json_strings_or_json_numbers(number: str, seconds: float) -> None:
    for written in (number, f'"{number}"'):
        answer = tvg(written)
        assert answer.format_ok
        assert answer.start == pytest.approx(seconds)


@pytest.mark.parametrize(
    "number",
    [
        "NaN", "nan", "inf", "Infinity", "-Infinity", "1e309", "1e1", "1E1", "-1", "-0.0", "+1",
        "1000000", "9" * 5000, "0." + "1" * 19, "1.", ".5", ".", "", "1.2.3", "1,5", "1_0", "03.5",
        "0x10", "3. 5", "3.5s", "3.5 seconds", "0:03", "1/2", "٣", "３", "²", "3\u0300",
        "\\u0033", "A", "null", "true", "[3.5]", '{"s": 3.5}',
    ],
)  # fmt: skip
def test_what_is_not_a_plain_decimal_number_is_no_time(number: str) -> None:
    for written in (number, f'"{number}"'):
        answer = tvg(written)
        assert not answer.format_ok and has_no_answer(answer)
        answer = tvg('"1.0"', written)
        assert not answer.format_ok and has_no_answer(answer)


def test_a_negative_start_is_no_answer_at_all() -> None:
    text = '<answer>{"option": "B", "start_time": "-1.0", "end_time": "7.0"}</answer>'
    answer = parse(text, "gqa", thinking=False)
    assert not answer.format_ok
    assert has_no_answer(answer)


@pytest.mark.parametrize(("start", "end"), [("7.0", "3.5"), ("3.5", "3.5"), ("0", "999999")])
def test_reversed_empty_and_overlong_spans_are_well_formed(start: str, end: str) -> None:
    assert tvg(start, end) == Answer(True, -1, float(start), float(end))


@pytest.mark.parametrize(
    "content",
    [
        '{"start_time": "1", "start_time": "2", "end_time": "3"}',
        '{"start_time": "1", "end_time": "3", "end_time": "3"}',
        '{"start_time": "1", "start_time": "3"}',
        '{"start_time": "1"}',
        '{"start_time": "1", "end_time": "3", "note": "x"}',
        '{"start_time": "1", "end_time": "3",}',
        '{"start_time": "1" "end_time": "3"}',
        '{"start_time": "1", "end_time": "3"',
        '{"start_time": "1", "end_time": "3"}}',
        '{"start_time": "1", "end_time": "3"} {"start_time": "1", "end_time": "3"}',
        '[{"start_time": "1", "end_time": "3"}]',
        "{'start_time': '1', 'end_time': '3'}",
        '{start_time: "1", end_time: "3"}',
        '{"Start_Time": "1", "end_time": "3"}',
        '{"start_time ": "1", "end_time": "3"}',
        '{"start\\u005ftime": "1", "end_time": "3"}',
        '{"start_time": "1", "end_time": "3} ',
        '{"start_time": " 1", "end_time": "3"}',
        '{"start_time": "1", "end_time": "3 "}',
        '{"start_time": 1", "end_time": "3"}',
        '{"start_time": "1",\u00a0"end_time": "3"}',
        '```json\n{"start_time": "1", "end_time": "3"}\n```',
        '{"option": "B", "start_time": "1", "end_time": "3"}',
        "1 to 3",
    ],
)
def test_a_damaged_object_is_no_answer(content: str) -> None:
    answer = parse(f"<think>x</think><answer>{content}</answer>", "tvg", thinking=True)
    assert not answer.format_ok
    assert has_no_answer(answer)


@pytest.mark.parametrize(
    "content",
    [
        f"{{{SPAN}}}",
        f'{{"option": B, {SPAN}}}',
        f'{{"option": "B", "option": "B", {SPAN}}}',
        f'{{"option": ["B"], {SPAN}}}',
        '{"option": "B", "start_time": "B", "end_time": "7.0"}',
        '{"option": "3.5", "start_time": "3.5", "end_time": "7.0"}',
        f'{{"option": 3.5, {SPAN}}}',
        "B",
    ],
)
def test_a_grounded_answer_needs_all_three_parts(content: str) -> None:
    answer = parse(f"<think>x</think><answer>{content}</answer>", "gqa", thinking=True)
    assert not answer.format_ok
    assert has_no_answer(answer)


@pytest.mark.parametrize("task", ["number", "regression"])
@pytest.mark.parametrize("number", ["0", "-0", "7", "-3.50", "0.000", "9" * 15, "1." + "0" * 18])
def test_a_number_is_kept_as_it_is_written(task: str, number: str) -> None:
    answer = parse(f"<answer>\n{number} </answer>", task, thinking=False)
    assert answer.format_ok and answer.text == number


@pytest.mark.parametrize("task", ["number", "regression"])
@pytest.mark.parametrize(
    "number",
    [
        "NaN", "inf", "-Infinity", "1e309", "1e1", "+1", "- 1", "--1", "1.", ".5", "-.5", "1.2.3",
        "9" * 16, "1." + "0" * 19, "007", "1,234", "1_0", "0x10", "3 4", "3.5s", "50%", "$3", "1/2",
        "٣", "３", "²", '"3"', "three", "3\u00a0",
    ],
)  # fmt: skip
def test_what_is_not_a_plain_number_is_no_answer(task: str, number: str) -> None:
    answer = parse(f"<answer>{number}</answer>", task, thinking=False)
    assert not answer.format_ok and has_no_answer(answer)


@pytest.mark.parametrize("task", ["ocr", "text"])
def test_a_text_is_whatever_stands_in_the_answer_up_to_the_stated_length(task: str) -> None:
    longest = "é𝟛<b>" * (LONGEST_TEXT // 5)
    assert parse(f"<answer> {longest}\n</answer>", task, thinking=False).text == longest
    longer = parse(f"<answer>{longest}x</answer>", task, thinking=False)
    assert not longer.format_ok and has_no_answer(longer)


@pytest.mark.parametrize("task", ["ocr", "text"])
@pytest.mark.parametrize("tag", ["<think>", "</think>"])
@pytest.mark.parametrize("thinking", [True, False])
def test_a_text_holds_no_tag_of_the_format(task: str, tag: str, thinking: bool) -> None:
    answer = parse(f"<think>x</think><answer>a {tag} b</answer>", task, thinking=thinking)
    assert not answer.format_ok and has_no_answer(answer)


def test_key_order_and_white_space_are_free_as_in_json() -> None:
    text = '<answer>\n{ "end_time" :7 ,\r\n\t"option":"B","start_time"\n: "3.5"}\n</answer>'
    assert parse(text, "gqa", thinking=False) == Answer(True, 1, 3.5, 7.0)


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize(
    "text",
    [
        "<think>" * 500_000,
        "<answer>" * 300_000 + "</answer>" * 300_000,
        "<answer>" + " " * 4_000_000 + "</answer>",
        "<answer>{" + "\n" * 4_000_000 + "}</answer>",
        '<answer>{"start_time"' + " " * 4_000_000 + ":</answer>",
        '<answer>{"start_time": "' + "1" * 4_000_000 + '", "end_time": "2"}</answer>',
        '<answer>{"start_time": "1"' + " " * 2_000_000 + "," + " " * 2_000_000 + "}</answer>",
        "<answer>" + '{"start_time": "1", ' * 200_000 + "</answer>",
        "<answer>" + "[" * 4_000_000 + "</answer>",
        " " * 4_000_000 + "x" + "<answer>B</answer>" + " " * 4_000_000 + "x",
        "<" * 4_000_000,
    ],
    ids=range(11),
)
def test_megabytes_of_text_take_linear_time(task: str, text: str) -> None:
    started = time.process_time()
    answer = parse(text, task, thinking=True)
    assert time.process_time() - started < 2.0  # about 0.02 s; a quadratic scan takes hours
    assert not answer.format_ok


def test_a_long_thought_is_fine() -> None:
    text = "<think>" + "it opens " * 400_000 + "</think>" + GOOD["tvg"]
    assert parse(text, "tvg", thinking=True) == Answer(True, -1, 3.5, 7.0)


# Hostile text is made of the format's own pieces far more often than of random characters.
PIECES = st.one_of(
    st.sampled_from([*TAGS, *GOOD.values(), "{", "}", '"', ":", ",", '"start_time"', '"end_time"']),
    st.sampled_from(['"option"', "B", "3.5", "1e309", "NaN", "-", "\\", " ", "\n", "\x00", "٣"]),
    st.text(max_size=5),
)
TEXTS = st.lists(PIECES, max_size=15).map("".join)


@settings(max_examples=300, deadline=None)
@given(TEXTS, st.sampled_from(TASKS), st.booleans())
def test_any_text_has_an_outcome_with_sane_fields(text: str, task: str, thinking: bool) -> None:
    answer = parse(text, task, thinking=thinking)
    assert -1 <= answer.choice < 26
    for seconds in (answer.start, answer.end):
        assert np.isnan(seconds) or 0 <= seconds < 1e6
    assert np.isnan(answer.start) == np.isnan(answer.end)
    assert np.isnan(answer.start) or task in TIMES
    assert answer.choice == -1 or task in CHOICE
    assert answer.text is None or task in TEXT
    if answer.format_ok:
        assert not has_no_answer(answer)
        assert [text.count(tag) for tag in TAGS] == [int(thinking)] * 2 + [1] * 2


@settings(max_examples=200, deadline=None)
@given(
    st.text(st.characters(exclude_characters="<")),
    st.floats(0, 1e5),
    st.floats(0, 1e5),
    st.integers(0, 25),
)
def test_what_is_written_by_the_rules_is_read_back(
    thought: str, start: float, end: float, choice: int
) -> None:
    times = f'"start_time": "{start:.6f}", "end_time": {end:.2f}'
    content = f'{{"option": "{chr(65 + choice)}", {times}}}'
    answer = parse(f"<think>{thought}</think><answer>{content}</answer>", "gqa", thinking=True)
    assert answer == Answer(True, choice, round(start, 6), round(end, 2))


def test_an_unknown_task_is_a_mistake_of_the_caller() -> None:
    with pytest.raises(RewardError, match="task: expected one of mcqa, tvg, .*, found 'vqa'"):
        parse("", "vqa", thinking=True)


def test_importing_the_parser_does_not_import_jax() -> None:
    check = "import sys, rewards, rewards.parse; sys.exit('jax' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0
