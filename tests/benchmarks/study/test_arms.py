"""What the study compares is sound before anything runs."""

from __future__ import annotations

import pytest

from benchmarks.study.arms import ARMS, CLAIMS, FEW, SUBSET, TASKS, Claim
from benchmarks.study.report import SCORES


def test_every_arm_has_a_name_of_its_own() -> None:
    assert len({arm.name for arm in ARMS}) == len(ARMS)


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: f"{claim.better}-{claim.worse}")
def test_claims_are_about_arms_and_scores_that_exist(claim: Claim) -> None:
    assert {claim.better, claim.worse} <= {arm.name for arm in ARMS}
    assert set(claim.scores) <= set(SCORES)


def test_small_arms_can_hold_equally_many_items_of_each_task() -> None:
    assert FEW % len(TASKS) == SUBSET % len(TASKS) == 0
