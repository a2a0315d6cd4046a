"""The picture of how hard items are."""

from __future__ import annotations

from pathlib import Path

import matplotlib.image
import pytest

from data.selection import Sampled
from jaxgrpo.difficulty import panels, plot_difficulty

ITEMS = [
    Sampled("a", "mcqa", {"choice": 0.5, "format": 1.0}, {"choice": 0.5}),
    Sampled("b", "mcqa", {"choice": 1.0, "format": 1.0}, {"choice": 0.0}),
    Sampled("c", "tvg", {"iou": 0.4}, {"iou": 0.2}),
    Sampled("d", "gqa", {"choice": 0.0, "iou": 0.4}, {"choice": 0.0, "iou": 0.2}),
]


def test_a_discrete_score_has_a_panel_and_a_continuous_one_two() -> None:
    assert panels(ITEMS) == [
        ("gqa", "share with the right choice", [("d", 0.0)]),
        ("gqa", "mean iou", [("d", 0.4)]),
        ("gqa", "deviation of iou", [("d", 0.2)]),
        ("mcqa", "share with the right choice", [("a", 0.5), ("b", 1.0)]),
        ("tvg", "mean iou", [("c", 0.4)]),
        ("tvg", "deviation of iou", [("c", 0.2)]),
    ]


def test_a_temporal_score_in_the_place_of_the_iou_has_its_panels() -> None:
    both = {"iou": 0.4, "temporal": -0.2}
    assert panels([Sampled("c", "tvg", both, {"iou": 0.2, "temporal": 0.1})]) == [
        ("tvg", "mean temporal", [("c", -0.2)]),
        ("tvg", "deviation of temporal", [("c", 0.1)]),
    ]


@pytest.mark.parametrize("items", [ITEMS, ITEMS[:1], []])
def test_the_picture_can_be_read(items: list[Sampled], tmp_path: Path) -> None:
    path = tmp_path / "difficulty.png"
    plot_difficulty(items, dict.fromkeys("abcd", "kept") | {"b": "always right"}, path)
    assert matplotlib.image.imread(path).shape[2] == 4
