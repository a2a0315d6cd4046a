"""Throws a million completions at the parser and the rewards, and counts how many a core scores.

    python -m benchmarks.rewards --completions 1000000 --seed 0 --out benchmarks/rewards.json

Completions are well formed, damaged, or adversarial: an RL policy finds every hole. Nothing may
raise, every score must be finite and within its stated bounds, under every option, and a component
is there exactly where the task has it. Then typical completions of 60 to 200 tokens are timed, in
CPU time: parse, arrays, and the jitted reward.

Exit code 0: all hold; 1: they do not.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import platform
import random
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from data.prompts import target_text
from data.records import CHOICE_TASKS, SPAN_TASKS, TAGS, TASKS, Record
from rewards.dual import bounds
from rewards.options import LengthBand, Overlong, RewardOptions
from rewards.reward import Reward
from rewards.weights import RewardWeights

PROMPTS, GROUP = 224, 8  # of a batch
WEIGHTS = RewardWeights(0.5, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0)
OPTIONS = (
    RewardOptions(),
    RewardOptions("giou", LengthBand(0.25, 10, 100), Overlong(1.0, 50, 200)),
    RewardOptions("tiou", LengthBand(0.25, 10, 100, right=0.1)),
)
ANSWERS = {
    "mcqa": "B",
    "gqa": "B",
    "number": "-3.50",
    "regression": "10",
    "ocr": "Stop at the sign",
    "text": "She opens the door.",
}
NUMBERS = (
    "NaN", "nan", "inf", "-Infinity", "1e309", "1e1", "-3.5", "+2", "-0", "٣.٥", "３", "07", ".5",
    "5.", "1_0", "3.5s", "1.2.3", "0x10", "null", "true", "999999", "1000000", "1000001", "50%",
    "1,234", "{}", "B", "9" * 400, "0." + "0" * 17 + "1", "9" * 15 + "." + "9" * 18, "", " 3.5 ",
    "\\u0033",
)  # fmt: skip
TALK = (
    "the person walks to a red door and opens it before sitting down on the chair near the window "
    "then looks at the camera while the video shows the first second where the event starts"
)
MEGABYTES = 1 << 20


def record(task: str, spans: tuple[tuple[float, float], ...] = ((2.0, 4.0), (6.0, 10.0))) -> Record:
    """A question of a task; its right answers are those of `ANSWERS` and `spans`."""
    return Record(
        id=f"{task}-0",
        video="a.mp4",
        task=task,
        question="What?",
        options=("red", "green", "blue", "white") if task in CHOICE_TASKS else (),
        answer=ANSWERS.get(task),
        spans=spans if task in SPAN_TASKS else (),
        duration=30.0,
    )


class Completions:
    """Completions of every kind, drawn with a seed."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def draw(self, task: str, thinking: bool) -> str:
        """Well formed in about half of the cases."""
        kind = self.rng.random()
        if kind < 0.0001:
            return self._huge()
        text = self._well_formed(task if kind < 0.97 else self.rng.choice(TASKS), thinking)
        while self.rng.random() < 0.35:
            text = self._damaged(text)
        return text

    def _well_formed(self, task: str, thinking: bool) -> str:
        answer = f"<answer>{self._content(task)}</answer>"
        if thinking == (self.rng.random() < 0.02):
            return answer
        thought = self.rng.choice(["", "It opens.", "<b>", "x\n" * 50, "<answer", "\x00٣ 𝟛"])
        return f"<think>{thought}</think>" + self.rng.choice(["", " ", "\n"]) + answer

    def _content(self, task: str) -> str:
        if task == "mcqa":
            return self._letter()
        if task in ("number", "regression"):
            return self._number("-") if self.rng.random() < 0.3 else self._number("")
        if task in ("ocr", "text"):
            words = ANSWERS[task].split()
            return " ".join(self.rng.choices([*words, "a", "é", "<b>"], k=self.rng.randint(0, 6)))
        keys = ("start_time", "end_time")
        members = [f'"{key}": {self._quoted(self._number(""))}' for key in keys]
        if task == "gqa":
            members.append(f'"option": "{self._letter()}"')
        damage = self.rng.random()
        if damage < 0.05:
            extra = ['"note": "x"', '"end_time": "9"', "", '"option": "B"', '"start_time": "0"']
            members.append(self.rng.choice(extra))
        elif damage < 0.08:
            members.pop()
        elif damage < 0.3:
            self.rng.shuffle(members)
        return "{" + self.rng.choice([", "] * 9 + [" "]).join(members) + "}"

    def _number(self, sign: str) -> str:
        kind = self.rng.random()
        if kind < 0.2:
            return f"{sign}3.50" if kind < 0.1 else self.rng.choice(NUMBERS)
        return f"{sign}{self.rng.uniform(0, 30):.{self.rng.randint(0, 3)}f}"

    def _quoted(self, value: str) -> str:
        return value if self.rng.random() < 0.2 else f'"{value}"'

    def _letter(self) -> str:
        if self.rng.random() < 0.9:
            return self.rng.choice("ABCD")
        return self.rng.choice(["b", "(B)", "B.", "Z", "Ｂ", "", "AB", "\\u0042", "blue", "7"])

    def _damaged(self, text: str) -> str:
        at = self.rng.randrange(len(text) + 1)
        match self.rng.randrange(5):
            case 0:
                hostile = [*TAGS, "<answer>B</answer>", "x", "\u00a0", "\ud800", "{", '"', "\x00"]
                return text[:at] + self.rng.choice(hostile) + text[at:]
            case 1:
                return text[:at] + text[at + self.rng.randrange(12) :]
            case 2:
                return text[:at] + text[max(at - 20, 0) :]
            case 3:
                return text[:at]
            case _:
                return text[at:] + text[:at]

    def _huge(self) -> str:
        pieces = [*TAGS, "<", " ", "\n", "9", "[", '{"start_time": "1", ', "a b ", "<answer>B"]
        body = self.rng.choice(pieces)
        body *= MEGABYTES // len(body)
        framed = [body, f"<answer>{body}</answer>", f"<think>{body}</think><answer>B</answer>"]
        return self.rng.choice(framed)


class Outcome(NamedTuple):
    """What a fuzzed share of completions earned."""

    completions: int
    problems: list[str]
    formats: dict[str, float]  # by task, the share that is well formed
    answers: dict[str, float]  # by task, the share that earns more than the format


def fuzz(count: int, seed: int) -> Outcome:
    """Scores at least `count` completions and checks every score."""
    problems: list[str] = []
    formats = collections.defaultdict[str, list[float]](list)
    answers = collections.defaultdict[str, list[float]](list)
    draw = Completions(seed)
    tasks = [TASKS[p % len(TASKS)] for p in range(PROMPTS)]
    records = [record(task) for task in tasks]
    rewards = [Reward(WEIGHTS, x, thinking=thinking) for x in OPTIONS for thinking in (True, False)]
    programs = [jax.jit(reward.score) for reward in rewards]
    scored = 0
    while scored < count:
        number = scored // (PROMPTS * GROUP) % len(rewards)
        reward = rewards[number]
        texts = [[draw.draw(task, reward.thinking) for _ in range(GROUP)] for task in tasks]
        lengths = np.array([[draw.rng.randrange(300) for _ in row] for row in texts])
        scored += PROMPTS * GROUP
        read = reward.read(texts, records, lengths)
        total, parts = jax.device_get(programs[number](read, reward.truth(records, 2)))
        problems += broken(tasks, total, parts, reward)
        for task, row, form in zip(tasks, total, parts["format"], strict=True):
            formats[task] += form.tolist()
            answers[task] += (row > WEIGHTS.format * form + reward.options.length.weight).tolist()
    return Outcome(
        scored,
        problems,
        {task: float(np.mean(found)) for task, found in formats.items()},
        {task: float(np.mean(found)) for task, found in answers.items()},
    )


def broken(
    tasks: list[str], total: np.ndarray, parts: dict[str, np.ndarray], reward: Reward
) -> list[str]:
    """What is wrong with the scores of a batch: totals out of bounds, components out of place."""
    found = []
    for p, task in enumerate(tasks):
        low, high = bounds(task, reward.weights, reward.options)
        if not (np.isfinite(total[p]) & (total[p] >= low - 1e-5) & (total[p] <= high + 1e-5)).all():
            found.append(f"{task}: a total of {total[p]}, beyond [{low}, {high}]")
    has = {"format": TASKS, "choice": CHOICE_TASKS} | dict.fromkeys(("iou", "temporal"), SPAN_TASKS)
    has |= dict.fromkeys(("length", "overlong"), TASKS)
    for name, values in parts.items():
        here = np.array([task in has.get(name, (name,)) for task in tasks])
        low, high = (-1, 0) if name == "overlong" else (0, 1)
        if not ((values[here] >= low) & (values[here] <= high)).all():
            found.append(f"{name}: beyond [{low}, {high}]")
        if not np.isnan(values[~here]).all():
            found.append(f"{name}: scored in a task that does not have it")
    return found


def typical(task: str, rng: random.Random) -> tuple[str, int]:
    """A well-formed completion of 60 to 200 tokens, of four characters each, and its tokens."""
    tokens = rng.randint(60, 200)
    words: list[str] = []
    while sum(map(len, words)) + len(words) < 4 * tokens - 70:
        words.append(rng.choice(TALK.split()))
    start = rng.uniform(0, 20)
    right = record(task, ((start, start + rng.uniform(1, 9)),))
    answer = target_text(right, thinking=False)
    return f"<think>{' '.join(words)}</think>\n{answer}", tokens


def speed(task: str, batches: Iterator[int]) -> float:
    """Completions a second of one core (CPU time, threads included), from text to reward."""
    rng = random.Random(0)
    reward = Reward(WEIGHTS, thinking=True)
    program = jax.jit(reward.score)
    records = [record(task)] * PROMPTS
    said = [[typical(task, rng) for _ in range(GROUP)] for _ in range(PROMPTS)]
    texts = [[text for text, _ in row] for row in said]
    lengths = np.array([[tokens for _, tokens in row] for row in said])

    def score() -> None:
        jax.block_until_ready(
            program(reward.read(texts, records, lengths), reward.truth(records, 2))
        )

    score()
    started, count = time.process_time(), 0
    for _ in batches:
        score()
        count += PROMPTS * GROUP
    return count / (time.process_time() - started)


def main() -> int:
    """See the top of the module."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--completions", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, help="where to write the result as JSON")
    options = parser.parse_args()
    outcome = fuzz(options.completions, options.seed)
    result: dict[str, Any] = {
        "command": f"python -m benchmarks.rewards --completions {options.completions} "
        f"--seed {options.seed}",
        "jax": jax.__version__,
        "python": platform.python_version(),
        "cores": os.cpu_count(),
        "completions": outcome.completions,
        "problems": outcome.problems[:20],
        "share well formed": {k: round(v, 3) for k, v in outcome.formats.items()},
        "share that earns more": {k: round(v, 3) for k, v in outcome.answers.items()},
        "completions per second of a core": {
            task: round(speed(task, iter(range(20)))) for task in TASKS
        },
    }
    if options.out:
        options.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))
    return int(bool(outcome.problems))


if __name__ == "__main__":
    sys.exit(main())
