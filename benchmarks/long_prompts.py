"""What a step on a very long video holds in memory: nothing as large as a prompt squared.

    python -m benchmarks.long_prompts [--tokens 16384] [--layers 1] [--xla] [--topology v5e:2x4]

Compiles the rollout, the reference pass and the update for a TPU slice that need not be there, with
the 3B model's widths, and lists the arrays of the compiled programs that are as large as a prompt
squared: scores or masks of a prompt over itself would be such. `--xla` shows that it would find
them: attention by XLA, all queries at once. Exits with 1 if there is one. Needs the `tpu` extra.
"""

from __future__ import annotations

import argparse
import dataclasses
import math
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
    """The shapes in a program's text as large as scores of a prompt over itself.

    Two of the axes are at least `tokens`, or all together hold as many numbers. Example: of
    f32[2,600,700], bf16[2,600,64] and u8[360000], at 600, the first and the last.
    """
    found = set()
    for shape in set(re.findall(r"\b[a-z]+[0-9a-z]*\[[\d,]+\]", text)):
        axes = [int(n) for n in shape.partition("[")[2].rstrip("]").split(",")]
        if sum(n >= tokens for n in axes) > 1 or math.prod(axes) >= tokens**2:
            found.add(shape)
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--tokens", type=int, default=16384, help="of the prompt")
    parser.add_argument("--layers", type=int, default=1, help="of text and of vision")
    parser.add_argument("--topology", default="v5e:2x4")
    parser.add_argument("--xla", action="store_true", help="without the kernels")
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
        ModelSection(MODEL, attention="xla" if options.xla else "auto", attention_chunk=0),
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
            f"a device, compiled in {time.perf_counter() - begun:.0f} s; as large as its square: "
            f"{', '.join(sorted(large)) or 'none'}",
            flush=True,
        )
    return int(found)


if __name__ == "__main__":
    sys.exit(main())
