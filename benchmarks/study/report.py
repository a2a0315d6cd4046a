"""What came out: means with 95 % confidence intervals, differences for each claim, and curves.

Legend: S seeds, I items of one task in one test set, R replicates of the bootstrap.

Both seeds and items are drawn anew in every replicate, for another run and another test set would
be other ones. Two arms are compared on the same draws, and where both have seeds, on the same ones.
"""

from __future__ import annotations

import collections
import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any, Final

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.study.arms import ARMS, CLAIMS

REPLICATES: Final = 10_000
BEGIN: Final = "<!-- tables -->\n"
END: Final = "<!-- end of tables -->\n"
TESTS: Final = {"eval": "clips like those of training", "spliced": "spliced real films"}
SCORES: Final = {  # task and component of each
    "mcqa/accuracy": ("mcqa", "choice"),
    "tvg/mIoU": ("tvg", "iou"),
    "gqa/accuracy": ("gqa", "choice"),
    "gqa/mIoU": ("gqa", "iou"),
}
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


def results(out: Path, runs: Sequence[tuple[str, int]]) -> dict[str, Any]:
    """All figures of the finished runs (arm, seed), as a table for JSON.

    An interval is [mean, low, high]; a claim without both arms has none.
    """
    scored: dict[str, list[dict[tuple[str, str], np.ndarray]]] = collections.defaultdict(list)
    seeds: dict[str, list[int]] = collections.defaultdict(list)
    for arm, seed in runs:
        scored[arm].append(item_scores(out / "eval" / f"{arm}-{seed}" / "predictions.jsonl"))
        seeds[arm].append(seed)
    found: dict[str, Any] = {
        "machine": f"{platform.machine()}, Python {platform.python_version()}",
        "versions": {name: version(name) for name in ("jax", "flax", "optax", "numpy")},
        "hours": round(sum(seconds(out).values()) / 3600, 2),
        "seeds": dict(seeds),
        "scores": {},
        "claims": [],
        "curves": {arm: curves(out, arm, numbers) for arm, numbers in seeds.items()},
        "seconds": seconds(out),
    }
    for test in TESTS:
        table = {
            arm: {score: interval(matrix(rows, test, score)) for score in SCORES}
            for arm, rows in scored.items()
        }
        found["scores"][test] = table
    for claim in CLAIMS:
        both = sorted(set(seeds[claim.better]) & set(seeds[claim.worse]))
        if not both:
            continue
        for test in TESTS:
            differences = {}
            for score in claim.scores:
                better, worse = (
                    matrix([scored[arm][seeds[arm].index(seed)] for seed in both], test, score)
                    for arm in (claim.better, claim.worse)
                )
                differences[score] = interval(better - worse)
            found["claims"].append({**claim._asdict(), "test": test, "differences": differences})
    return found


def item_scores(path: Path) -> dict[tuple[str, str], np.ndarray]:
    """(test set, score) -> f64[I], items by id, of the predictions of one model."""
    rows: dict[tuple[str, str], dict[str, float]] = collections.defaultdict(dict)
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line:
            row = json.loads(line)
            for score, (task, component) in SCORES.items():
                if row["record"]["task"] == task:
                    test = row["id"].partition("-")[0]
                    rows[test, score][row["id"]] = row[f"reward/{component}"]
    return {key: np.array([found[name] for name in sorted(found)]) for key, found in rows.items()}


def matrix(runs: list[dict[tuple[str, str], np.ndarray]], test: str, score: str) -> np.ndarray:
    """f64[S, I] of one arm."""
    return np.stack([run[test, score] for run in runs])


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


def seconds(out: Path) -> dict[str, float]:
    """Of one core, by job and command, all its parts together."""
    spent: dict[str, float] = collections.defaultdict(float)
    path = out / "times.jsonl"
    for line in path.read_text().split("\n") if path.is_file() else ():
        if line:
            row = json.loads(line)
            spent[f"{row['job']} {row['command']}"] += row["seconds"]
    return {name: round(value, 1) for name, value in spent.items()}


def curves(out: Path, arm: str, seeds: Sequence[int]) -> dict[str, Any]:
    """Held-out scores and the share of equal groups over the steps: a row per seed."""
    by_step: dict[int, dict[str, list[float]]] = collections.defaultdict(
        lambda: collections.defaultdict(list)
    )
    equal: list[float] = []
    for seed in seeds:
        path = out / "runs" / f"{arm}-{seed}" / "metrics.jsonl"
        lines = path.read_text().split("\n") if path.is_file() else ()
        rows = [json.loads(line) for line in lines if line]
        for row in rows:
            if row["split"] == "eval":
                for score in SCORES:
                    by_step[row["step"]][score].append(round(row[score], 4))
        shares = [row["groups/zero_variance"] for row in rows if "groups/zero_variance" in row]
        if shares:
            equal.append(round(float(np.mean(shares)), 4))
    return {"steps": {step: dict(by_step[step]) for step in sorted(by_step)}, "equal": equal}


def tables(found: dict[str, Any]) -> str:
    """The figures as Markdown."""
    words = {arm.name: arm.words for arm in ARMS}
    lines = []
    for test, title in TESTS.items():
        lines += [f"**Scores on {title}**", "", _row(["arm", "seeds", *SCORES])]
        lines.append(_row(["---"] * (2 + len(SCORES))))
        for arm, scores in found["scores"][test].items():
            cells = [f"`{arm}`: {words[arm]}", str(len(found["seeds"][arm]))]
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
    for arm, drawn in found["curves"].items():
        if drawn["equal"]:
            lines.append(f"- `{arm}`: {np.mean(drawn['equal']):.1%}")
    lines += ["", f"{found['hours']} hours of one core; {_versions(found)}."]
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


def _versions(found: dict[str, Any]) -> str:
    return ", ".join(f"{name} {number}" for name, number in found["versions"].items())


def plot(found: dict[str, Any], path: Path) -> None:
    """Held-out scores over the steps: the mean of the seeds, and from the least to the most."""
    figure = Figure(figsize=(17, 4), layout="constrained")
    FigureCanvasAgg(figure)
    for axes, (title, (names, score)) in zip(
        figure.subplots(1, len(PANELS)), PANELS.items(), strict=True
    ):
        for name in names:
            steps = found["curves"].get(name, {"steps": {}})["steps"]
            points = sorted((int(step), values[score]) for step, values in steps.items())
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
