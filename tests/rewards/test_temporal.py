"""Temporal IoU, against exact arithmetic on the elementary intervals between all end points."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.temporal import generalised_iou, temporal_iou, timestamp_iou

NAN, INF = np.nan, np.inf
Spans = list[tuple[float, float]]


def exact_iou(prediction: tuple[float, float], truth: Spans) -> Fraction:
    """Between two neighbouring end points a point is in the spans or not: add up what is."""
    if not np.isfinite(prediction).all() or prediction[1] <= prediction[0]:
        return Fraction(0)
    points = sorted({Fraction(x) for span in [prediction, *truth] for x in span})
    both = either = Fraction(0)
    for left, right in pairwise(points):
        middle = (left + right) / 2
        predicted = prediction[0] < middle < prediction[1]
        true = any(start < middle < end for start, end in truth)
        both += (right - left) * (predicted and true)
        either += (right - left) * (predicted or true)
    return both / either


def iou(prediction: tuple[float, float], truth: Spans, padding: int = 0) -> float:
    padded = truth + [(NAN, NAN)] * padding
    result = temporal_iou(np.array([[prediction]]), np.array([padded]))
    assert result.shape == (1, 1) and result.dtype == np.float32
    return float(result[0, 0])


@pytest.mark.parametrize(
    ("prediction", "truth", "expected"),
    [
        ((3, 7), [(3, 7)], 1),
        ((2, 6), [(0, 4)], 2 / 6),
        ((0, 10), [(2, 4)], 0.2),  # the whole video is legal and earns its true IoU
        ((0, 1000), [(2, 4)], 0.002),  # past the end of the video: never clipped
        ((5, 6), [(0, 4)], 0),
        ((4, 6), [(0, 4)], 0),  # touching
        ((0, 5), [(0, 4), (3, 5)], 1),  # overlapping true spans count once
        ((0, 5), [(3, 5), (0, 4)], 1),
        ((0, 5), [(0, 5), (1, 2), (1, 2)], 1),
        ((0, 9), [(0, 4), (5, 9)], 8 / 9),
        ((2, 7), [(0, 4), (6, 9)], 3 / 9),
    ],
)
def test_iou_is_intersection_over_union(
    prediction: tuple[float, float], truth: Spans, expected: float
) -> None:
    assert iou(prediction, truth) == pytest.approx(expected, abs=1e-6)
    assert iou(prediction, truth, padding=3) == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize(
    "prediction",
    [(7, 3), (3, 3), (0, 0), (NAN, NAN), (NAN, 7), (3, NAN), (3, INF), (-INF, INF), (INF, INF)]
    + [(-3e38, 3e38)],  # finite ends, but an infinite length in float32
    ids=str,
)
def test_a_missing_reversed_empty_or_infinite_span_earns_nothing(
    prediction: tuple[float, float],
) -> None:
    assert iou(prediction, [(3, 7)], padding=1) == 0
    assert iou(prediction, [(3, 3)]) == 0
    assert iou(prediction, [(-3e38, 3e38)]) == 0


def test_rounding_never_lifts_a_perfect_span_above_one() -> None:
    # Adding up two overlapping spans rounds to more than their hull for about 1 % of such spans.
    ends = np.sort(np.random.default_rng(0).uniform(0, 100, (20_000, 4)).round(2), -1)
    prediction, truth = ends[:, None, [0, 3]], ends[:, [[0, 2], [1, 3]]]
    np.testing.assert_allclose(temporal_iou(prediction, truth), 1, rtol=1e-6)
    assert float(temporal_iou(prediction, truth).max()) == 1


@pytest.mark.parametrize("truth", [[(NAN, NAN)], [(3.0, 3.0)], [(7.0, 3.0)]], ids=str)
def test_without_a_true_span_nothing_is_earned_and_nothing_is_nan(truth: Spans) -> None:
    assert iou((3, 7), truth) == 0


EIGHTHS = st.integers(0, 240).map(lambda n: n / 8)  # exact in float32
ANY_SPAN = st.tuples(EIGHTHS, EIGHTHS)
TRUE_SPAN = ANY_SPAN.filter(lambda s: s[0] != s[1]).map(lambda s: (min(s), max(s)))


@settings(max_examples=150, deadline=None)
@given(ANY_SPAN, st.lists(TRUE_SPAN, min_size=1, max_size=4))
def test_iou_agrees_with_exact_arithmetic(prediction: tuple[float, float], truth: Spans) -> None:
    found = iou(prediction, truth, padding=4 - len(truth))
    assert found == pytest.approx(float(exact_iou(prediction, truth)), abs=2e-6)
    assert 0 <= found <= 1


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.floats(width=32), st.floats(width=32)),
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=2, max_size=2),
)
def test_iou_of_any_floats_is_finite_and_within_bounds(
    prediction: tuple[float, float], truth: Spans
) -> None:
    assert 0 <= iou(prediction, truth) <= 1


def test_a_batch_is_scored_prompt_by_prompt_and_the_same_under_jit() -> None:
    rng = np.random.default_rng(0)
    prompts, group, spans = 7, 5, 3
    prediction = rng.uniform(0, 30, (prompts, group, 2)).astype(np.float32)
    truth = np.sort(rng.uniform(0, 30, (prompts, spans, 2)), -1).astype(np.float32)
    truth[::2, -1] = NAN
    found = temporal_iou(prediction, truth)
    assert found.shape == (prompts, group)
    for p in range(prompts):
        real = [(float(s), float(e)) for s, e in truth[p] if np.isfinite(s)]
        for g in range(group):
            start, end = map(float, prediction[p, g])
            assert found[p, g] == pytest.approx(float(exact_iou((start, end), real)), abs=1e-5)
    np.testing.assert_allclose(jax.jit(temporal_iou)(prediction, truth), found, rtol=1e-6)


# --- generalised IoU and Time-R1's ----------------------------------------------------------------


def giou_by_hand(prediction: tuple[float, float], truth: Spans) -> float:
    """(1 + GIoU) / 2, counting cells of half a second: exact for times in half seconds."""
    if not prediction[1] > prediction[0]:
        return 0.0
    cells = np.arange(100) / 2 + 0.25
    said = (prediction[0] < cells) & (cells < prediction[1])
    true = np.any([(s < cells) & (cells < e) for s, e in truth], axis=0)
    inside = np.flatnonzero(said | true)
    hull = inside[-1] - inside[0] + 1
    union = (said | true).sum()
    return (1 + (said & true).sum() / union - (hull - union) / hull) / 2


def tiou_by_hand(prediction: tuple[float, float], truth: Spans, duration: float) -> float:
    start, end = prediction
    off = min(abs(start - s) for s, _ in truth) / duration
    off_end = min(abs(end - e) for _, e in truth) / duration
    return float(exact_iou(prediction, truth)) * max(1 - off, 0) * max(1 - off_end, 0)


def test_the_other_kinds_against_slow_ones() -> None:
    rng = np.random.default_rng(3)
    for _ in range(60):
        count = int(rng.integers(1, 4))
        ends = np.sort(rng.choice(80, (count, 2), replace=False), -1) / 2
        truth = [(float(s), float(e)) for s, e in ends]
        prediction = (float(rng.integers(0, 80)) / 2, float(rng.integers(0, 80)) / 2)
        padded = np.full((1, 3, 2), NAN, np.float32)
        padded[0, :count] = truth
        span = np.float32([[prediction]])
        found = float(generalised_iou(span, padded)[0, 0])
        assert found == pytest.approx(giou_by_hand(prediction, truth), abs=1e-6)
        found = float(timestamp_iou(span, padded, np.float32([20.0]))[0, 0])
        assert found == pytest.approx(tiou_by_hand(prediction, truth, 20.0), abs=1e-6)


def test_the_other_kinds_by_hand() -> None:
    spans = np.float32([[[2, 6], [5, 6], [9, 10], [0, 4], [6, 2], [3, 3], [NAN, NAN]]])
    truth = np.float32([[[0, 4], [NAN, NAN]]])
    expected = [[2 / 3, 5 / 12, 1 / 4, 1, 0, 0, 0]]
    np.testing.assert_allclose(generalised_iou(spans, truth), expected, rtol=1e-6)
    expected = [[0.8 * 0.8 / 3, 0, 0, 1, 0, 0, 0]]
    for kind in (timestamp_iou, jax.jit(timestamp_iou)):
        np.testing.assert_allclose(kind(spans, truth, np.float32([10])), expected, rtol=1e-6)


def test_of_several_spans_the_best_stretch_keeps_time_r1s_factors() -> None:
    truth = np.float32([[[0, 4], [10, 20]]])
    span = np.float32([[[10, 20]]])
    assert timestamp_iou(span, truth, np.float32([30])) == temporal_iou(span, truth)


@settings(max_examples=150, deadline=None)
@given(
    st.tuples(st.floats(width=32), st.floats(width=32)),
    st.lists(st.tuples(st.floats(width=32), st.floats(width=32)), min_size=2, max_size=2),
    st.floats(width=32),
)
def test_the_other_kinds_are_finite_and_within_bounds_for_any_floats(
    prediction: tuple[float, float], truth: Spans, duration: float
) -> None:
    span, true = np.float32([[prediction]]), np.float32([truth])
    assert 0 <= float(generalised_iou(span, true)[0, 0]) <= 1
    assert 0 <= float(timestamp_iou(span, true, np.float32([duration]))[0, 0]) <= 1
