"""What `jaxgrpo inspect` found, for people: the terminal's summary, histograms, one HTML page."""

from __future__ import annotations

import io
from pathlib import Path
from typing import TYPE_CHECKING

import jinja2
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from jaxgrpo.config import Config
from jaxgrpo.inspection.findings import kinds
from jaxgrpo.inspection.survey import Column, Survey

if TYPE_CHECKING:
    from jaxgrpo.inspection.main import Inspection

_ROWS = 200  # of a list on the page; inspect.json has all
_RESOLUTIONS = 8  # that have a bar of their own
_BLUE, _GREY, _RED = "#3267a8", "#c9ced6", "#b3261e"


# ---- the terminal ----


def summary(found: Inspection) -> str:
    """The verdict, what is wrong, and the figures in short."""
    lines = [f"verdict: {found.verdict}"]
    lines += [f"problem: {text}" for text in found.problems]
    lines += [f"warning: {text}" for text in found.warnings]
    lines += ["", *_described("training data", found.train)]
    lines += ["", *_described("evaluation data", found.evaluation)]
    for item in found.shown:
        lines += [
            "",
            f"{item.id} ({item.task}): {item.frames} frames of {item.frame_size} pixels",
            f"  right: {item.truth}",
            *(f"  | {line}" for line in item.prompt.splitlines()),
        ]
    return "\n".join([*lines, ""])


def _described(title: str, part: Survey) -> list[str]:
    left_out = {"videos that cannot be used": part.bad, "prompts too long": part.overflows}
    told = ", ".join(f"{len(items)} {what}" for what, items in left_out.items() if items)
    lines = [f"{title}: {part.items} items" + (f", without {told}" if told else "")]
    lines += [
        f"  {x.manifest}: {x.items} {x.task}"
        + (f", weight {x.weight:g}, {x.draws:.1%} of the draws" if part.steps else "")
        for x in part.parts
    ]
    lines.append(f"  {'':<30}{'least':>10}{'median':>10}{'95 %':>10}{'most':>10}")
    for name, column in part.columns.items():
        cells = (column.least, column.median, column.p95, column.most)
        lines.append(f"  {name:<30}" + "".join(f"{cell:>10.5g}" for cell in cells))
    for bucket in part.buckets:
        if not bucket.items:
            lines.append(f"  bucket of {bucket.tokens} tokens: empty, costs nothing")
            continue
        steps = "" if bucket.steps is None else f", {bucket.steps} steps an epoch"
        lines.append(
            f"  bucket of {bucket.tokens} tokens: {bucket.items} items{steps}; computed for each "
            f"real one: {bucket.token_ratio:.2f} tokens, {bucket.patch_ratio:.2f} patches"
        )
    if part.steps:
        s = part.steps
        lines.append(
            f"  {s.epoch} steps an epoch; train.steps={s.run} are {s.run / s.epoch:.2f} epochs"
        )
    a = part.answers
    lines.append(
        f"  right answers earn {a.reward:.3f} on average ({part.items - len(a.short)} of "
        f"{part.items} the most there is), an empty completion {a.empty:.3f}"
    )
    return lines


# ---- pictures ----


def histograms(part: Survey) -> bytes:
    """What the training data is like, as PNG."""
    figure = Figure(figsize=(14, 7), layout="constrained")
    FigureCanvasAgg(figure)
    panels = list(figure.subplots(2, 4).flat)
    limits = {"answer (tokens)": f", limit {part.answers.limit}"}
    for axes, (name, column) in zip(panels, part.columns.items(), strict=False):
        _histogram(axes, name, column, limits.get(name, ""))
    for axes in panels[len(part.columns) : 6]:
        axes.set_axis_off()
    _resolutions(panels[6], part)
    _filling(panels[7], part)
    png = io.BytesIO()
    figure.savefig(png, dpi=100)
    return png.getvalue()


def _histogram(axes: Axes, name: str, column: Column, limit: str) -> None:
    if column.least == column.most:
        axes.set_title(name, fontsize=11)
        axes.text(0.5, 0.5, f"all {column.most:g}{limit}", ha="center", fontsize=13)
        axes.set_axis_off()
        return
    edges = np.array(column.edges)
    axes.bar(edges[:-1], column.counts, np.diff(edges), align="edge", color=_BLUE)
    axes.axvline(column.median, color=_RED, linewidth=1)
    axes.set_title(f"{name}\nmedian {column.median:.4g}{limit}", fontsize=11)
    axes.set_ylabel("items")
    axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _resolutions(axes: Axes, part: Survey) -> None:
    bars = list(part.resolutions.items())
    more = sum(count for _, count in bars[_RESOLUTIONS:])
    bars = bars[:_RESOLUTIONS] + ([("others", more)] if more else [])
    names, counts = zip(*bars, strict=True)
    axes.barh(names, counts, color=_BLUE)
    axes.set_ylim(max(len(bars), 4) - 0.5, -0.5)  # the first one on top, none too thick
    axes.set_title("resolution of the file (pixels)", fontsize=11)
    axes.set_xlabel("items")
    axes.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    axes.spines[["top", "right"]].set_visible(False)


def _filling(axes: Axes, part: Survey) -> None:
    """Tokens that are computed for all items, by bucket, the real ones apart."""
    used = [bucket for bucket in part.buckets if bucket.items]
    computed = np.array([bucket.tokens * bucket.items for bucket in used], float)
    real = computed / np.array([bucket.token_ratio for bucket in used])
    places = np.arange(len(used))
    axes.bar(places, real, 0.6, color=_BLUE, label="real")
    axes.bar(places, computed - real, 0.6, bottom=real, color=_GREY, label="padding")
    for place, bucket in enumerate(used):
        told = f"{bucket.items} items\nx {bucket.token_ratio:.2f}"
        axes.annotate(told, (place, computed[place]), ha="center", va="bottom", fontsize=9)
    axes.set_xticks(places, [str(bucket.tokens) for bucket in used])
    axes.set_xlim(-0.9, len(used) - 0.1)
    axes.set_ylim(0, 1.45 * computed.max())
    axes.yaxis.set_major_formatter(EngFormatter(sep=""))
    axes.set_title("tokens of all items by bucket", fontsize=11)
    axes.set_xlabel("bucket (tokens)")
    axes.legend(fontsize="small", loc="upper left", ncols=2, frameon=False)
    axes.spines[["top", "right"]].set_visible(False)


# ---- the page ----


def page(found: Inspection, config: Config, pictures: str) -> str:
    """The HTML; whatever users wrote is escaped."""
    loader = jinja2.FileSystemLoader(Path(__file__).parent)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    template = environment.get_template("page.html")
    return template.render(
        found=found,
        config=config,
        parts=(("Training data", found.train), ("Evaluation data", found.evaluation)),
        pictures=pictures,
        kinds=kinds,
        rows=_ROWS,
    )
