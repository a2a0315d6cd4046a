"""What came out: means with 95 % confidence intervals, differences for each claim, and curves.

Legend: S seeds, I items of one task in one test set, R replicates of the bootstrap.

Both seeds and items are drawn anew in every replicate, for another run and another test set would
be other ones. Two arms are compared on the same draws, and where both have seeds, on the same ones.
"""

from __future__ import annotations

import collections
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.study.arms import ARMS, CLAIMS
from benchmarks.study.results import SCORES, Result

REPLICATES: Final = 10_000
BEGIN: Final = "<!-- tables -->\n"
END: Final = "<!-- end of tables -->\n"
TESTS: Final = {"eval": "clips like those of training", "spliced": "spliced real films"}
PANELS: Final = {  # of the curves: title, arms, score
    "few labels": (("sft-few", "told-few", "grpo-few"), "tvg/mIoU"),
    "which items": (("all", "random", "selected", "drawn", "online"), "mcqa/accuracy"),
    "which of bad ones": (
        ("noisy-all", "noisy-random", "noisy-drawn", "noisy-selected", "noisy-online"),
        "tvg/mIoU",
    ),
    "rewards: where": (("choice", "iou", "dual"), "gqa/mIoU"),
    "rewards: what": (("choice", "iou", "dual"), "gqa/accuracy"),
}


def figures(results: Sequence[Result]) -> dict[str, Any]:
    """All figures of the finished runs.

    An interval is [mean, low, high]; a claim without both arms has none.
    """
    runs: dict[str, dict[int, Result]] = collections.defaultdict(dict)
    for result in results:
        runs[result.arm][result.seed] = result
    found: dict[str, Any] = {
        "versions": sorted({words for result in results for words in _versions(result)}),
        "hours": sum(sum(result.seconds.values()) for result in results) / 3600,
        "seeds": {arm: len(of_arm) for arm, of_arm in runs.items()},
        "scores": {},
        "claims": [],
        "curves": {arm: curves(list(of_arm.values())) for arm, of_arm in runs.items()},
        "equal": {
            arm: float(np.mean(shares))
            for arm, of_arm in runs.items()
            if (shares := [run.equal for run in of_arm.values() if run.equal is not None])
        },
    }
    for test in TESTS:
        found["scores"][test] = {
            arm: {score: interval(matrix(of_arm.values(), test, score)) for score in SCORES}
            for arm, of_arm in runs.items()
        }
    for claim in CLAIMS:
        both = sorted(runs[claim.better].keys() & runs[claim.worse].keys())
        if not both:
            continue
        for test in TESTS:
            differences = {}
            for score in claim.scores:
                better, worse = (
                    matrix([runs[arm][seed] for seed in both], test, score)
                    for arm in (claim.better, claim.worse)
                )
                differences[score] = interval(better - worse)
            found["claims"].append({**claim._asdict(), "test": test, "differences": differences})
    return found


def matrix(runs: Iterable[Result], test: str, score: str) -> np.ndarray:
    """f64[S, I] of one arm."""
    return np.array([run.scores[test][score] for run in runs])


def interval(values: np.ndarray, replicates: int = REPLICATES) -> list[float]:
    """[mean, low, high]: a mean over f64[S, I] and its bootstrap interval over seeds and items.

    The draws depend on S and I only, so that differences of arms are paired.

        [[0, 1], [0, 1]]: the mean 0.5, between 0 and 1, for two items may both be the same one
    """
    seeds, items = values.shape
    rng = np.random.default_rng((seeds, items))
    by_seed = rng.multinomial(seeds, np.full(seeds, 1 / seeds), replicates) / seeds  # [R, S]
    by_item = rng.multinomial(items, np.full(items, 1 / items), replicates) / items  # [R, I]
    means = np.einsum("rs,si,ri->r", by_seed, values, by_item, optimize=True)
    return [round(float(x), 4) for x in (values.mean(), *np.quantile(means, (0.025, 0.975)))]


def curves(runs: Sequence[Result]) -> dict[int, dict[str, list[float]]]:
    """Held-out scores over the steps, one of each run of an arm."""
    found: dict[int, dict[str, list[float]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    for run in runs:
        for step, values in run.curves.items():
            for score, value in values.items():
                found[int(step)][score].append(value)
    return {step: dict(found[step]) for step in sorted(found)}


def tables(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    words = {arm.name: arm.words for arm in ARMS}
    lines = []
    for test, title in TESTS.items():
        lines += [f"**Scores on {title}**", "", _row(["arm", "seeds", *SCORES])]
        lines.append(_row(["---"] * (2 + len(SCORES))))
        for arm, scores in found["scores"][test].items():
            cells = [f"`{arm}`: {words[arm]}", str(found["seeds"][arm])]
            lines.append(_row([*cells, *(_shown(scores[score]) for score in SCORES)]))
        lines.append("")
    lines += ["**Differences**, better - worse", "", _row(["claim", "arms", "test", *SCORES])]
    lines.append(_row(["---"] * (3 + len(SCORES))))
    for claim in found["claims"]:
        cells = [claim["words"], f"`{claim['better']}` - `{claim['worse']}`", claim["test"]]
        differences = claim["differences"]
        cells += [_shown(differences[x], sign=True) if x in differences else "" for x in SCORES]
        lines.append(_row(cells))
    lines += ["", "**Groups whose rewards are all equal**, mean of all steps", ""]
    lines += [f"- `{arm}`: {share:.1%}" for arm, share in found["equal"].items()]
    lines += ["", f"{found['hours']:.1f} hours of one core; {', '.join(found['versions'])}."]
    return "\n".join(lines)


def write_page(found: dict[str, Any], page: Path) -> None:
    """Puts the tables between the two marks of a Markdown page."""
    text = page.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    page.write_text(f"{before}{BEGIN}\n{tables(found)}\n\n{END}{rest.split(END)[1]}")


def _row(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(values: Sequence[float], sign: bool = False) -> str:
    """0.448 [0.431, 0.465]; in bold where an interval of a difference leaves 0 out."""
    mean, low, high = (format(x, "+.3f" if sign else ".3f") for x in values)
    text = f"{mean} [{low}, {high}]"
    return f"**{text}**" if sign and (values[1] > 0 or values[2] < 0) else text


def _versions(result: Result) -> Iterable[str]:
    return (f"{name} {number}" for name, number in result.versions.items())


def plot(found: dict[str, Any], path: Path) -> None:
    """Held-out scores over the steps: the mean of the seeds, and from the least to the most."""
    figure = Figure(figsize=(17, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, (names, score)) in zip(
        figure.subplots(1, len(PANELS)), PANELS.items(), strict=True
    ):
        for name in names:
            steps = found["curves"].get(name, {})
            points = [(step, values[score]) for step, values in steps.items()]
            if points:
                x = [step for step, _ in points]
                axes.plot(x, [np.mean(values) for _, values in points], label=name)
                low, high = ([end(values) for _, values in points] for end in (min, max))
                axes.fill_between(x, low, high, alpha=0.15)
        axes.set(title=title, xlabel="step", ylabel=score)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend(fontsize="small")
    figure.savefig(path, dpi=110)
