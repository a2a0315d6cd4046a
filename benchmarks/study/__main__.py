"""The study: every arm with every seed, then table and curves. docs/study.md: what it found.

    python -m benchmarks.study OUT [--results FILE] [--minutes M] [--jobs N]  # what is missing
    python -m benchmarks.study OUT --report [--results FILE] [--plot FILE] [--page FILE]  # no runs

Runs may be cut short at any moment, by --minutes too: the same command goes on where they ended.
A finished one adds a line to the results, and is not run again where it has one, in another OUT or
on another machine either. With several jobs each has a core of its own. It needs the test
dependencies (for their films).
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from queue import SimpleQueue
from typing import NamedTuple

from benchmarks.study import arms, report
from benchmarks.study.arms import ARMS, Arm
from benchmarks.study.footage import write_spliced
from benchmarks.study.mislabel import mislabelled
from benchmarks.study.results import TIMES, read_results, result_of, write_results
from data.records import Record, read_manifest, write_atomically, write_manifest
from data.synthetic import SyntheticSpec, write_dataset
from jaxgrpo.preemption import EXIT_CODE
from tests.data.clips import real_clips

CONFIG = "configs/quickstart.yaml"
PLAIN = "plain.jsonl"  # the pool without its rationales
NOISY = "noisy.jsonl"  # the same with wrong labels
ORDERS = {"selected": "spread", "drawn": "random"}  # `select.order` of the items of an arm


class Job(NamedTuple):
    """An arm with a seed; arms that train nothing have one, 0."""

    arm: Arm
    seed: int

    @property
    def name(self) -> str:
        return f"{self.arm.name}-{self.seed}"


def jobs() -> Iterator[Job]:
    """All of them, seed by seed, so that what is there is comparable at any time."""
    for seed in range(arms.SEEDS):
        for arm in ARMS:
            if arm.command or seed == 0:
                yield Job(arm, seed)


def is_done(out: Path, job: Job) -> bool:
    """Whether its predictions are complete: `jaxgrpo eval` renames nothing, so they are counted."""
    expected = 2 * arms.TEST_CLIPS * len(arms.TASKS)
    path = out / "eval" / job.name / "predictions.jsonl"
    return path.is_file() and path.read_bytes().count(b"\n") == expected


def write_data(out: Path) -> None:
    """The pool, the two test sets, and for each seed the items of the small arms."""
    spec = SyntheticSpec(train_clips=arms.POOL_CLIPS, eval_clips=arms.TEST_CLIPS)
    train, _ = write_dataset(out / "data", spec)
    write_spliced(out / "data", real_clips(), arms.TEST_CLIPS)
    records = read_manifest(train, out / "data")
    plain = [dataclasses.replace(record, rationale=None) for record in records]
    write_manifest(out / "data" / PLAIN, plain)
    write_manifest(out / "data" / NOISY, mislabelled(plain, arms.WRONG))
    for seed in range(arms.SEEDS):
        for name, count in (("few", arms.FEW), ("random", arms.SUBSET)):
            write_ids(out / "data" / f"{name}-{seed}.jsonl", drawn(records, count, seed))
    write_ids(out / "data" / "gqa.jsonl", [r for r in records if r.task == "gqa"])


def drawn(records: list[Record], count: int, seed: int) -> list[Record]:
    """So many of the records, at random, equally many of each task."""
    chosen = []
    for task in arms.TASKS:
        rows = [record for record in records if record.task == task]
        rng = random.Random(f"{count} {task} {seed}")
        chosen += rng.sample(rows, count // len(arms.TASKS))
    return chosen


def write_ids(path: Path, records: list[Record]) -> None:
    """A file for `data.keep`."""
    write_atomically(path, "".join(json.dumps({"id": record.id}) + "\n" for record in records))


def commands(out: Path, job: Job) -> Iterator[list[str]]:
    """What makes its predictions: selection where it needs one, training, evaluation.

    Each is a `jaxgrpo` command that goes on where it was interrupted, and is quick when done.
    """
    arm, data = job.arm, out / "data"
    run, selection = out / "runs" / job.name, out / "runs" / f"select-{job.name}"
    common = [
        *("data.synthetic=null", f"data.root={data}", "data.threads=1"),
        *(f"compilation_cache={out / 'compiled'}", f"seed={job.seed}"),
    ]
    train = data / ("train.jsonl" if arm.told else NOISY if arm.noisy else PLAIN)
    pool = [f"data.train={train}", f"data.eval={data / 'eval.jsonl'}"]
    kept = selection / "selected.jsonl"
    files = {"gqa": data / "gqa.jsonl", "selected": kept, "drawn": kept}
    file = files.get(arm.items, data / f"{arm.items}-{job.seed}.jsonl")
    keep = [] if arm.items == "all" else [f"data.keep={file}"]
    if order := ORDERS.get(arm.items):
        rules = [*arms.SELECT, f"select.order={order}"]
        yield ["select", CONFIG, f"run_dir={selection}", *common, *pool, *rules]
    if arm.command:
        yield [
            *(arm.command, CONFIG, f"run_dir={run}", *common, *pool, *keep),
            *(f"eval.every={arms.CURVE_EVERY}", f"eval.limit={arms.CURVE_ITEMS}"),
            *(arms.SFT if arm.command == "sft" else arms.GRPO),
            *arm.overrides,
        ]
    model = run if arm.command else "models/tiny"
    tests = ", ".join(f"{{manifest: {data / name}.jsonl}}" for name in ("eval", "spliced"))
    yield [
        *("eval", CONFIG, f"run_dir={out / 'eval' / job.name}", *common),
        *(f"model.path={model}", f"data.eval_mixture=[{tests}]"),
    ]


class Runner:
    """Runs jobs in processes of their own, each on a core of its own, until the time is up."""

    def __init__(self, out: Path, results: Path, minutes: float, count: int):
        self.out = out
        self.results = results
        self.deadline = time.monotonic() + 60 * minutes
        self.cores: SimpleQueue[int] = SimpleQueue()
        for core in sorted(os.sched_getaffinity(0))[:count]:
            self.cores.put(core)
        self.writing = threading.Lock()

    def run(self, job: Job) -> None:
        """Ends with a line of results, or when the time is up; a command that fails is an error."""
        core = self.cores.get()
        try:
            done = is_done(self.out, job) or all(
                self._command(job, command, core) for command in commands(self.out, job)
            )
        finally:
            self.cores.put(core)
        if done:
            with self.writing:
                result = result_of(self.out, job.arm.name, job.seed)
                write_results(self.results, [*read_results(self.results), result])

    def _command(self, job: Job, command: list[str], core: int) -> bool:
        started = time.monotonic()
        if started > self.deadline:
            return False
        log = self.out / "logs" / f"{job.name}-{command[0]}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        with log.open("ab") as stream:
            process = subprocess.Popen(
                ["taskset", "-c", str(core), sys.executable, "-m", "jaxgrpo.cli", *command],
                stdout=stream,
                stderr=subprocess.STDOUT,
            )
            try:
                code = process.wait(max(self.deadline - started, 0))
            except subprocess.TimeoutExpired:
                process.send_signal(signal.SIGTERM)  # it saves
                code = process.wait()
        seconds = round(time.monotonic() - started, 1)
        with self.writing, (self.out / TIMES).open("a") as stream:
            line = {"job": job.name, "command": command[0], "seconds": seconds, "code": code}
            stream.write(json.dumps(line) + "\n")
        print(f"{job.name} {command[0]}: {seconds:.0f} s, exit code {code}", flush=True)
        if code not in (0, EXIT_CODE, -signal.SIGTERM):
            raise SystemExit(f"{job.name}: jaxgrpo {command[0]} failed: see {log}")
        return code == 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("out", type=Path, help="folder of data, runs and results")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="then stop")
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="at a time")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument("--results", type=Path, help="a line a run; OUT/results.jsonl if not given")
    parser.add_argument("--plot", type=Path, help="where to draw the curves")
    parser.add_argument("--page", type=Path, help="Markdown whose tables are to be replaced")
    options = parser.parse_args()
    out = options.out.resolve()
    path = options.results or out / "results.jsonl"
    if not options.report:
        there = {(result.arm, result.seed) for result in read_results(path)}
        write_data(out)
        runner = Runner(out, path, options.minutes, options.jobs)
        missing = [job for job in jobs() if (job.arm.name, job.seed) not in there]
        with ThreadPoolExecutor(options.jobs) as pool:
            list(pool.map(runner.run, missing))
    results = read_results(path)
    print(f"{len(results)} of {len(list(jobs()))} runs are there")
    found = report.figures(results)
    print(report.tables(found))
    if options.plot:
        report.plot(found, options.plot)
    if options.page:
        report.write_page(found, options.page)


if __name__ == "__main__":
    main()
