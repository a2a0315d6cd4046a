"""What a step on a very long video holds in memory: nothing as large as a prompt squared.

    python -m benchmarks.long_prompts [--tokens 16000] [--layers 2] [--topology v5e:2x4]

Compiles the rollout, the reference pass and the update for a TPU slice that need not be there, with
the 3B model's widths, and lists the arrays of the compiled programs that have two axes at least as
long as the prompt: scores or masks of a prompt over itself would be such. Exits with 1 if there is
one. Needs the `tpu` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import sys
import time

from jaxgrpo.config import Config, DataSection, MeshSection, ModelSection, RolloutSection
from jaxgrpo.load import config_directory
from jaxgrpo.plan import assumed_bucket, lower_programs
from jaxgrpo.sharding import make_mesh
from jaxgrpo.topology import GIB, before_jax_starts, find
from models.qwen2_5_vl.config import ModelConfig

MODEL = "Qwen/Qwen2.5-VL-3B-Instruct"


def quadratic(text: str, tokens: int) -> set[str]:
    """The shapes in a program's text that have two axes of at least `tokens`.

    Example: of f32[2,600,700] and bf16[2,600,64], at 600, the first.
    """
    shapes = set(re.findall(r"\b(?:pred|[suf]\d+|bf16)\[[\d,]+\]", text))
    return {x for x in shapes if sum(int(n) >= tokens for n in re.findall(r"\d+", x[4:])) > 1}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=16000, help="of the prompt")
    parser.add_argument("--layers", type=int, default=2, help="of text and of vision")
    parser.add_argument("--topology", default="v5e:2x4")
    options = parser.parse_args()
    topology = find(options.topology, 1)
    before_jax_starts(topology)
    model = ModelConfig.load(config_directory(MODEL))
    model = dataclasses.replace(
        model,
        text=dataclasses.replace(model.text, layers=options.layers),
        vision=dataclasses.replace(
            model.vision, depth=options.layers, full_attention_blocks=(options.layers - 1,)
        ),
    )
    data = DataSection(
        train="-", buckets=(options.tokens,), total_pixels=(options.tokens - 256) * 28 * 28
    )
    config = Config(
        "-",
        ModelSection(MODEL),
        data,
        rollout=RolloutSection(prompts=4, group=8, max_new_tokens=256),
        mesh=MeshSection(fsdp=4, tensor=2),
    )
    bucket = assumed_bucket(config.data, model)
    mesh = make_mesh(config.mesh, topology.describe())
    _, programs = lower_programs(config, mesh, model, bucket, topology)
    found = False
    for name, program in programs.items():
        begun = time.perf_counter()
        compiled = program.compile()
        large = quadratic(compiled.as_text(), options.tokens)
        peak = compiled.memory_analysis().peak_memory_in_bytes / GIB
        found |= bool(large)
        print(
            f"{name}: {bucket.tokens} prompt tokens, {bucket.patches} patches, peak {peak:.2f} GiB "
            f"a device, compiled in {time.perf_counter() - begun:.0f} s; as long in two axes: "
            f"{', '.join(sorted(large)) or 'none'}",
            flush=True,
        )
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
