"""A user's own reward: found by its import path, checked on samples, never trusted in silence.

A **host** function is called once a step, and on each process with its completions:

    def my_reward(completions: Sequence[Completion]) -> Sequence[float]

one finite number within [low, high] for each of them, in their order. A **jitted** function is
traced once and becomes part of the compiled program that scores a step on all devices:

    def my_reward(answers: Answers, truth: Truth) -> jax.Array

f32[P, G], finite and within [low, high], of P prompts and G completions. Both are pure: the same
input gives the same result, on every host and after a restart.
"""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Callable, Sequence
from types import ModuleType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from data.prompts import target_text
from data.records import CHOICE_TASKS, NUMBER_TASKS, SPAN_TASKS, TASKS, Record
from rewards.answers import Answers, read_answers
from rewards.dual import Truth, truth_arrays
from rewards.options import Custom
from rewards.parse import Answer, RewardError, parse


class Completion(NamedTuple):
    """What a host function is told of a completion."""

    text: str
    record: Record  # the question, and its right answer
    answer: Answer  # what the parser read
    tokens: int  # with the stop token


class CustomReward:
    """A user's function, loaded and checked. Calls that break the contract raise `RewardError`."""

    def __init__(self, spec: Custom, *, thinking: bool):
        """Imports the function and tries it on completions of every task.

        Raises:
          RewardError: there is no such function, or it does not keep the contract; names it, what
            came back and what was expected.
        """
        self.spec = spec
        self._thinking = thinking
        self._function = _load(spec)
        self._try()

    def on_host(
        self, texts: Sequence[Sequence[str]], records: Sequence[Record], lengths: np.ndarray
    ) -> np.ndarray:
        """f32[P, G] from completions `texts[P][G]` of `lengths` i32[P, G] tokens; host only."""
        completions = tuple(  # not a list: sorted in place, it would reward the wrong ones
            Completion(text, record, parse(text, record.task, thinking=self._thinking), int(tokens))
            for row, record, row_lengths in zip(texts, records, lengths, strict=True)
            for text, tokens in zip(row, row_lengths, strict=True)
        )
        found = self._call(completions)
        expected = f"{len(completions)} numbers, one for each completion"
        try:
            is_text = np.asarray(found).dtype.kind in "SU"  # which NumPy would read as numbers
            values = np.asarray(found, np.float32)
        except (TypeError, ValueError, OverflowError) as error:
            raise self._broken(f"returned {_short(found)}", expected) from error
        if is_text or values.shape != (len(completions),):
            raise self._broken(f"returned {_short(found)}", expected)
        wrong = np.flatnonzero(~self._allowed(values))
        if len(wrong):
            first = completions[wrong[0]]
            raise self._broken(
                f"returned {values[wrong[0]]} for a completion of record {first.record.id!r}, "
                f"{_short(first.text)}",
                self._range,
            )
        return values.reshape(np.shape(lengths))

    def on_device(self, answers: Answers, truth: Truth) -> jax.Array:
        """f32[P, G], to be traced; jitted only. Values are checked by `check`."""
        found = self._call(answers, truth)
        shape = np.shape(answers.format_ok)
        expected = f"a float32 array of shape {shape}"
        if not isinstance(found, jax.Array):
            raise self._broken(f"returned {_short(found)}", expected)
        if found.shape != shape or found.dtype != jnp.float32:
            raise self._broken(f"returned {found.dtype} of shape {found.shape}", expected)
        return found

    def check(self, values: np.ndarray) -> None:
        """Raises `RewardError` unless all values, f32[P, G], are finite and within the bounds."""
        wrong = values[~self._allowed(values)]
        if len(wrong):
            raise self._broken(f"returned {wrong[0]} in {len(wrong)} of {values.size}", self._range)

    @property
    def _range(self) -> str:
        return f"finite numbers from {self.spec.low} to {self.spec.high} (low and high)"

    def _allowed(self, values: np.ndarray) -> np.ndarray:
        low, high = np.float32(self.spec.low), np.float32(self.spec.high)
        return np.isfinite(values) & (values >= low) & (values <= high)

    def _call(self, *arguments: Any) -> Any:
        try:
            return self._function(*arguments)
        except (Exception, SystemExit) as error:  # whatever a user's code raises
            raise self._broken(
                f"raised {type(error).__name__}: {error}", "a result for any completion"
            ) from error

    def _broken(self, found: str, expected: str) -> RewardError:
        return RewardError(
            f"reward.custom.function {self.spec.function} (kind {self.spec.kind}) {found}; "
            f"expected {expected}."
        )

    def _try(self) -> None:
        """Calls it twice on a right and an empty completion of every task."""
        records = [_sample(task) for task in TASKS]
        texts = [[target_text(record, self._thinking), ""] for record in records]
        lengths = np.tile(np.array([20, 1], np.int32), (len(TASKS), 1))
        if self.spec.kind == "host":
            results = [self.on_host(texts, records, lengths) for _ in range(2)]
        else:
            answers = read_answers(texts, records, lengths, thinking=self._thinking)
            truth = truth_arrays(records, max_spans=2)
            results = [
                np.asarray(jax.jit(lambda a, t: self.on_device(a, t))(answers, truth))
                for _ in range(2)
            ]
            self.check(results[0])
        if not np.array_equal(results[0], results[1]):
            raise self._broken(
                "returned other numbers when it was called again", "the same for the same input"
            )


def _load(spec: Custom) -> Callable[..., Any]:
    folder = os.path.abspath(os.path.expanduser(spec.folder))
    if folder not in sys.path:
        sys.path.append(folder)  # last: a user's json.py must not become everyone's
    name, _, function = spec.function.partition(":")
    try:
        module = importlib.import_module(name)
    except (Exception, SystemExit) as error:  # importing runs the user's code
        raise RewardError(
            f"reward.custom.function {spec.function}: importing {name!r} raised "
            f"{type(error).__name__}: {error}. Its folder is looked for in reward.custom.folder "
            f"({folder}), after everything that is installed."
        ) from error
    found = vars(module).get(function)
    if not callable(found):
        raise RewardError(
            f"reward.custom.function {spec.function}: expected a function {function!r} in "
            f"{_place(module)}, found {'none' if found is None else _short(found)}. If that is "
            "not your module, rename yours."
        )
    return found


def _place(module: ModuleType) -> str:
    return module.__file__ or f"the package {module.__name__!r}"


def _sample(task: str) -> Record:
    answers = {"ocr": "Stop here", "text": "She opens the door."}
    answers |= dict.fromkeys(CHOICE_TASKS, "B") | dict.fromkeys(NUMBER_TASKS, "3.50")
    return Record(
        id=f"sample-{task}",
        video="sample.mp4",
        task=task,
        question="What happens?",
        options=("red", "blue") if task in CHOICE_TASKS else (),
        answer=answers.get(task),
        spans=((1.0, 2.5),) if task in SPAN_TASKS else (),
        duration=10.0,
    )


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
