"""A picture of how hard items are: histograms of what their completions earned, by task."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from data.selection import KEPT, Sampled

_BINS = 20


def panels(items: Sequence[Sampled]) -> list[tuple[str, str, list[tuple[str, float]]]]:
    """(task, what is counted, (id, value) of its items): a panel of the picture each.

    A discrete component has one, its share of right completions; a continuous one has two, its mean
    and its deviation.
    """
    found = []
    for task in sorted({item.task for item in items}):
        mine = [item for item in items if item.task == task]
        for name in mine[0].discrete:
            shares = [(item.id, item.means[name]) for item in mine]
            found.append((task, f"share with the right {name}", shares))
        for name in mine[0].continuous:
            found.append((task, f"mean {name}", [(item.id, item.means[name]) for item in mine]))
            spread = [(item.id, item.stds[name]) for item in mine]
            found.append((task, f"deviation of {name}", spread))
    return found


def plot_difficulty(items: Sequence[Sampled], verdicts: Mapping[str, str], path: Path) -> None:
    """Draws every panel, kept items in another colour than the rest."""
    shown = panels(items)
    columns = min(max(len(shown), 1), 3)
    rows = -(-max(len(shown), 1) // columns)
    figure = Figure(figsize=(4.2 * columns, 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    grid = figure.subplots(rows, columns, squeeze=False).flat
    for axes, (task, words, values) in zip(grid, shown, strict=False):
        top = max(1.0, max(value for _, value in values)) if "deviation" not in words else None
        split: tuple[list[float], list[float]] = ([], [])
        for name, value in values:
            split[verdicts[name] == KEPT].append(value)
        most = top or max(max(value for _, value in values), 0.1)
        least = min(0.0, min(value for _, value in values))
        axes.hist(
            split[::-1],
            bins=list(np.linspace(least, most, _BINS + 1)),
            stacked=True,
            label=(f"kept ({len(split[1])})", f"left out ({len(split[0])})"),
            color=("tab:green", "lightgrey"),
        )
        axes.set(title=f"{task}: {words}", ylabel="items")
        axes.legend(fontsize="small")
    for axes in list(grid):
        axes.set_visible(False)
    figure.savefig(path, dpi=120)
