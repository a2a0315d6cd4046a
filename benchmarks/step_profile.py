"""Where the time of our GRPO step goes on a CPU: products of matrices, and what else is alone.

python -m benchmarks.step_profile --workload cpu-2048
"""

from __future__ import annotations

import argparse
import collections
import gzip
import json
import re
import tempfile
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax

from benchmarks.grpo import ours
from benchmarks.grpo.workload import WORKLOADS, Workload, write_model

PRODUCTS = ("dot", "ynn_fusion")  # XLA's names of what multiplies matrices
HOLDING = ("while", "cond", "call", "async")  # operations that are made of others


def traced_step(workload: Workload, directory: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The first line of `ours` and the operations of one step after a warm-up."""
    lines = ours.run(workload, directory, 2)
    known, _ = next(lines), next(lines)
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            next(lines)
        [path] = Path(folder).glob("**/*.trace.json.gz")
        events = json.loads(gzip.decompress(path.read_bytes()))["traceEvents"]
    done = [
        event for event in events if event.get("ph") == "X" and "hlo_op" in event.get("args", {})
    ]
    return known, [event for event in done if not event["name"].startswith(HOLDING)]


def covered(events: Iterable[dict[str, Any]]) -> float:
    """Seconds in which at least one of the events was under way.

    [0, 2) and [1, 3) and [5, 6) microseconds cover 4 microseconds.
    """
    total, end = 0.0, 0.0
    for start, stop in sorted((event["ts"], event["ts"] + event["dur"]) for event in events):
        total += max(stop - max(start, end), 0)
        end = max(end, stop)
    return total / 1e6


def table(known: dict[str, Any], events: Sequence[dict[str, Any]], most: int = 12) -> str:
    """For people."""
    products = [event for event in events if event["name"].startswith(PRODUCTS)]
    whole, multiplying = covered(events), covered(products)
    flops, rate = sum(known["flops"].values()), known["machine"]["flops"]
    lines = [
        f"operations run for {whole:.2f} s of a step",
        f"  products of matrices: {multiplying:.2f} s, {flops / 1e12:.3f} TFLOP, "
        + f"{flops / multiplying / rate:.0%} of a plain product's rate",
        f"  nothing but others:   {whole - multiplying:.2f} s; by kind, in seconds of one thread:",
    ]
    others: collections.Counter[str] = collections.Counter()
    for event in events:
        if not event["name"].startswith(PRODUCTS):
            others[re.sub(r"(\.(\d+|clone))+$", "", event["name"])] += event["dur"]
    lines += [f"    {time / 1e6:6.2f}  {name}" for name, time in others.most_common(most)]
    lines.append(f"all products at a plain product's rate: {flops / rate:.2f} s")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", required=True, choices=WORKLOADS)
    workload = WORKLOADS[parser.parse_args().workload]
    with tempfile.TemporaryDirectory() as folder:
        write_model(workload.model, workload.dtype, Path(folder))
        print(table(*traced_step(workload, Path(folder))))


if __name__ == "__main__":
    main()
