"""What the right answers earn, under several rewards."""

from __future__ import annotations

import dataclasses

import pytest

from data.records import Record
from jaxgrpo import config
from jaxgrpo.inspection.right_answers import RightAnswers, score_targets, write_targets
from jaxgrpo.load import open_processor
from jaxgrpo.scoring import open_reward
from rewards.parse import RewardError
from tests.jaxgrpo.tiny_run import TINY

WHEN = Record("when", "a.mp4", "tvg", "When?", (), None, ((2.0, 6.0),), 9.0)
WHICH = Record("which", "a.mp4", "mcqa", "Which?", ("red", "blue"), "B", (), 9.0)


def scored(*records: Record, **sections: object) -> RightAnswers:
    raw = {"run_dir": "r", "model": {"path": str(TINY), "init": "random"}, "data": {"train": "t"}}
    settings = config.from_dict(raw | sections)
    targets = write_targets(records, open_processor(settings), settings.data.thinking)
    return score_targets(records, targets, open_reward(settings))


def test_the_right_answer_earns_the_most_but_where_one_answer_cannot() -> None:
    rounded = dataclasses.replace(WHEN, id="rounded", spans=((1.23456, 3.21987),))
    two = dataclasses.replace(WHEN, id="two", spans=((0.0, 1.0), (3.0, 4.0)))
    answers = scored(WHEN, WHICH, rounded, two)
    [short] = answers.short
    assert short.id == "two" and short.most == 1.0
    assert short.reward == pytest.approx(0.5 + 0.5 * 0.5)
    assert short.components == pytest.approx({"format": 1.0, "iou": 0.5})
    assert answers.reward == pytest.approx(3.75 / 4, abs=1e-3) and answers.empty == 0.0
    assert answers.too_long == {} and answers.unwritten == {}


def test_a_bonus_for_length_is_not_asked_of_the_right_answer() -> None:
    answers = scored(WHEN, reward={"length": {"weight": 0.2, "min": 320, "max": 512}})
    assert answers.short == () and answers.reward == pytest.approx(1.0)
    always = scored(WHEN, reward={"length": {"weight": 0.2, "min": 1, "max": 512}})
    assert always.reward == pytest.approx(1.0)


def test_a_penalty_for_length_is_asked_of_it() -> None:
    limits = {"overlong": {"weight": 1.0, "cache": 99}}  # it grows from 1 to 100
    [short] = scored(WHEN, reward=limits, rollout={"max_new_tokens": 100}).short
    assert short.components["overlong"] < 0
    assert short.reward == pytest.approx(1.0 + short.components["overlong"])


def test_an_answer_longer_than_a_completion_can_be_is_named() -> None:
    answers = scored(WHEN, WHICH, rollout={"max_new_tokens": 10})
    assert answers.limit == 10 and list(answers.too_long) == ["when", "which"]
    length = answers.too_long["which"]
    assert answers.too_long["when"] > length > 10
    answers = scored(WHEN, WHICH, rollout={"max_new_tokens": length})
    assert list(answers.too_long) == ["when"]


def test_a_record_without_a_right_completion_says_why() -> None:
    tagged = dataclasses.replace(WHEN, rationale="So </think> it is.")
    stopped = dataclasses.replace(WHICH, rationale="So <|im_end|> it is.")
    answers = scored(tagged, stopped)
    assert "the rationale holds '</think>'" in answers.unwritten["when"]
    assert "must not spell a stop token" in answers.unwritten["which"]
    assert answers.short == ()


def test_what_training_refuses_to_score_is_refused() -> None:
    unknown = dataclasses.replace(WHEN, duration=None)
    with pytest.raises(RewardError, match="needs the length of its video"):
        scored(unknown, reward={"temporal": "tiou"})
