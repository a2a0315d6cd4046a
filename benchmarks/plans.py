"""Plans every recipe for its hardware, and writes the table: benchmarks/plans.md and plans.json.

    python -m benchmarks.plans [--jobs 2] [--only 3b_v5e-64 ...]

Needs the `tpu` extra and no TPU; minutes per recipe. `--only` replaces those rows and keeps the
others, which must be of the same jax and libtpu.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import json
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

HERE = Path(__file__).parent
ROOT = HERE.parent
JSON, TABLE = HERE / "plans.json", HERE / "plans.md"
KINDS = ["all-gather", "reduce-scatter", "all-reduce", "collective-permute", "all-to-all"]


class Case(NamedTuple):
    """A recipe on the hardware that it is for."""

    name: str
    topology: str
    slices: int = 1
    config: str = ""  # if not the name
    overrides: tuple[str, ...] = ()


RECIPES = [
    Case("3b_v5e-64", "v5e:8x8"),
    Case("3b_v6e-64", "v6e:8x8"),
    Case("3b_v6e-32x2", "v6e:4x8", 2),
    Case("3b_v5p-64", "v5p:4x4x4"),
    Case("3b_tpu7x-4", "tpu7x:2x2x1"),
    Case("7b_v5e-64", "v5e:8x8"),
    Case("7b_v6e-64", "v6e:8x8"),
    Case("7b_v6e-64x2", "v6e:8x8", 2),
    Case("7b_v5p-64", "v5p:4x4x4"),
    Case("7b_tpu7x-8", "tpu7x:2x2x2"),
    Case("3b_gpu1", "h100:1"),
    Case("3b_gpu1_8k", "h100:1"),
    Case("3b_gpu8", "h100:8"),
    Case("7b_gpu8", "h100:8"),
    Case("7b_gpu1_lora", "h100:1"),
]
# The 7B recipe of 64 v5p chips, with as many prompts per chip on more of them.
WEAK_SCALING = [
    Case(
        f"weak scaling, {chips} chips",
        topology,
        config="7b_v5p-64",
        overrides=(
            f"mesh.data={chips // 64}",
            f"rollout.prompts={chips // 2}",
            f"eval.batch={chips // 2}",
        ),
    )
    for chips, topology in [
        (64, "v5p:4x4x4"),
        (256, "v5p:4x8x8"),
        (1024, "v5p:8x8x16"),
        (4096, "v5p:16x16x16"),
    ]
]


def plan(case: Case) -> dict[str, Any]:
    """One plan, in a process of its own."""
    config = ROOT / "configs" / f"{case.config or case.name}.yaml"
    command = [
        *(sys.executable, "-m", "jaxgrpo.cli", "plan", str(config), *case.overrides),
        *("--topology", case.topology, "--slices", str(case.slices), "--json"),
    ]
    done = subprocess.run(command, check=False, cwd=ROOT, capture_output=True, text=True)
    if done.returncode not in (0, 1) or not done.stdout:
        raise RuntimeError(f"{case.name}: {done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout)
    return found


# ---- the tables ----

_HEAD = """# What the recipes need

Made by `python -m benchmarks.plans` ({versions}); see [docs/plan.md](../docs/plan.md). Per device.
FLOPs are those of matrix products without attention: executed, from the compiled program, and in
brackets the ratio to the formula of `jaxgrpo/flops.py`. Attention in kernels is the formula's, for
programs do not show it. Decoding is counted to the last token. Nothing here is a time.
"""

_SCALING = """FLOPs and memory are the same per chip. Bytes are too from 256 chips on. With 64 the
`data` axis has one place, and XLA makes the gathers of weights and the scatters of their gradients
from collective-permutes that overlap with products: a ring's hops, more bytes than the results of
plain all-gathers. From 256 on the gradients are summed over `fsdp` and `data` by all-reduces and
reduce-scatters, whose results are as large for 4 replicas as for 64."""


def row(*cells: object) -> str:
    return "| " + " | ".join(map(str, cells)) + " |"


def header(*cells: str) -> list[str]:
    return [row(*cells), row(*["---"] * len(cells))]


def recipe_rows(plans: dict[str, dict[str, Any]]) -> list[str]:
    rows = header(
        *("recipe", "P, G, S, C", "devices", "mesh", "most GiB in use, of", "fits"),
        *("rollout TFLOP", "update TFLOP", "attention in the update, TFLOP", "XLA's own remat"),
    )
    for case in RECIPES:
        if (p := plans.get(case.name)) is None:
            continue
        programs = {x["name"]: x for x in p["programs"]}
        phase = max(p["phases_gib"], key=p["phases_gib"].__getitem__)
        compiled = p["programs"][0]["arguments_gib"] is not None
        attention = programs["update"]["attention_tflop"]
        if attention:
            attention += programs["update"]["kernel_formula_tflop"]
        rows.append(
            row(
                case.name,
                ", ".join(str(p["config"][x]) for x in "PGSC"),
                f"{p['slices']} x {p['topology']}" if p["slices"] > 1 else p["topology"],
                " x ".join(str(size) for size in p["mesh"].values()),
                f"{p['phases_gib'][phase]:.1f} ({phase}), {p['limit_gib']:g}",
                ("yes" if p["fits"] else "NO") + ("" if compiled else " \\*"),
                work(programs["rollout"]),
                work(programs["update"]),
                f"{attention:.3g}" if attention else "",
                sum(x["rematerialised"] for x in p["programs"]) if compiled else "",
            )
        )
    return [*rows, "", "\\* counted, a lower bound: XLA's GPU compiler needs a GPU."]


def work(program: dict[str, Any]) -> str:
    if not program["matmul_tflop"]:
        return ""
    ratio = program["matmul_tflop"] / program["formula_tflop"]
    return f"{program['matmul_tflop']:.4g} ({ratio:.3f})"


def transfer_rows(plans: dict[str, dict[str, Any]]) -> list[str]:
    rows = header("recipe", "program", *KINDS, "of it between slices")
    for case in RECIPES:
        for program in plans.get(case.name, {"programs": []})["programs"]:
            cells = []
            for kind in KINDS:
                moved = [t for t in program["transfers"] if t["kind"] == kind]
                size = sum(t["result_gib"] for t in moved)
                times = sum(t["executed"] for t in moved)
                cells.append(f"{size:.3g} ({times:g})" if moved else "")
            between = sum(t["result_gib"] for t in program["transfers"] if t["crosses_slices"])
            if program["transfers"]:
                rows.append(
                    row(case.name, program["name"], *cells, f"{between:.3g}" if between else "")
                )
    return rows


def scaling_rows(plans: dict[str, dict[str, Any]]) -> list[str]:
    rows = header(
        *("chips", "mesh", "P", "rollout TFLOP", "update TFLOP", "most GiB in use"),
        *("GiB moved in a step", *KINDS),
    )
    for case in WEAK_SCALING:
        if (p := plans.get(case.name)) is None:
            continue
        programs = {x["name"]: x for x in p["programs"]}
        moved = [t for x in p["programs"] for t in x["transfers"]]
        by_kind = [sum(t["result_gib"] for t in moved if t["kind"] == kind) for kind in KINDS]
        rows.append(
            row(
                p["devices"],
                " x ".join(str(size) for size in p["mesh"].values()),
                p["config"]["P"],
                f"{programs['rollout']['matmul_tflop']:.4g}",
                f"{programs['update']['matmul_tflop']:.4g}",
                f"{max(p['phases_gib'].values()):.2f}",
                f"{sum(by_kind):.4g}",
                *(f"{size:.3g}" for size in by_kind),
            )
        )
    return rows


def write(plans: dict[str, dict[str, Any]]) -> None:
    """Both files."""
    order = [case.name for case in RECIPES + WEAK_SCALING if case.name in plans]
    JSON.write_text(json.dumps({name: plans[name] for name in order}, indent=1) + "\n")
    compiled = next(p for p in plans.values() if "libtpu" in p["versions"])
    versions = ", ".join(f"{name} {version}" for name, version in compiled["versions"].items())
    parts = [
        _HEAD.format(versions=versions),
        *recipe_rows(plans),
        "\n## What moves between devices\n",
        "GiB of results per device in one execution of a program, and how often.\n",
        *transfer_rows(plans),
    ]
    if any(case.name in plans for case in WEAK_SCALING):
        parts += [
            "\n## Weak scaling on paper\n",
            "The 7B recipe with half a prompt per chip, on more and more chips. Per chip.\n",
            *scaling_rows(plans),
            "",
            _SCALING,
        ]
    TABLE.write_text("\n".join(parts) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--jobs", type=int, default=1, help="plans made at once")
    parser.add_argument("--only", nargs="*", help="cases by name; the others are kept")
    options = parser.parse_args()
    cases = [c for c in RECIPES + WEAK_SCALING if not options.only or c.name in options.only]
    plans = json.loads(JSON.read_text()) if options.only and JSON.exists() else {}
    with concurrent.futures.ThreadPoolExecutor(options.jobs) as pool:
        futures = {pool.submit(plan, case): case for case in cases}
        for future in concurrent.futures.as_completed(futures):
            case = futures[future]
            plans[case.name] = future.result()
            print(f"{case.name}: {'fits' if plans[case.name]['fits'] else 'DOES NOT FIT'}")
            write(plans)  # what is done is kept if the next one fails
    print(f"wrote {TABLE.relative_to(ROOT)} and {JSON.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
