"""Scores that compare strings, against slow and obvious ones."""

from __future__ import annotations

import concurrent.futures
import functools
import random
from collections import Counter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.written import number_match, text_score, transcript_score


@pytest.mark.parametrize(
    ("answer", "truth", "equal"),
    [
        ("3", "3.00", 1),
        ("3.14", "3.141", 1),
        ("3.15", "3.14", 0),
        ("-0.001", "0", 1),
        ("-3", "3", 0),
        ("999999999999999.99", "999999999999999.98", 0),  # float64 tells these apart, float32 not
        ("2.675", "2.68", 1),  # half to even, in decimal: the float64 2.675 lies below
        ("2.665", "2.66", 1),
        ("0." + "9" * 18, "1", 1),
    ],
)
def test_numbers_agree_to_two_decimals_exactly(answer: str, truth: str, equal: float) -> None:
    assert number_match(answer, truth) == number_match(truth, answer) == equal


def edit_distance(a: tuple[str, ...], b: tuple[str, ...]) -> int:
    @functools.cache
    def between(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return i + j
        replaced = between(i - 1, j - 1) + (a[i - 1] != b[j - 1])
        return min(replaced, between(i - 1, j) + 1, between(i, j - 1) + 1)

    return between(len(a), len(b))


WORDS = st.lists(st.sampled_from(["a", "A", "bb", "c."]), max_size=8)


@settings(max_examples=200, deadline=None)
@given(WORDS, WORDS.filter(bool))
def test_the_transcript_score_is_one_minus_the_word_error_rate(
    answer: list[str], truth: list[str]
) -> None:
    expected = max(0.0, 1 - edit_distance(tuple(answer), tuple(truth)) / len(truth))
    assert transcript_score(" ".join(answer), "\n".join(truth)) == pytest.approx(expected)


def test_transcripts_by_hand() -> None:
    assert transcript_score("stop the sign", "stop at the sign") == 0.75
    assert transcript_score("stop at the sign", "stop at the sign") == 1
    assert transcript_score("Stop", "stop") == 0
    assert transcript_score("a b c d e", "a") == 0  # an error rate of 4


def f_measure(overlap: int, answered: int, true: int) -> float:
    return 2 * overlap / (answered + true) if overlap else 0.0


def rouge(answer: list[str], truth: list[str]) -> float:
    """The mean of ROUGE-1, -2 and -L of words that have no other stem than themselves."""
    scores = []
    for n in (1, 2):
        grams = [
            Counter(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
            for words in (answer, truth)
        ]
        sizes = [sum(counts.values()) for counts in grams]
        if n == 1 or len(truth) > 1:
            scores.append(f_measure((grams[0] & grams[1]).total(), *sizes))

    @functools.cache
    def longest(i: int, j: int) -> int:
        if i == 0 or j == 0:
            return 0
        if answer[i - 1] == truth[j - 1]:
            return longest(i - 1, j - 1) + 1
        return max(longest(i - 1, j), longest(i, j - 1))

    scores.append(f_measure(longest(len(answer), len(truth)), len(answer), len(truth)))
    return sum(scores) / len(scores)


def test_the_text_score_is_the_mean_of_three_rouges() -> None:
    rng = random.Random(0)
    for _ in range(100):
        answer = rng.choices(["cat", "dog", "mat", "7"], k=rng.randint(0, 7))
        truth = rng.choices(["cat", "dog", "mat", "7"], k=rng.randint(1, 7))
        expected = rouge(answer, truth)
        assert text_score(" ".join(answer), " ".join(truth)) == pytest.approx(expected)


def test_texts_by_hand() -> None:
    assert text_score("The doors OPENED!", "the door opens") == 1  # stems, case, punctuation
    assert text_score("Yes", "yes") == 1  # one word has no pair: ROUGE-1 and ROUGE-L
    assert text_score("a dog", "the cat") == 0
    assert text_score("\u3053", "yes") == 0  # nothing that ROUGE reads
    # 2 of 3 words, 1 of 2 pairs, a common subsequence of 2
    assert text_score("the cat sat", "the cat ran") == pytest.approx((2 / 3 + 1 / 2 + 2 / 3) / 3)


def test_scores_are_the_same_from_many_threads() -> None:
    rng = random.Random(1)
    words = ["running", "ran", "doors", "door", "opened", "opening", "flies", "happily"]
    pairs = [[" ".join(rng.choices(words, k=12)) for _ in range(2)] for _ in range(200)]
    expected = [text_score(*pair) for pair in pairs]
    with concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert list(pool.map(lambda pair: text_score(*pair), pairs)) == expected
