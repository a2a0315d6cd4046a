"""The step plan: a pure function of (seed, step) that gives every item its turn."""

from __future__ import annotations

import pickle
from collections import Counter
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from data.sampling import OnePass, PlanError, StepPlan, permutation

PERMUTATION = [3, 2, 4, 6, 5, 7, 1, 0]
STEPS = [[9, 8, 6], [0, 2, 1], [4, 3, 1], [5, 7, 10], [11, 5, 6], [3, 0, 4]]
WEIGHTED = [[9, 5, 8], [1, 0, 1], [6, 7, 10], [11, 5, 6], [3, 1, 0], [11, 5, 7]]

sizes = st.lists(st.integers(0, 40), min_size=1, max_size=4).filter(any)


def plan_of(sizes: list[int], prompts: int, seed: int = 0) -> StepPlan:
    """Buckets of these sizes; item numbers are not their places."""
    starts = np.cumsum([0, *sizes])
    buckets = [range(100 + a, 100 + b) for a, b in pairwise(starts)]
    return StepPlan(buckets, prompts, seed)


@given(sizes, st.integers(1, 9), st.integers(0, 2**40), st.integers(0, 10_000))
def test_a_step_holds_items_of_its_bucket_only(
    sizes: list[int], prompts: int, seed: int, step: int
) -> None:
    plan = plan_of(sizes, prompts, seed)
    bucket, items = plan.step(step)
    assert len(items) == prompts
    assert set(items) <= set(plan.buckets[bucket])


@given(sizes, st.integers(1, 9), st.integers(0, 5))
def test_after_every_epoch_every_item_was_seen_that_often_and_at_most_once_more(
    sizes: list[int], prompts: int, seed: int
) -> None:
    plan = plan_of(sizes, prompts, seed)
    seen: Counter[int] = Counter()
    for epoch in range(3):
        for step in range(plan.first_step(epoch), plan.first_step(epoch + 1)):
            assert plan.epoch(step) == epoch
            seen.update(plan.step(step).items)
        for items in plan.buckets:
            surplus = [seen[item] - (epoch + 1) for item in items]
            # At most one step of the bucket reaches into its next epochs.
            assert all(0 <= more <= -(-prompts // len(items)) for more in surplus)
            assert sum(surplus) < prompts


@given(st.integers(1, 9), st.integers(0, 30), st.integers(0, 5))
def test_a_bucket_is_a_sequence_of_whole_permutations(prompts: int, more: int, seed: int) -> None:
    size = prompts + more
    plan = plan_of([size], prompts, seed)
    drawn = [item for step in range(3 * size) for item in plan.step(step).items]
    epochs = [drawn[i : i + size] for i in range(0, len(drawn), size)]
    assert all(sorted(epoch) == list(plan.buckets[0]) for epoch in epochs)
    if size > 8:
        assert len({tuple(epoch) for epoch in epochs}) == len(epochs)


@given(st.integers(1, 9), st.integers(0, 20), st.integers(0, 5))
def test_a_step_across_two_epochs_holds_no_item_twice(prompts: int, more: int, seed: int) -> None:
    plan = plan_of([2 * prompts - 1 + more], prompts, seed)
    for step in range(120):
        assert len(set(plan.step(step).items)) == prompts


def test_a_bucket_smaller_than_a_step_repeats_its_items() -> None:
    plan = plan_of([3], prompts=8)
    assert set(Counter(plan.step(0).items).values()) <= {2, 3}


def test_a_step_does_not_depend_on_what_was_asked_before() -> None:
    plan = plan_of([30, 7, 12], 4, seed=3)
    forward = [plan.step(step) for step in range(60)]
    fresh = pickle.loads(pickle.dumps(plan_of([30, 7, 12], 4, seed=3)))
    assert [fresh.step(step) for step in reversed(range(60))] == forward[::-1]


def test_another_seed_is_another_plan() -> None:
    plans = [[plan_of([30, 20], 4, seed).step(step) for step in range(5)] for seed in range(5)]
    assert len({str(plan) for plan in plans}) == 5


def test_buckets_take_turns_at_random_in_proportion_to_their_sizes() -> None:
    plan = plan_of([80, 0, 240], prompts=4)
    buckets = [plan.step(step).bucket for step in range(plan.first_step(1))]
    assert Counter(buckets) == {0: 20, 2: 60}
    changes = sum(a != b for a, b in pairwise(buckets))
    assert 15 < changes < 40  # 30 expected of a random order, 1 of sorted buckets
    second = [plan.step(step).bucket for step in range(plan.first_step(1), plan.first_step(2))]
    assert second != buckets


def test_items_are_shuffled_without_preference() -> None:
    # Over many seeds each of 6 items stands first as often: chi-squared, 5 degrees of freedom.
    first = Counter(plan_of([6], 1, seed).step(0).items[0] for seed in range(3000))
    assert sum((count - 500) ** 2 / 500 for count in first.values()) < 25.7  # p = 1e-4


def test_a_plan_is_the_same_on_every_machine() -> None:
    # Written down once: a resumed run must not change its data with a NumPy release.
    assert permutation(8, 7, 0, 3).tolist() == PERMUTATION
    plan = StepPlan([range(5), range(5, 12)], prompts=3, seed=11)
    assert [plan.step(step).items for step in range(6)] == STEPS


def test_the_docstring_tells_the_truth() -> None:
    plan = StepPlan([range(5)], prompts=2, seed=0)
    steps = " ".join(str(plan.step(step).items) for step in range(5))
    assert StepPlan.__doc__ is not None and steps in StepPlan.__doc__


@given(sizes, st.integers(1, 9), st.integers(0, 300), st.data())
def test_replacements_try_every_other_item_of_the_bucket_outsiders_first(
    sizes: list[int], prompts: int, step: int, data: st.DataObject
) -> None:
    plan = plan_of(sizes, prompts)
    bucket, items = plan.step(step)
    slot = data.draw(st.integers(0, prompts - 1))
    others = set(plan.buckets[bucket]) - {items[slot]}
    tried = [plan.replacement(step, slot, attempt) for attempt in range(len(others))]
    assert set(tried) == others
    outsiders = len(set(plan.buckets[bucket]) - set(items))
    assert not set(tried[:outsiders]) & set(items)
    with pytest.raises(LookupError, match="no item left"):
        plan.replacement(step, slot, len(others))


def test_a_bucket_without_good_items_takes_those_of_others() -> None:
    plan = StepPlan([[5], [1, 2, 3]], 2, seed=0, spares=[[2, 3], []])
    step = next(step for step in range(9) if plan.step(step) == (0, [5, 5]))
    assert {plan.replacement(step, 0, attempt) for attempt in range(2)} == {2, 3}
    with pytest.raises(LookupError, match="no item left"):
        plan.replacement(step, 0, 2)


@given(st.integers(2, 9), st.integers(0, 40), st.integers(0, 300))
def test_two_bad_items_of_a_step_are_replaced_by_different_ones(
    prompts: int, more: int, step: int
) -> None:
    assume(more > 0)
    plan = plan_of([2 * prompts + more], prompts)
    first = [plan.replacement(step, slot, 0) for slot in range(prompts)]
    assert len(set(first)) == prompts


def test_replacements_differ_from_step_to_step_and_repeat_for_the_same_one() -> None:
    a, b = plan_of([50], 4, seed=1), plan_of([50], 4, seed=1)
    found = [a.replacement(step, 2, 0) for step in range(20)]
    assert [b.replacement(step, 2, 0) for step in reversed(range(20))] == found[::-1]
    assert len(set(found)) > 8


def test_a_large_bucket_is_planned_quickly() -> None:
    # 200,000 items: a permutation is sorted once an epoch, not once a step.
    plan = plan_of([200_000], 16)
    steps = [plan.step(step).items for step in range(2000)]
    assert len({item for items in steps for item in items}) == 32_000


@pytest.mark.parametrize(
    ("buckets", "prompts", "seed", "expected"),
    [
        ([[], []], 4, 0, "at least one item"),
        ([[1, 2], [2]], 4, 0, "item 2 again"),
        ([[1]], 0, 0, "prompts: expected at least 1"),
        ([[1]], 1, -1, "seed: expected at least 0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(
    buckets: list[list[int]], prompts: int, seed: int, expected: str
) -> None:
    with pytest.raises(PlanError, match=expected):
        StepPlan(buckets, prompts, seed)
    with pytest.raises(PlanError, match="step: expected at least 0"):
        StepPlan([[1]], 1, 0).step(-1)


# Weights


@st.composite
def weighted(draw: st.DrawFn) -> tuple[list[range], list[float], int, int]:
    """Buckets, the weights of their items, P and a seed."""
    lengths = draw(sizes)
    starts = np.cumsum([0, *lengths])
    some = st.sampled_from([0.1, 0.5, 1.0, 1.0, 2.0, 3.3]) | st.floats(0.05, 8)
    weights = draw(st.lists(some, min_size=sum(lengths), max_size=sum(lengths)))
    buckets = [range(a, b) for a, b in pairwise(starts.tolist())]
    return buckets, weights, draw(st.integers(1, 9)), draw(st.integers(0, 2**40))


def epochs_of(plan: StepPlan, bucket: int, count: int) -> list[list[int]]:
    """The draws of a bucket's first epochs."""
    drawn: list[int] = []
    step = 0
    bounds = [plan._draws[bucket].before(epoch) for epoch in range(count + 1)]
    while len(drawn) < bounds[-1]:
        planned = plan.step(step)
        drawn += planned.items if planned.bucket == bucket else []
        step += 1
    return [drawn[a:b] for a, b in pairwise(bounds)]


@given(st.lists(st.integers(0, 30), min_size=1, max_size=3).filter(any), st.floats(0.01, 100))
def test_equal_weights_change_nothing(lengths: list[int], weight: float) -> None:
    plain = plan_of(lengths, 4, seed=5)
    same = {item: weight for bucket in plain.buckets for item in bucket}
    equal = StepPlan(plain.buckets, 4, 5, weights=same)
    assert [equal.step(step) for step in range(40)] == [plain.step(step) for step in range(40)]


@given(weighted())
def test_in_an_epoch_an_item_occurs_as_often_as_its_weight_rounded_down_or_up(
    case: tuple[list[range], list[float], int, int],
) -> None:
    buckets, weights, prompts, seed = case
    plan = StepPlan(buckets, prompts, seed, weights=weights)
    scale = len(weights) / sum(weights)
    for number, items in enumerate(buckets):
        expected = sum(weights[item] * scale for item in items)
        for epoch, drawn in enumerate(epochs_of(plan, number, 2 if items else 0)):
            seen = Counter(drawn)
            for item in items:
                mean = weights[item] * scale
                assert np.floor(mean - 1e-6) <= seen[item] <= np.ceil(mean + 1e-6)
            assert abs(plan._draws[number].before(epoch) - epoch * expected) < 1 + 1e-6


def test_over_many_epochs_each_item_is_drawn_in_proportion_to_its_weight() -> None:
    # Six weights, some below 1 and some above, in two buckets: by bucket the draws of an item in
    # 2,000 epochs have the mean 2,000 w and at most the variance of as many coins.
    weights = [0.3, 0.3, 1.0, 2.0, 0.7, 1.7, 0.25, 3.5, 0.1, 0.15]
    for seed in range(3):
        plan = StepPlan([range(6), range(6, 10)], 2, seed, weights=weights)
        counts = sum(
            np.concatenate([draws.counts(epoch) for draws in plan._draws]) for epoch in range(2000)
        )
        mean = np.array(weights) * len(weights) / sum(weights)
        part = mean - np.floor(mean)
        spread = np.sqrt(2000 * part * (1 - part))
        assert (np.abs(counts - 2000 * mean) < 4.5 * spread + 1).all()


def test_the_steps_of_a_plan_have_those_frequencies() -> None:
    weights = [1.0] * 20 + [3.0] * 20
    plan = StepPlan([range(10), range(10, 40)], 4, 7, weights=weights)
    seen = Counter(item for step in range(plan.first_step(200)) for item in plan.step(step).items)
    for item, weight in enumerate(weights):
        assert abs(seen[item] - 200 * weight / 2) < 4.5 * np.sqrt(200 / 4)


@given(weighted())
def test_no_step_holds_an_item_twice_where_there_is_room(
    case: tuple[list[range], list[float], int, int],
) -> None:
    buckets, weights, prompts, seed = case
    plan = StepPlan(buckets, prompts, seed, weights=weights)
    scale = len(weights) / sum(weights)
    for step in range(plan.first_step(3)):
        bucket, items = plan.step(step)
        assert set(items) <= set(buckets[bucket]) and len(items) == prompts
        mean = np.array([weights[item] * scale for item in buckets[bucket]])
        if mean.sum() >= 2 * prompts + 1 and np.ceil(mean.max()) <= mean.sum() // prompts - 2:
            assert len(set(items)) == prompts


def test_the_repetitions_of_an_item_lie_evenly_over_its_epoch() -> None:
    plan = StepPlan([range(400)], 1, 3, weights=[40.0, *[1.0] * 399])
    first = np.flatnonzero([plan.step(step).items == [0] for step in range(400)])
    assert len(first) in (36, 37) and np.diff(first).max() < 25


def test_a_weighted_step_does_not_depend_on_what_was_asked_before() -> None:
    def make() -> StepPlan:
        weights = {item: 1 + item % 3 for item in range(49)}
        return StepPlan([range(30), range(30, 49)], 4, 3, weights=weights)

    plan = make()
    forward = [plan.step(step) for step in range(60)]
    fresh = pickle.loads(pickle.dumps(make()))
    assert [fresh.step(step) for step in reversed(range(60))] == forward[::-1]


def test_a_weighted_plan_is_the_same_on_every_machine() -> None:
    plan = StepPlan([range(5), range(5, 12)], 3, 11, weights=[1, 2.5, 1, 1, 0.3] + [2] * 7)
    assert [plan.step(step).items for step in range(6)] == WEIGHTED


def test_a_bucket_of_little_weight_has_rare_steps() -> None:
    plan = StepPlan([range(50), range(50, 100)], 5, 0, weights=[0.01] * 50 + [1.0] * 50)
    steps = [plan.step(step).bucket for step in range(plan.first_step(101))]
    assert steps.count(0) == 20 and plan.epoch(len(steps)) == 101


def test_a_large_weighted_bucket_is_planned_quickly() -> None:
    weights = [1.0 + item % 3 for item in range(200_000)]
    plan = StepPlan([range(200_000)], 16, 0, weights=weights)
    steps = [plan.step(step).items for step in range(1000)]
    assert all(len(set(items)) == 16 for items in steps)


@pytest.mark.parametrize("weight", [0.0, -1.0, float("nan"), float("inf"), 1e-12])
def test_an_item_that_would_never_be_drawn_is_refused(weight: float) -> None:
    with pytest.raises(PlanError, match="weights: .*item 1"):
        StepPlan([range(3)], 1, 0, weights=[1.0, weight, 1.0])


# One pass for evaluation


def test_one_pass_takes_every_item_once_and_fills_the_last_step_up() -> None:
    plan = OnePass([range(5), (), (7, 9)], 2)
    steps = [plan.step(i) for i in range(plan.steps)]
    assert [step.items for step in steps] == [[0, 1], [2, 3], [4, 0], [7, 9]]
    assert [step.bucket for step in steps] == [0, 0, 0, 2]


def test_a_bad_item_of_one_pass_is_replaced_by_any_other_of_its_bucket() -> None:
    plan = OnePass([range(5), (7,)], 1)
    assert [plan.replacement(3, 0, attempt) for attempt in range(4)] == [0, 1, 2, 4]
    with pytest.raises(LookupError):
        plan.replacement(5, 0, 0)  # the bucket of item 7 has no other


def test_one_pass_fills_the_slot_of_a_lone_bad_item_with_a_spare() -> None:
    plan = OnePass([(0, 1), (7,)], 1, spares=[[], [1, 0]])
    assert [plan.replacement(2, 0, attempt) for attempt in range(2)] == [1, 0]
    with pytest.raises(LookupError):
        plan.replacement(2, 0, 2)
