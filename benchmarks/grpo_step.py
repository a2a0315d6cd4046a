"""A whole GRPO step, side by side: ours against PyTorch, on the same weights and prompts.

    python -m benchmarks.grpo_step --workload cpu-1024 [--json FILE] [--steps 3] [--rounds 2]
    python -m benchmarks.grpo_step --workload text-512 [--trl-python P] [--tunix-python P]

A step is: G completions of one video prompt are sampled (forced to full length), rewarded and
trained on, with the vision tower trained and no reference model. The sides (`benchmarks/grpo/`)
take turns, each turn in a process of its own that compiles, warms up and then measures. Before
anything is timed, all sides must find the same gradient norm on given completions.

No other trainer takes videos. On text alone (text-512) the other sides are TRL's and Tunix's, where
they are installed; they may have Pythons of their own, with what `.[test]` installs beside them.

A step during which other processes used more than a tenth of the CPUs is left out and counted.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.grpo.text import write_text_part
from benchmarks.grpo.workload import WORKLOADS, Workload, write_model

SIDES = {
    "ours": "jaxgrpo",
    "usual": "PyTorch, usual",
    "best": "PyTorch, best effort",
    "trl": "TRL GRPOTrainer",
    "tunix": "Tunix GRPOLearner",
}
# What a side of another library must be able to import.
NEEDED = {
    "trl": "from trl import GRPOTrainer",
    "tunix": "from tunix.rl.grpo.grpo_learner import GRPOLearner",
}
TEXT = "text"  # folder of the model's text part, beside the model
MOST_OTHERS = 0.1  # share of the CPUs that other processes may use during a step
# By how much gradient norms may differ between the sides.
GRADIENT_TOLERANCE = {"float32": 1e-3, "bfloat16": 0.1}


def sides_of(workload: Workload) -> tuple[str, ...]:
    """Who can do it."""
    return ("ours", "usual", "best") if workload.video else ("ours", *NEEDED)


def missing(side: str, python: str) -> str | None:
    """Why a side cannot be measured with this Python; None: it can."""
    if side not in NEEDED:
        return None
    done = subprocess.run([python, "-c", NEEDED[side]], check=False, capture_output=True, text=True)
    return done.stderr.strip().splitlines()[-1] if done.returncode else None


def turn(side: str, name: str, directory: Path, steps: int, python: str) -> list[dict[str, Any]]:
    """One side's turn: what it says first, then its steps."""
    command = [python, "-m", "benchmarks.grpo_step", "--workload", name, "--side", side]
    command += ["--model", str(directory), "--steps", str(steps)]
    environment = os.environ | {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"}
    done = subprocess.run(command, check=False, stdout=subprocess.PIPE, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{SIDES[side]} failed with exit code {done.returncode}: see above")
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]


def be(side: str, workload: Workload, directory: Path, steps: int) -> None:
    """Runs one side in this process, a JSON line at a time."""
    if side == "ours":
        from benchmarks.grpo import ours

        lines = ours.run(workload, directory, steps)
    elif side == "trl":
        from benchmarks.grpo import trl

        lines = trl.run(workload, directory / TEXT, steps)
    elif side == "tunix":
        from benchmarks.grpo import tunix

        lines = tunix.run(workload, directory / TEXT, steps)
    else:
        from benchmarks.grpo import pytorch

        lines = pytorch.run(workload, directory, steps, "usual" if side == "usual" else "best")
    for line in lines:
        print(json.dumps(line), flush=True)


# ---- what was found ----


def check_gradients(first: dict[str, dict[str, Any]], dtype: str) -> None:
    """All sides do the same work, or nothing is compared; Tunix alone does not tell."""
    expected = first["ours"]["grad_norm"]
    for side, found in first.items():
        if "grad_norm" not in found and side == "tunix":
            continue
        if not abs(found["grad_norm"] / expected - 1) <= GRADIENT_TOLERANCE[dtype]:
            raise SystemExit(
                f"gradient norm on the same completions: ours {expected:.6g}, {SIDES[side]} "
                f"{found['grad_norm']:.6g}: the sides do not compute the same"
            )


def summary(steps: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and spreads over the undisturbed steps."""
    quiet = [step for step in steps if step["others"] <= MOST_OTHERS]
    kept = quiet or steps
    names = [name for name in ("rollout", "rewards", "update", "step") if name in kept[0]]
    return {
        "seconds": {name: statistics.median(step[name] for step in kept) for name in names},
        "fastest": {name: min(step[name] for step in kept) for name in names},
        "slowest": {name: max(step[name] for step in kept) for name in names},
        "peak_gib": max(step["gib"] for step in steps),
        "steps": len(kept),
        "disturbed": len(steps) - len(quiet),
        "others": max(step["others"] for step in kept),
    }


def judged(ours: dict[str, Any], first: dict[str, Any], workload: Workload) -> dict[str, Any]:
    """How close ours is to what the machine can do, as measured in the same process."""
    machine, seconds = first["machine"], ours["seconds"]
    before = statistics.median(first["first_token_seconds"][1:])
    token = (seconds["rollout"] - before) / (workload.length - 1)
    return {
        "machine": machine,
        "update_share_of_peak": first["flops"]["update"] / seconds["update"] / machine["flops"],
        "flops": first["flops"],
        "first_token_seconds": before,
        "seconds_per_decoded_token": token,
        "decode_share_of_bandwidth": first["decode_bytes"] / token / machine["bytes"],
        "compile_seconds": first["compile_seconds"],
    }


def table(result: dict[str, Any]) -> str:
    """For people."""
    sides, tokens = result["sides"], result["tokens"]
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    columns = ("rollout", "rewards", "update", "step s", "tokens/s", "peak GiB")
    of_video = f"{tokens['video']} of {tokens['prompt']} prompt tokens are video, "
    lines = [
        f"{result['workload']}: "
        + (of_video if tokens["video"] else f"{tokens['prompt']} prompt tokens, all text, ")
        + f"{tokens['group']} completions of {tokens['length']}, {result['dtype']}",
        f"on {result['device']}, {versions}",
        "",
        " " * 22 + "".join(f"{name:>10}" for name in columns),
    ]
    for side, found in sides.items():
        seconds = found["seconds"]
        phases = {"rollout": ".3f", "rewards": ".4f", "update": ".3f"}  # trainers tell none
        cells = (format(seconds[x], to) if x in seconds else "" for x, to in phases.items())
        rate = tokens["group"] * tokens["length"] / seconds["step"]
        lines.append(
            f"{SIDES[side]:22}{''.join(f'{cell:>10}' for cell in cells)}"
            f"{seconds['step']:>10.3f}{rate:>10.1f}{found['peak_gib']:>10.2f}"
        )
    lines += [f"{SIDES[side]:22}not measured: {why}" for side, why in result["missing"].items()]
    lines.append("")
    for side, ratio in result["ratio"].items():
        memory = sides["ours"]["peak_gib"] / sides[side]["peak_gib"]
        lines.append(
            f"{SIDES[side]} / ours: {ratio:.2f} x the time; ours needs {memory:.2f} of its memory"
        )
    limits = result["limits"]
    lines.append(
        f"ours: update at {limits['update_share_of_peak']:.0%} of the FLOP/s of a product measured "
        f"here, decoding at {limits['decode_share_of_bandwidth']:.0%} of the bytes/s of a copy"
    )
    for side, found in sides.items():
        spread = f"{found['fastest']['step']:.3f} to {found['slowest']['step']:.3f} s"
        lines.append(
            f"{SIDES[side]}: {found['steps']} steps of {spread}, {found['disturbed']} left out as "
            f"disturbed, others used at most {found['others']:.0%} of the CPUs"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--workload", required=True, choices=WORKLOADS)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.add_argument("--steps", type=int, default=3, help="measured in a turn")
    parser.add_argument("--rounds", type=int, default=2, help="turns of each side")
    parser.add_argument("--sides", nargs="*", choices=SIDES, help="default: all that can")
    for side in NEEDED:
        parser.add_argument(f"--{side}-python", default=sys.executable, help=f"that has {side}")
    parser.add_argument("--side", choices=SIDES, help=argparse.SUPPRESS)  # in its own process
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    workload = WORKLOADS[options.workload]
    if options.side:
        return be(options.side, workload, options.model, options.steps)

    pythons = dict.fromkeys(SIDES, sys.executable)
    pythons |= {"trl": options.trl_python, "tunix": options.tunix_python}
    possible = sides_of(workload)
    wanted = options.sides or possible
    if wrong := [side for side in wanted if side not in possible]:
        parser.error(f"--sides: {options.workload} has {', '.join(possible)}; not {wrong[0]}")
    absent = {side: why for side in wanted if (why := missing(side, pythons[side]))}
    first: dict[str, dict[str, Any]] = {}
    steps: dict[str, list[dict[str, Any]]] = {side: [] for side in wanted if side not in absent}
    with tempfile.TemporaryDirectory() as folder:
        model = Path(folder)
        write_model(workload.model, workload.dtype, model)
        if not workload.video:
            write_text_part(workload.model, workload.dtype, model, model / TEXT)
        for number in range(options.rounds):
            for side in steps:
                first[side], *measured = turn(
                    side, options.workload, model, options.steps, pythons[side]
                )
                steps[side] += measured
                shown = ", ".join(f"{step['step']:.2f}" for step in measured)
                print(f"round {number + 1}, {SIDES[side]}: {shown} s", file=sys.stderr, flush=True)
            check_gradients(first, workload.dtype)

    prompt = workload.prompt(0).size
    sides = {side: summary(found) for side, found in steps.items()}
    result = {
        "workload": options.workload,
        "command": f"python -m benchmarks.grpo_step --workload {options.workload} "
        f"--steps {options.steps} --rounds {options.rounds}",
        "device": f"{first['ours']['device']} ({platform.machine()}, {os.cpu_count()} CPUs)",
        "versions": {name: version(name) for name in ("jax", "jaxlib", "torch", "transformers")}
        | {name: x for found in first.values() for name, x in found.get("versions", {}).items()},
        "missing": absent,
        "dtype": workload.dtype,
        "tokens": {
            "video": workload.video.patches // 4 if workload.video else 0,
            "prompt": prompt.tokens,
            "group": workload.group,
            "length": workload.length,
        },
        "ratio": {
            side: found["seconds"]["step"] / sides["ours"]["seconds"]["step"]
            for side, found in sides.items()
            if side != "ours"
        },
        "sides": sides,
        "limits": judged(sides["ours"], first["ours"], workload),
        "grad_norm": {side: x["grad_norm"] for side, x in first.items() if "grad_norm" in x},
    }
    print(table(result))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
