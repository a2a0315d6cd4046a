"""What a step costs whatever the clock says: executables, FLOPs and peak bytes of its programs.

    python -m benchmarks.guard [--write]

Compiles the programs of a step of the quickstart and of the 32 M model (`cpu-1024` of
`benchmarks/grpo_step.py`) for one CPU and compares them with benchmarks/guard.json, which `--write`
replaces. A test does the same: a change that computes something twice, compiles one program more
or keeps more in memory fails it, and one that saves is committed with its new figures.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from benchmarks.grpo import ours
from benchmarks.grpo.workload import WORKLOADS, raw_config
from jaxgrpo import config as configs
from jaxgrpo import hlo
from jaxgrpo.config import Config, MeshSection
from jaxgrpo.flops import branch_shares, is_attention
from jaxgrpo.load import choose_backend, make_policy, open_processor, vocabulary_of
from jaxgrpo.metrics import CompileCounter
from jaxgrpo.plan import assumed_bucket
from jaxgrpo.policy import Policy
from jaxgrpo.programs import lower_train, lower_weights
from jaxgrpo.sharding import make_mesh
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.sizes import Size

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = ROOT / "benchmarks" / "guard.json"
FLOPS_TOLERANCE, BYTES_TOLERANCE = 1e-6, 0.02


def quickstart() -> tuple[Config, Policy, Size]:
    config = configs.load(ROOT / "configs" / "quickstart.yaml", [])
    model = dataclasses.replace(config.model, path=str(ROOT / config.model.path))
    config = dataclasses.replace(config, model=model)
    processor = open_processor(config)
    policy = make_policy(
        config.model,
        processor.config,
        vocabulary_of(processor),
        choose_backend(config.model, "cpu"),
        temperature=config.rollout.temperature,
    )
    return config, policy, assumed_bucket(config.data, policy.config)


def cpu_1024() -> tuple[Config, Policy, Size]:
    workload = WORKLOADS["cpu-1024"]
    config = ours.settings(workload, Path("-"))
    model = ModelConfig.from_dict(raw_config(workload.model), source=workload.model)
    backend = choose_backend(config.model, "cpu")
    policy = make_policy(config.model, model, ours.vocabulary(workload), backend, temperature=1.0)
    return config, policy, workload.prompt(0).size


STEPS = {"quickstart": quickstart, "cpu-1024": cpu_1024}


def measure(name: str) -> dict[str, Any]:
    """The figures of one step."""
    config, policy, bucket = STEPS[name]()
    mesh = make_mesh(MeshSection(), jax.devices()[:1])
    with CompileCounter() as compilations:
        weights = lower_weights(config, mesh, policy, 10, reference=bool(config.grpo.kl))
        lowered = lower_train(config, mesh, policy, bucket, weights)
        programs = {"publish": weights.to_sampler, "rollout": lowered.rollout}
        for length, learn in lowered.learn.items():
            for part, program in learn._asdict().items():
                if program is not None:
                    programs[f"{part} of {length} tokens"] = program
        compiled = {part: program.compile() for part, program in programs.items()}
    figures = {}
    for part, program in compiled.items():
        text, memory = program.as_text(), program.memory_analysis()
        assert text is not None and memory is not None, "XLA gives both on CPUs"
        work = hlo.read(
            text,
            loop_limit=config.rollout.max_new_tokens,
            branch_shares=branch_shares(policy.config.vision),
        ).work
        figures[part] = {
            "matmul_flops": work.flops(lambda matmul: not is_attention(matmul)),
            "attention_flops": work.flops(is_attention),
            "peak_bytes": memory.temp_size_in_bytes
            + memory.argument_size_in_bytes
            + memory.output_size_in_bytes
            - memory.alias_size_in_bytes,
        }
    return {"executables": compilations.total, "programs": figures}


def versions() -> dict[str, str]:
    return {name: version(name) for name in ("jax", "jaxlib")}


def differences(found: dict[str, Any], committed: dict[str, Any]) -> list[str]:
    """What is no longer as committed, in words; all of it for other programs."""
    if found["executables"] != committed["executables"]:
        return [f"executables: {found['executables']}, committed {committed['executables']}"]
    lines = []
    for part, figures in found["programs"].items():
        for name, value in figures.items():
            tolerance = BYTES_TOLERANCE if name.endswith("bytes") else FLOPS_TOLERANCE
            before = committed["programs"].get(part, {}).get(name)
            if before is None or abs(value - before) > tolerance * before:
                lines.append(f"{part}: {name} {value}, committed {before}")
    return lines


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="replace the committed figures")
    options = parser.parse_args()
    found = {"versions": versions(), "steps": {name: measure(name) for name in STEPS}}
    if options.write:
        COMMITTED.write_text(json.dumps(found, indent=1) + "\n")
        print(f"wrote {COMMITTED.relative_to(ROOT)}")
        return 0
    committed = json.loads(COMMITTED.read_text())
    lines = [
        f"{name}: {line}"
        for name in STEPS
        for line in differences(found["steps"][name], committed["steps"][name])
    ]
    print("\n".join(lines) or f"as committed ({committed['versions']})")
    return int(bool(lines))


if __name__ == "__main__":
    raise SystemExit(main())
