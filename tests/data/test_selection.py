"""The rules of selection, against tables made by hand and against NumPy."""

from __future__ import annotations

from collections import Counter

import numpy as np
import pytest

from data.selection import KEPT, VERDICTS, Rules, Sampled, verdicts

ALL = Rules(right=(0.0, 1.0), spread=0.0, share=1.0, budget={}, order="spread", seed=0)


def choice(name: str, right: float) -> Sampled:
    return Sampled(name, "mcqa", {"format": 1.0, "choice": right}, {"choice": 0.1})


def span(name: str, std: float) -> Sampled:
    return Sampled(name, "tvg", {"iou": 0.4}, {"iou": std})


def both(name: str, right: float, std: float) -> Sampled:
    means, stds = {"choice": right, "iou": 0.4}, {"choice": 0.1, "iou": std}
    return Sampled(name, "gqa", means, stds)


def test_of_right_and_wrong_answers_those_sometimes_right_are_kept() -> None:
    items = [choice("a", 0.0), choice("b", 0.125), choice("c", 0.875), choice("d", 1.0)]
    assert verdicts(items, ALL) == {"a": "always wrong", "b": KEPT, "c": KEPT, "d": "always right"}
    narrow = ALL._replace(right=(0.125, 0.8))
    assert set(verdicts(items, narrow).values()) == {"always wrong", "always right"}


def test_of_scored_answers_those_that_spread_are_kept() -> None:
    items = [span("a", 0.0), span("b", 0.1), span("c", 0.3)]
    assert verdicts(items, ALL) == {"a": "too alike", "b": KEPT, "c": KEPT}
    assert verdicts(items, ALL._replace(spread=0.3)) == {
        "a": "too alike",
        "b": "too alike",
        "c": KEPT,
    }


def test_where_the_reward_has_another_temporal_score_that_one_must_spread() -> None:
    """Spans beside the true one have an IoU of 0 throughout, and differ in the generalised IoU."""
    item = Sampled("a", "tvg", {"iou": 0.0, "temporal": 0.2}, {"iou": 0.0, "temporal": 0.1})
    assert verdicts([item], ALL) == {"a": KEPT}
    assert verdicts([item], ALL._replace(spread=0.2)) == {"a": "too alike"}


@pytest.mark.parametrize(
    ("right", "std", "verdict"),
    [(0.0, 0.2, KEPT), (0.5, 0.0, KEPT), (1.0, 0.0, "too alike"), (0.0, 0.0, "too alike")],
)
def test_an_item_with_two_scores_is_kept_for_either(right: float, std: float, verdict: str) -> None:
    assert verdicts([both("a", right, std)], ALL) == {"a": verdict}


def test_share_and_budget_take_what_spreads_most_of_each_task() -> None:
    rng = np.random.default_rng(0)
    spreads = rng.random(20) + 0.01
    items = [span(f"t{i}", std) for i, std in enumerate(spreads)]
    items += [choice(f"m{i}", 0.5) for i in range(6)]
    found = verdicts(items, ALL._replace(share=0.3, budget={"tvg": 5, "mcqa": None}))
    order = [f"t{i}" for i in np.argsort(-spreads)]
    assert [name for name in order if found[name] == KEPT] == order[:5]
    assert [found[name] for name in order[5:7]] == ["beyond the budget", "beyond the share"]
    assert Counter(found[f"m{i}"] for i in range(6)) == {KEPT: 2, "beyond the share": 4}
    assert set(found.values()) <= set(VERDICTS)


def test_share_and_budget_may_draw_from_what_teaches_whatever_its_spread() -> None:
    """Of 400 items half are kept, as often among those that spread much as among the others."""
    items = [span(f"t{i}", i / 400) for i in range(401)]  # the first does not spread
    rules = [ALL._replace(share=0.75, budget={"tvg": 200}, order="random", seed=s) for s in (0, 1)]
    found, other = (verdicts(items, rule) for rule in rules)
    kept = [item.spread for item in items if found[item.id] == KEPT]
    assert Counter(found.values()) == {
        "too alike": 1,
        "beyond the share": 100,
        "beyond the budget": 100,
        KEPT: 200,
    }
    # The mean of 200 of 400 values that are even between 0 and 1 deviates by 0.0145.
    assert np.mean(kept) == pytest.approx(0.5, abs=0.06) and found != other


def test_the_format_has_no_say_and_both_scores_of_an_answer_have() -> None:
    broken = Sampled("a", "gqa", {"choice": 1.0}, {"format": 0.5, "choice": 0.0, "iou": 0.2})
    fine = Sampled("b", "gqa", {"choice": 0.9}, {"format": 0.0, "choice": 0.1, "iou": 0.2})
    other = Sampled("c", "gqa", {}, {"format": 0.0, "iou": 0.9, "temporal": 0.25})
    assert [item.spread for item in (broken, fine, other)] == pytest.approx([0.2, 0.3, 0.25])
    found = verdicts([broken, fine, other], ALL._replace(budget={"gqa": 1}))
    assert found == {"a": "beyond the budget", "b": KEPT, "c": "beyond the budget"}


def test_items_that_spread_alike_are_drawn_by_the_seed_whatever_their_order() -> None:
    items = [choice(str(i), 0.5) for i in range(50)]
    rules = [ALL._replace(budget={"mcqa": 10}, seed=seed) for seed in (0, 0, 1)]
    kept = [
        {name for name, verdict in verdicts(order, rule).items() if verdict == KEPT}
        for order, rule in zip((items, items[::-1], items), rules, strict=True)
    ]
    assert kept[0] == kept[1] != kept[2] and len(kept[2]) == 10


def test_a_budget_of_nothing_keeps_nothing() -> None:
    assert verdicts([choice("a", 0.5)], ALL._replace(budget={"mcqa": 0})) == {
        "a": "beyond the budget"
    }
