"""Scores that compare strings, on the host: numbers to two decimals, transcripts, free text.

Sources: the answer rewards of Video-R1 (arXiv 2503.21776, and its released script).
Answers are read by `rewards.parse`, so they have at most `LONGEST_TEXT` characters: the word error
rate takes time in the product of the two lengths, ROUGE-L too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from decimal import Decimal
from typing import Any, Final

import numpy as np


def number_match(answer: str, truth: str) -> float:
    """1 if two decimal numbers are equal once rounded to two decimals (half to even), else 0.

    Exact, by decimal arithmetic: "3.1" and "3.104" agree, "0.125" and "0.12" too.
    """
    return float(round(Decimal(answer), 2) == round(Decimal(truth), 2))


def transcript_score(answer: str, truth: str) -> float:
    """1 - word error rate, at least 0: words are what white space parts, and case counts.

    The word error rate is the least number of words inserted, removed and replaced that turns
    `truth` into `answer`, divided by the words of `truth`.

        truth "stop at the sign", answer "stop the sign" -> 1 - 1/4
    """
    words, true_words = answer.split(), truth.split()
    number = {word: i for i, word in enumerate({*words, *true_words})}
    answered = np.array([number[word] for word in words], np.int32)
    steps = np.arange(len(words) + 1)
    row = steps  # distances from no true words
    for i, word in enumerate(true_words, start=1):
        # Replaced or removed, column by column; then inserted: a running minimum along the row.
        best = np.empty_like(row)
        best[0] = i
        np.minimum(row[:-1] + (answered != number[word]), row[1:] + 1, out=best[1:])
        row = np.minimum.accumulate(best - steps) + steps
    return max(0.0, 1.0 - int(row[-1]) / max(len(true_words), 1))


def text_score(answer: str, truth: str) -> float:
    """The mean F-measure of ROUGE-1, ROUGE-2 and ROUGE-L, of stemmed words, in [0, 1].

    ROUGE of the `rouge_score` package: lower case, runs of ASCII letters and digits, Porter stems.
    A truth of one word has no pairs of words: there it is the mean of ROUGE-1 and ROUGE-L, so that
    repeating the truth earns 1.
    """
    kinds = ["rouge1", "rouge2", "rougeL"]
    if len(_tokens(truth)) == 1:
        kinds.remove("rouge2")
    scores = _scorer(tuple(kinds)).score(truth, answer)
    return float(np.mean([scores[kind].fmeasure for kind in kinds]))


SCORES: Final[dict[str, Callable[[str, str], float]]] = {
    "number": number_match,
    "ocr": transcript_score,
    "text": text_score,
}


class _Tokenizer:
    """The package's own tokeniser with its stems remembered, which are most of its time."""

    def __init__(self) -> None:
        from nltk.stem import porter  # not above: a second of imports that few runs need
        from rouge_score import tokenize

        self.stem = functools.lru_cache(1 << 16)(porter.PorterStemmer().stem)
        self._tokenize = tokenize.tokenize

    def tokenize(self, text: str) -> list[str]:
        tokens: list[str] = self._tokenize(text, self)  # all that it asks of a stemmer is `stem`
        return tokens


@functools.cache
def _tokenizer() -> _Tokenizer:
    return _Tokenizer()


@functools.lru_cache(1 << 12)
def _tokens(text: str) -> tuple[str, ...]:
    return tuple(_tokenizer().tokenize(text))


@functools.cache
def _scorer(kinds: tuple[str, ...]) -> Any:
    from rouge_score import rouge_scorer

    return rouge_scorer.RougeScorer(list(kinds), tokenizer=_tokenizer())
