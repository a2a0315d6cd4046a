"""Options lose their letters; an answer means exactly one of them."""

from __future__ import annotations

import pytest

from data.convert.choices import letter, options
from data.convert.conversion import Rejection


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["A. red", "B. blue"], ("red", "blue")),
        (["(A) red", " (B) blue "], ("red", "blue")),
        (["A) red", "B) blue", "C) green"], ("red", "blue", "green")),
        (["A: red", "B.blue"], ("red", "blue")),
        (["red", " blue"], ("red", "blue")),
        (["U.S.", "U.K."], ("U.S.", "U.K.")),
        (["A.M.", "P.M."], ("A.M.", "P.M.")),
    ],
)
def test_letters_in_order_are_removed(given: list[str], expected: tuple[str, ...]) -> None:
    assert options({"x": given}, "x", labelled=True) == expected


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["B. red", "A. blue"], "letters A, B, C, ... in order"),
        (["A. red", "blue"], "letters A, B, C, ... in order"),
        (["A. red"], "2 to 26 options"),
        ([f"option {i}" for i in range(27)], "2 to 26 options"),
        ([], "2 to 26 options"),
        (["red", ""], "a list of texts"),
        (["red", 3], "a list of texts"),
        ("red, blue", "a list of texts"),
        (None, "a list of texts"),
    ],
)
def test_options_that_cannot_be_are_rejected(given: object, expected: str) -> None:
    with pytest.raises(Rejection, match=expected):
        options({"x": given}, "x", labelled=True)


def test_where_options_have_no_letters_an_initial_is_text() -> None:
    given = {"x": ["B. Obama", "A. Merkel"]}
    assert options(given, "x", labelled=False) == ("B. Obama", "A. Merkel")


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("B", ("red", "blue"), "B"),
        ("(B)", ("red", "blue"), "B"),
        ("b.", ("red", "blue"), "B"),
        ("B. blue", ("red", "blue"), "B"),
        ("B) Blue.", ("red", "blue"), "B"),
        ("blue", ("red", "blue"), "B"),
        ("B", ("B", "A"), "B"),  # a letter before a text
    ],
)
def test_an_answer_by_letter(answer: str, choices: tuple[str, ...], expected: str) -> None:
    assert letter(answer, choices, "answer", given="letter") == expected


@pytest.mark.parametrize(
    ("answer", "choices", "expected"),
    [
        ("blue", ("red", "blue"), "B"),
        (" The  Blue one. ", ("red", "the blue one"), "B"),
        ("Blue", ("blue", "Blue"), "B"),  # equal before alike
        ("B", ("B", "A"), "A"),
        ("3", ("2", "3"), "B"),
    ],
)
def test_an_answer_by_text(answer: str, choices: tuple[str, ...], expected: str) -> None:
    assert letter(answer, choices, "answer", given="text") == expected


@pytest.mark.parametrize(
    ("answer", "given", "expected"),
    [
        ("C", "letter", "none of the options"),
        ("A, B", "letter", "none of the options"),
        ("A. blue", "letter", "none of the options"),
        ("A", "text", "none of the options"),
        ("bl", "text", "none of the options"),
        ("BLUE", "text", "several of the options"),
        (None, "letter", "expected a text"),
        (1, "letter", "expected a text"),
    ],
)
def test_an_answer_that_is_not_one_option_is_rejected(
    answer: object, given: str, expected: str
) -> None:
    with pytest.raises(Rejection, match=expected):
        letter(
            answer, ("red", "blue", "Blue")[: 2 if given == "letter" else 3], "answer", given=given
        )
