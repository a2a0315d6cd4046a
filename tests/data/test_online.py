"""Online sampling: which items are drawn how often, and that nothing but history decides it.

The loader stands at the top of the module, so that worker processes can import it.
"""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from data.online import ItemValues, OnlinePlan, Rules, draw_weights
from data.pipeline import Batch, batches
from data.probe import VideoError
from data.sampling import PlanError

P, R = 4, 8
RULES = Rules(round=R, memory=0.5, floor=0.2, most=5.0)
BUCKETS = (range(20), range(20, 30))
BASE, STRATA = [1.0] * 30, [0] * 30
BAD = 7


def plan_in(folder: Path, buckets: Sequence[Sequence[int]] = BUCKETS, **how: Any) -> OnlinePlan:
    folder.mkdir(exist_ok=True)
    return OnlinePlan(buckets, how.pop("prompts", P), 5, folder, round_steps=R, **how)


# ---- weights ----


def test_weights_are_those_of_the_worked_example() -> None:
    weights = draw_weights([3.0, 1.0, 0.0, 0.0], [1.0] * 4, [0] * 4, RULES)
    np.testing.assert_allclose(weights, [2.6, 1.0, 0.2, 0.2])


def test_the_unseen_count_as_the_best_and_as_all_there_is_where_nothing_varied() -> None:
    seen, unseen = draw_weights([0.5, 0.1, None], [1.0] * 3, [0] * 3, RULES)[::2]
    assert unseen == seen
    weights = draw_weights([0.0, 0.0, None], [1.0] * 3, [0] * 3, RULES)
    np.testing.assert_allclose(weights, [0.2, 0.2, 2.6])


def test_what_teaches_nobody_anything_is_drawn_alike() -> None:
    for value in (0.0, None):
        assert draw_weights([value] * 3, [1.0] * 3, [0] * 3, RULES) == [1.0] * 3


def test_no_item_counts_for_more_than_the_most() -> None:
    weights = draw_weights([1.0] + [0.0] * 99, [1.0] * 100, [0] * 100, RULES)
    assert weights[0] / weights[1] == pytest.approx((0.2 + 0.8 * RULES.most) / 0.2)
    assert sum(weights) == pytest.approx(100)


def test_strata_keep_their_shares_and_what_manifest_and_task_give_counts_within_them() -> None:
    rng = np.random.default_rng(0)
    values = [None, *rng.random(59)]
    base = rng.choice([0.5, 1.0, 3.0], 60).tolist()
    strata = np.repeat([0, 1, 2], [10, 20, 30]).tolist()
    weights = np.array(draw_weights(values, base, strata, RULES))
    for stratum in range(3):
        mine = np.array(strata) == stratum
        assert weights[mine].sum() == pytest.approx(np.array(base)[mine].sum())
    same = [0.3] * 60
    np.testing.assert_allclose(draw_weights(same, base, strata, RULES), base)


# ---- draws ----


def test_a_round_draws_each_item_in_proportion_rounded_down_or_up(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    plan = plan_in(tmp_path)
    for number in range(6):
        weights = rng.random(30) + 0.05
        plan.publish(number, weights.tolist())
        steps = [plan.step(step) for step in range(number * R, (number + 1) * R)]
        for bucket, items in enumerate(BUCKETS):
            mine = weights[list(items)]
            turns = sum(planned.bucket == bucket for planned in steps)
            share = mine.sum() / weights.sum() * R
            assert turns in (np.floor(share), np.ceil(share))
            drawn = [
                item for planned in steps if planned.bucket == bucket for item in planned.items
            ]
            seen = Counter(drawn)
            assert set(seen) <= set(items) and len(drawn) == turns * P
            expected = mine / mine.sum() * turns * P
            for item, mean in zip(items, expected, strict=True):
                assert np.floor(mean - 1e-6) <= seen[item] <= np.ceil(mean + 1e-6)


def test_draws_follow_the_stated_probabilities(tmp_path: Path) -> None:
    """By chi-square; the same draws are no fit for probabilities a fifth off."""
    weights = draw_weights(
        [None, *np.linspace(0, 1, 29)], np.linspace(1, 2, 30).tolist(), STRATA, RULES
    )
    plan = plan_in(tmp_path, prompts=2)
    seen: Counter[int] = Counter()
    for number in range(300):
        plan.publish(number, weights)
        for step in range(number * R, (number + 1) * R):
            seen.update(plan.step(step).items)
    counts = np.array([seen[item] for item in range(30)])
    expected = np.array(weights) / sum(weights) * counts.sum()
    assert stats.chisquare(counts, expected).pvalue > 0.01
    off = expected * np.where(np.arange(30) % 2, 1.2, 0.8)
    assert stats.chisquare(counts, off * counts.sum() / off.sum()).pvalue < 1e-6


def test_a_step_repeats_an_item_only_if_it_must(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, [range(40)])
    plan.publish(0, [5.0] * 4 + [1.0] * 36)
    for step in range(R):
        assert len(set(plan.step(step).items)) == P
    few = plan_in(tmp_path / "few", [range(2)])
    few.publish(0, [1.0, 1.0])
    assert Counter(few.step(0).items) == {0: 2, 1: 2}


def test_steps_of_a_bucket_follow_each_other_in_runs(tmp_path: Path) -> None:
    plan = plan_in(tmp_path, run=4)
    plan.publish(0, [1.0] * 20 + [2.0] * 10)
    order = [plan.step(step).bucket for step in range(R)]
    assert order in ([0] * 4 + [1] * 4, [1] * 4 + [0] * 4)


@pytest.mark.parametrize(
    ("buckets", "message"), [([[]], "at least one item"), ([[1, 2], [2]], "item 2 again")]
)
def test_buckets_that_no_plan_can_be_made_from_are_refused(
    buckets: list[list[int]], message: str, tmp_path: Path
) -> None:
    with pytest.raises(PlanError, match=message):
        plan_in(tmp_path, buckets)


# ---- what training tells ----


def test_an_items_value_is_a_running_mean_of_its_groups(tmp_path: Path) -> None:
    values = ItemValues(plan_in(tmp_path), BASE, STRATA, RULES)
    values.observe(0, [3, 4], [0.4, 0.0], [])
    values.observe(1, [3, 5], [0.2, 0.1], [BAD])
    assert values.values[3] == pytest.approx(0.5 * 0.4 + 0.5 * 0.2)
    assert (values.values[4], values.values[5], values.values[BAD]) == (0.0, 0.1, 0.0)
    assert values.values[0] is None


def test_a_round_follows_what_was_known_a_round_before_it_began(tmp_path: Path) -> None:
    plan = plan_in(tmp_path / "plan")
    values = ItemValues(plan, BASE, STRATA, RULES)
    for step in range(R):
        assert set(plan.weights(0)) == set(plan.weights(1)) == {1.0}
        values.observe(step, [step], [float(step)], [])
    known = list(values.values)
    expected = draw_weights(known, BASE, STRATA, RULES)
    values.observe(R, [29], [100.0], [])
    np.testing.assert_array_equal(plan.weights(2), expected)
    assert not (tmp_path / "plan" / "3.npy").exists()


def deviation(item: int, step: int) -> float:
    """What a training would have seen, of items of which few teach."""
    return abs(np.sin(item + step)) if item % 5 == 0 else 0.0


def load(item: int) -> int:
    time.sleep(item % 3 * 1e-3)  # so that threads finish out of order
    if item == BAD:
        raise VideoError("cut", "7.mp4: cut")
    return item


def collate(examples: list[int], bucket: int) -> tuple[int, list[int]]:
    return bucket, examples


def trained(
    folder: Path,
    steps: int,
    start: int = 0,
    saved: dict[str, Any] | None = None,
    hosts: int = 1,
    work: float = 0.0,
    **how: Any,
) -> tuple[list[tuple[int, list[int]]], dict[str, Any]]:
    """(bucket and items) of each step, as `hosts` processes together see them, and the state.

    A step takes `work` seconds, in which others load ahead.
    """
    folder.mkdir()
    seen: list[tuple[int, list[int]]] = []
    plans = [plan_in(folder / str(host)) for host in range(hosts)]
    values = [ItemValues(plan, BASE, STRATA, RULES, saved) for plan in plans]
    rows = np.split(np.arange(P), hosts)
    feeds = [
        batches(plan, load, collate, start_step=start, num_steps=steps, rows=mine.tolist(), **how)
        for plan, mine in zip(plans, rows, strict=True)
    ]
    for step in range(start, start + steps):
        parts: list[Batch] = [next(feed) for feed in feeds]
        time.sleep(work)
        items = [item for part in parts for item in part.items]
        failed = [failure.item for part in parts for failure in part.failures]
        seen.append((parts[0].bucket, items))
        for mine in values:
            mine.observe(step, items, [deviation(item, step) for item in items], failed)
    for feed in feeds:
        feed.close()
    state: dict[str, Any] = json.loads(json.dumps(values[0].state()))
    return seen, state


def test_the_draws_are_the_same_for_any_threads_workers_and_hosts(tmp_path: Path) -> None:
    expected, _ = trained(tmp_path / "a", 40, threads=0, prefetch=0)
    assert any(BAD in plan_items for _, plan_items in expected) is False
    assert len({bucket for bucket, _ in expected}) == 2
    hows: list[dict[str, Any]] = [
        {"threads": 2},
        {"threads": 1, "workers": 2},
        {"hosts": 2},
        {"hosts": 4, "threads": 3, "prefetch": 4},
        {"hosts": 4, "threads": 1, "workers": 4, "work": 0.05},  # a worker has four steps ahead
        {"threads": 4, "prefetch": 40, "work": 0.02},
    ]
    for number, how in enumerate(hows):
        assert trained(tmp_path / f"b{number}", 40, **how)[0] == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_who_waits_for_weights_is_released_when_training_ends(tmp_path: Path, workers: int) -> None:
    plan = plan_in(tmp_path / "plan")
    ItemValues(plan, BASE, STRATA, RULES)  # rounds 0 and 1, and never another
    steps = {"start_step": 0, "num_steps": 100, "prefetch": 60}
    feed = batches(plan, load, collate, **steps, threads=2, workers=workers)
    for _ in range(3):
        next(feed)
    time.sleep(0.2)  # so that readers come to round 2
    shutil.rmtree(tmp_path / "plan")
    started = time.monotonic()
    feed.close()
    assert time.monotonic() - started < 5
    with pytest.raises(RuntimeError, match="training ended before the weights of round 2 came"):
        plan.step(2 * R)


def test_a_run_that_goes_on_at_any_step_draws_what_it_would_have_drawn(tmp_path: Path) -> None:
    expected, last = trained(tmp_path / "whole", 44)
    rng = np.random.default_rng(3)
    for number, cut in enumerate([1, R - 1, R, R + 1, *rng.integers(2, 44, 4).tolist()]):
        first, state = trained(tmp_path / f"first{number}", cut)
        rest, end = trained(tmp_path / f"rest{number}", 44 - cut, start=cut, saved=state)
        assert first + rest == expected
        assert end == last


def test_items_that_teach_are_drawn_more_and_none_starves(tmp_path: Path) -> None:
    """Of 30 items 6 have groups that vary; drawn alike they would be a fifth of all draws."""
    steps = 60 * R
    drawn, _ = trained(tmp_path / "run", steps, prefetch=0, threads=0)
    late = Counter(item for _, items in drawn[4 * R :] for item in items)
    teaching = [item for item in range(30) if item % 5 == 0]
    share = sum(late[item] for item in teaching) / sum(late.values())
    assert share > 0.6
    others = [late[item] for item in range(30) if item % 5 and item != BAD]
    floor = RULES.floor / 30 * sum(late.values())
    assert min(others) > 0.4 * floor
