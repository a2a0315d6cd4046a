"""How the cost of our GRPO step grows with video tokens, completions and their length.

    python -m benchmarks.growth [--steps 2] [--json FILE] [--plot FILE]   # 12 quiet minutes
    python -m benchmarks.growth --from FILE [--plot FILE]                 # what was measured before

The 32 M model, as in `grpo_step`, around one point: 1,024 video tokens, G = 8, C = 64. Times stand
beside the FLOPs of `jaxgrpo/flops.py`, at one rate for all points: that of the point in the middle.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax
import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from benchmarks.grpo import ours
from benchmarks.grpo.workload import Workload, write_model
from benchmarks.grpo_step import MOST_OTHERS
from jaxgrpo.flops import Step, rollout_flops, update_flops
from models.attention_backend import Backend
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.positions import Grid

FRAME = 64  # tokens of a temporal patch of 16 x 16
BASE = Workload("32m", Grid(1024 // FRAME, 16, 16), 76, 8, 64, "float32", remat=False)
SWEEPS: dict[str, tuple[int, ...]] = {
    "video tokens": (256, 512, 1024, 2048, 4096, 8192),
    "completions": (2, 4, 8, 16, 32),
    "completion tokens": (16, 32, 64, 128, 256),
}


def workload_at(sweep: str, value: int) -> Workload:
    """The middle point with one size changed."""
    if sweep == "video tokens":
        return BASE._replace(video=Grid(value // FRAME, 16, 16))
    return BASE._replace(**{{"completions": "group", "completion tokens": "length"}[sweep]: value})


def repeated_flops(workload: Workload, config: ModelConfig) -> int:
    """What the same step costs if every completion has a prompt of its own."""
    size = workload.prompt(0).size
    section = ours.settings(workload, Path()).model
    step = Step(
        size,
        prompts=workload.group,
        group=1,
        length=workload.length,
        logit_chunk=section.logit_chunk,
        backend=Backend(chunk=section.attention_chunk),
        remat=section.remat,
    )
    return rollout_flops(config, step).total + update_flops(config, step).total


def measure(workload: Workload, directory: Path, steps: int) -> dict[str, Any]:
    """Seconds of a step and its phases, and FLOPs."""
    first, *measured = ours.run(workload, directory, steps)
    jax.clear_caches()
    quiet = [step for step in measured if step["others"] <= MOST_OTHERS] or measured
    return {
        "seconds": {
            name: statistics.median(step[name] for step in quiet)
            for name in ("rollout", "update", "step")
        },
        "fastest": min(step["step"] for step in quiet),
        "slowest": max(step["step"] for step in quiet),
        "others": max(step["others"] for step in quiet),
        "first_token_seconds": statistics.median(first["first_token_seconds"][1:]),
        "flops": first["flops"],
        "repeated_flops": repeated_flops(workload, ModelConfig.load(directory)),
    }


def measure_all(steps: int) -> dict[str, Any]:
    """Every point of every sweep; the one in the middle once."""
    points: dict[Workload, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder:
        write_model(BASE.model, BASE.dtype, Path(folder))
        for sweep, values in SWEEPS.items():
            for value in values:
                workload = workload_at(sweep, value)
                if workload not in points:
                    points[workload] = measure(workload, Path(folder), steps)
                seconds = points[workload]["seconds"]["step"]
                print(f"{value} {sweep}: {seconds:.2f} s", flush=True)
    return {
        "command": f"python -m benchmarks.growth --steps {steps}",
        "device": f"{jax.devices()[0].device_kind} ({platform.machine()}, {os.cpu_count()} CPUs)",
        "versions": {name: version(name) for name in ("jax", "jaxlib")},
        "sweeps": {
            sweep: {str(value): points[workload_at(sweep, value)] for value in values}
            for sweep, values in SWEEPS.items()
        },
    }


# ---- what it says ----


def rate(found: dict[str, Any]) -> float:
    """FLOP/s of the step in the middle."""
    middle = found["sweeps"]["completions"][str(BASE.group)]
    return float(sum(middle["flops"].values()) / middle["seconds"]["step"])


def one_more(found: dict[str, Any]) -> tuple[float, float]:
    """(seconds of one more completion, seconds that its own tokens' FLOPs take at `rate`).

    The first is the slope of a line through the times over G, the second that of the FLOPs.
    """
    points = found["sweeps"]["completions"]
    groups = [int(group) for group in points]
    seconds = [point["seconds"]["step"] for point in points.values()]
    flops = [sum(point["flops"].values()) for point in points.values()]
    slopes = [float(np.polyfit(groups, values, 1)[0]) for values in (seconds, flops)]
    return slopes[0], slopes[1] / rate(found)


def table(found: dict[str, Any]) -> str:
    """In Markdown."""
    lines = []
    for sweep, points in found["sweeps"].items():
        lines += [
            f"| {sweep} | step s | rollout s | update s | TFLOP | s by FLOPs | ratio |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        for value, point in points.items():
            seconds, flops = point["seconds"], sum(point["flops"].values())
            expected = flops / rate(found)
            lines.append(
                f"| {int(value):,} | {seconds['step']:.2f} | {seconds['rollout']:.2f} | "
                f"{seconds['update']:.2f} | {flops / 1e12:.3g} | {expected:.2f} | "
                f"{seconds['step'] / expected:.2f} |"
            )
        lines.append("")
    seconds, by_flops = one_more(found)
    lines.append(
        f"One more completion of {BASE.length} tokens takes {seconds:.3f} s; the FLOPs of its own "
        f"tokens, at the rate of the step in the middle, {by_flops:.3f} s."
    )
    return "\n".join(lines)


def plot(found: dict[str, Any], path: Path) -> None:
    """A panel per sweep."""
    figure = Figure(figsize=(12, 4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(1, len(SWEEPS), sharey=True)
    for axes, (sweep, points) in zip(panels, found["sweeps"].items(), strict=True):
        x = [int(value) for value in points]
        step = [point["seconds"]["step"] for point in points.values()]
        low = [point["seconds"]["step"] - point["fastest"] for point in points.values()]
        high = [point["slowest"] - point["seconds"]["step"] for point in points.values()]
        by_flops = [sum(point["flops"].values()) / rate(found) for point in points.values()]
        repeated = [point["repeated_flops"] / rate(found) for point in points.values()]
        axes.errorbar(x, step, (low, high), fmt="o", label="measured", zorder=3)
        axes.plot(x, by_flops, label="its FLOPs, at one rate")
        axes.plot(x, repeated, "--", linewidth=1, label="FLOPs with a prompt per completion")
        axes.set(xscale="log", yscale="log", xlabel=sweep)
        axes.set_xticks(x, [f"{value:,}" for value in x])
        axes.minorticks_off()
        axes.grid(alpha=0.3)
    panels[0].set_ylabel("seconds of a step")
    panels[0].legend(fontsize="small")
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=2, help="measured per point")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--plot", type=Path, help="where to draw them")
    parser.add_argument("--from", type=Path, dest="before", help="figures of an earlier run")
    options = parser.parse_args()
    if options.before:
        found = json.loads(options.before.read_text())
    else:
        found = measure_all(options.steps)
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")
    if options.plot:
        plot(found, options.plot)


if __name__ == "__main__":
    main()
