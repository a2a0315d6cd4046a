"""`jaxgrpo plan CONFIG --topology NAME`: what a run will need, before any hardware is rented.

The very programs that training calls are lowered for the named devices and, for TPUs, compiled:
libtpu needs no TPU for that. What comes out is what the compiler says (memory, products,
collectives) and what follows from shapes. Times and utilisation cannot be known this way and are
not printed. For GPUs, whose compiler needs a GPU, programs are lowered and memory is counted.

Legend: P prompts in a step, G completions per prompt, S prompt tokens, C completion tokens.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import json
import math
import re
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.stages import Lowered

from jaxgrpo import flops, hlo, memory
from jaxgrpo.config import Config, DataSection
from jaxgrpo.dataset import bucket_offer
from jaxgrpo.inputs import pixel_limits
from jaxgrpo.load import choose_backend, config_directory, make_policy
from jaxgrpo.policy import Vocabulary
from jaxgrpo.programs import WeightPrograms, lower_train, lower_weights
from jaxgrpo.sharding import DATA, FSDP, check_divides, make_mesh
from jaxgrpo.topology import GIB, Topology, find
from models.attention_backend import XLA, Backend
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.sizes import Size, media_grid, media_size

# XLA words it in two ways: "Used 20.1G of 15.7G hbm", "... (35.7G) exceeds available HBM".
_ASKED = re.compile(r"(?:Used |\()([\d.]+)([KMG])(?: of|\) exceeds)")
_TEXT_TOKENS = 256  # of a prompt, around its video
_VIDEO = (720, 1280)  # height and width of the video that a plan assumes, before resizing
_SECONDS = (8, 30, 120)  # its lengths; a bucket offers the most that any of them needs


@dataclasses.dataclass(frozen=True)
class Transfer:
    """Collectives of one kind in one execution of a program, per device."""

    kind: str
    crosses_slices: bool
    executed: float
    result_gib: float


@dataclasses.dataclass(frozen=True)
class ProgramPlan:
    """One compiled program, per device."""

    name: str
    peak_gib: float | None  # arguments included; of one that does not fit: what it asked for
    counted_gib: dict[str, float] = dataclasses.field(default_factory=dict)  # without a compiler
    compile_seconds: float | None = None
    arguments_gib: float | None = None  # exact
    donated_gib: float | None = None
    matmul_tflop: float | None = None  # executed, attention left out
    formula_tflop: float | None = None
    attention_tflop: float | None = None  # executed on XLA
    attention_formula_tflop: float | None = None
    kernel_formula_tflop: float | None = None  # attention in kernels, which are not in the text
    rematerialised: int | None = None  # instructions that XLA computes again by its own choice
    transfers: tuple[Transfer, ...] = ()
    upper_bounds: tuple[str, ...] = ()  # loops counted at their limit
    unknown: tuple[str, ...] = ()  # kernels whose work is not in the figures
    error: str | None = None


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a config needs on a topology."""

    config: dict[str, Any]  # model, P, G, S, C and the micro-batches
    bucket: dict[str, int]
    topology: str
    slices: int
    devices: int
    mesh: dict[str, int]
    limit_gib: float  # memory of a device
    fits: bool
    resident_gib: dict[str, float]  # what a device holds, by name
    phases_gib: dict[str, float]  # most memory in use while each program runs
    programs: tuple[ProgramPlan, ...]
    remedy: str | None
    versions: dict[str, str]
    note: str


def main(config: Config, topology_name: str, slices: int, as_json: bool) -> int:
    """Prints the plan; 0 if it fits, 1 if not."""
    plan = make_plan(config, find(topology_name, slices), lambda text: print(text, file=sys.stderr))
    print(json.dumps(dataclasses.asdict(plan), indent=2) if as_json else table(plan))
    return 0 if plan.fits else 1


def make_plan(config: Config, topology: Topology, progress: Callable[[str], None]) -> Plan:
    """Lowers and compiles a config's programs for a topology.

    Raises:
      ConfigError: the mesh does not fit the devices or the model, or the compiler is missing.
    """
    mesh = make_mesh(config.mesh, topology.describe())
    model = ModelConfig.load(config_directory(config.model.path))
    sizes = {
        "rollout.prompts / optim.accumulate": config.rollout.prompts // config.optim.accumulate,
        "eval.batch": config.eval.batch,
    }
    check_divides(mesh, model, sizes, replicate_kv=config.mesh.replicate_kv)
    bucket = assumed_bucket(config.data, model)
    backend = choose_backend(config.model, "tpu" if topology.is_tpu else "gpu")
    weights, programs = lower_programs(config, mesh, model, bucket, topology)

    # ---- what each needs ----
    trees = {
        "weights": weights.init.out_info.params,
        "optimiser": weights.init.out_info.opt_state,
        "frozen weights": weights.frozen,
        "reference": weights.to_reference.out_info if weights.to_reference else {},
        "sampler's copy": weights.to_sampler.out_info,
    }
    held = {name: bytes_per_device(tree) / GIB for name, tree in trees.items()}
    formulas = _formulas(config, model, bucket, backend)
    plans = []
    for name, program in programs.items():
        if topology.is_tpu:
            progress(f"compiling {name} for {topology.name} ...")
            plans.append(_compiled(name, program, formulas[name], config, model, topology))
        else:
            counted = memory.count(name, config, model, bucket, mesh, backend, held)
            plans.append(ProgramPlan(name, peak_gib=sum(counted.values()), counted_gib=counted))
    phases = _phases({p.name: p.peak_gib for p in plans}, held)
    limit = topology.usable_gib
    fits = not any(p.error for p in plans) and all(x <= limit for x in phases.values())
    return Plan(
        config={
            "model": config.model.path,
            "P": config.rollout.prompts,
            "G": config.rollout.group,
            "S": bucket.tokens,
            "C": config.rollout.max_new_tokens,
            "micro-batches": config.optim.accumulate,
            "remat": config.model.remat,
            "attention": backend.kernel,
        },
        bucket=bucket._asdict(),
        topology=topology.name,
        slices=topology.slices,
        devices=topology.devices,
        mesh=dict(mesh.shape),
        limit_gib=limit,
        fits=fits,
        resident_gib=held | memory.caches(config, model, bucket, mesh),
        phases_gib=phases,
        programs=tuple(plans),
        remedy=None if fits else remedy(config, mesh, held, limit),
        versions=_versions(topology),
        note=_TPU_NOTE if topology.is_tpu else _GPU_NOTE,
    )


_TPU_NOTE = (
    "memory, products and collectives are the compiler's; nothing is said of time. Decoding is "
    "counted to C tokens, as if no completion ended earlier. What kernels compute is not in a "
    "compiled program: attention in them is by formula (jaxgrpo/flops.py)."
)
_GPU_NOTE = (
    "programs are lowered, not compiled: XLA's GPU compiler needs a GPU, and so does lowering "
    "cuDNN's attention, in whose place XLA's is lowered. Memory is counted from shapes and is a "
    "lower bound of what XLA will use; nothing is said of time."
)


# ---- what is assumed ----


def lower_programs(
    config: Config, mesh: Mesh, model: ModelConfig, bucket: Size, topology: Topology
) -> tuple[WeightPrograms, dict[str, Lowered]]:
    """The programs of a bucket as `train.main` makes them, by name, in the order of a step."""
    backend = choose_backend(config.model, "tpu") if topology.is_tpu else XLA
    # cuDNN's kernel cannot be lowered without a GPU.
    policy = make_policy(
        config.model,
        model,
        _vocabulary(model),
        backend,
        temperature=config.rollout.temperature,
        lora=config.lora.adapters,
    )
    weights = lower_weights(
        config, mesh, policy, config.train.steps, reference=bool(config.grpo.kl)
    )
    platform = None if topology.is_tpu else "cuda"
    lowered = lower_train(config, mesh, policy, bucket, weights, platform)
    learn = lowered.learn[config.rollout.max_new_tokens]  # the longest needs the most
    programs = {"publish": weights.to_sampler, "rollout": lowered.rollout, **learn._asdict()}
    return weights, {name: program for name, program in programs.items() if program is not None}


def assumed_bucket(data: DataSection, model: ModelConfig) -> Size:
    """The largest bucket, full of 16:9 videos of 8 to 120 s at the config's frames and pixels."""
    tokens = data.buckets[-1]
    limits = pixel_limits(data)
    unit = (model.vision.patch_size * model.vision.merge_size) ** 2
    room = max(tokens - _TEXT_TOKENS, 1) * unit
    limits = dataclasses.replace(limits, total_pixels=min(limits.total_pixels, room))
    sizes = []
    for seconds in _SECONDS:
        frames = int(np.clip(seconds * data.fps, data.min_frames, data.max_frames))
        grid = media_grid(_VIDEO, frames, limits, model.vision)
        sizes.append(media_size([grid], _TEXT_TOKENS, model.vision))
    return bucket_offer(sizes, tokens)


def _vocabulary(model: ModelConfig) -> Vocabulary:
    """Stands in for the tokenizer's, which programs hold as constants."""
    return Vocabulary(np.arange(model.text.vocab) < model.text.vocab - 1, stop=(0,), pad=0)


# ---- what the compiler says ----


def _compiled(
    name: str,
    program: Lowered,
    formula: flops.Flops,
    config: Config,
    model: ModelConfig,
    topology: Topology,
) -> ProgramPlan:
    started = time.perf_counter()
    try:
        compiled = program.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        asked = _ASKED.search(str(error))
        scale = {"K": 2**-20, "M": 2**-10, "G": 1.0}
        return ProgramPlan(
            name,
            peak_gib=float(asked[1]) * scale[asked[2]] if asked else None,
            compile_seconds=time.perf_counter() - started,
            error=str(error).partition("\n")[0],
        )
    seconds = time.perf_counter() - started
    text, needed = compiled.as_text(), compiled.memory_analysis()
    assert text is not None and needed is not None, "libtpu gives both"
    report = hlo.read(
        text,
        loop_limit=config.rollout.max_new_tokens,
        branch_shares=flops.branch_shares(model.vision),
        devices_per_slice=topology.devices // topology.slices,
    )
    return ProgramPlan(
        name,
        peak_gib=needed.peak_memory_in_bytes / GIB,
        compile_seconds=seconds,
        arguments_gib=needed.argument_size_in_bytes / GIB,
        donated_gib=report.donation.bytes / GIB,
        matmul_tflop=report.work.flops(lambda m: not flops.is_attention(m)) / 1e12,
        formula_tflop=formula.matmul / 1e12 / topology.devices,
        attention_tflop=report.work.flops(flops.is_attention) / 1e12,
        attention_formula_tflop=formula.attention / 1e12 / topology.devices,
        kernel_formula_tflop=formula.kernel / 1e12 / topology.devices,
        rematerialised=len(report.work.rematerialised),
        transfers=_transfers(report.work.collectives),
        upper_bounds=tuple(f"{b.kind} {b.op_name or b.name}" for b in report.work.bounds),
        unknown=tuple(
            sorted({u.what for u in report.work.unknown if flops.SPLASH not in u.op_name})
        ),
    )


def _transfers(collectives: Sequence[hlo.Collective]) -> tuple[Transfer, ...]:
    totals: dict[tuple[str, bool], list[float]] = {}
    for c in collectives:
        total = totals.setdefault((c.kind, c.crosses_slices), [0.0, 0.0])
        total[0] += c.times
        total[1] += c.times * c.result_bytes
    return tuple(
        Transfer(kind, crosses, executed, size / GIB)
        for (kind, crosses), (executed, size) in sorted(totals.items())
    )


# ---- what follows from shapes ----


def _formulas(
    config: Config, model: ModelConfig, bucket: Size, backend: Backend
) -> dict[str, flops.Flops]:
    step = flops.Step(
        bucket,
        prompts=config.rollout.prompts,
        group=config.rollout.group,
        length=config.rollout.max_new_tokens,
        logit_chunk=config.model.logit_chunk,
        backend=backend,
        remat=config.model.remat,
        freeze_vision=config.vision_frozen,
        lora=config.lora.adapters,
    )
    # The rollout encodes the video whether the tower is frozen or not.
    sampled = dataclasses.replace(step, freeze_vision=False)
    return {
        "publish": flops.Flops(()),
        "rollout": flops.rollout_flops(model, sampled),
        "reference": flops.reference_flops(model, step),
        "update": flops.update_flops(model, step),
        "update_again": flops.update_flops(model, step),
    }


def bytes_per_device(tree: Any) -> int:
    """Bytes of a tree of arrays or shapes with shardings that one device holds."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * jnp.dtype(x.dtype).itemsize
        for x in jax.tree.leaves(tree)
    )


def _phases(peaks: dict[str, float | None], held: dict[str, float]) -> dict[str, float]:
    """Memory in use while each program runs: its own, and what is kept for the others."""
    others = {
        "publish": held["optimiser"] + held["reference"],
        "rollout": held["weights"] + held["optimiser"] + held["frozen weights"] + held["reference"],
        "reference": held["weights"] + held["optimiser"] + held["sampler's copy"],
        "update": held["reference"],  # the sampler's copy has gone
        "update_again": held["reference"],
    }
    return {name: peak + others[name] for name, peak in peaks.items() if peak is not None}


def remedy(config: Config, mesh: Mesh, held: dict[str, float], limit: float) -> str:
    """The nearest change that lowers what a device must hold."""
    rows = config.rollout.prompts // (mesh.shape[DATA] * mesh.shape[FSDP])
    if config.model.remat == "none":
        return "set model.remat=products or model.remat=layer"
    if sum(held.values()) - held["sampler's copy"] > limit / 2 and mesh.shape[DATA] > 1:
        return "split the weights further: a larger mesh.fsdp in the place of mesh.data"
    if held["sampler's copy"] > limit / 2:
        return "split the sampler's copy further: a larger mesh.tensor"
    if config.optim.accumulate < rows:
        return f"smaller micro-batches: optim.accumulate={rows}"
    if sum(held.values()) > limit / 2:
        return "a topology with more devices, and a larger mesh.fsdp"
    return (
        f"a smaller largest bucket (data.buckets, now {config.data.buckets[-1]}, with "
        "data.total_pixels), a smaller rollout.max_new_tokens or rollout.group"
    )


def _versions(topology: Topology) -> dict[str, str]:
    packages = ["jax", "jaxlib", *(["libtpu"] if topology.is_tpu else [])]
    return {package: importlib.metadata.version(package) for package in packages}


# ---- for people ----


def table(plan: Plan) -> str:
    """The plan as text."""
    c, mesh = plan.config, plan.mesh
    slices = f"{plan.slices} slices of " if plan.slices > 1 else ""
    shapes = ", ".join(f"{name} {value}" for name, value in c.items() if name != "model")
    axes = " x ".join(f"{axis} {size}" for axis, size in mesh.items())
    held = ", ".join(f"{name} {size:.2f}" for name, size in plan.resident_gib.items() if size)
    lines = [
        f"{c['model']}: {shapes}",
        f"on {slices}{plan.topology}: {plan.devices} devices ({axes}) of {plan.limit_gib:g} GiB",
        f"a device holds (GiB): {held}",
        "",
    ]
    heads = (
        *("program", "peak", "in use", "products", "ratio to", "attention", "in kernels"),
        *("XLA's", "compile"),
    )
    units = ("", "GiB", "GiB", "TFLOP", "formula", "TFLOP", "by formula", "remat", "s")
    rows = [heads, units, *(_row(p, plan.phases_gib.get(p.name)) for p in plan.programs)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(heads))]
    lines += ["  ".join(x.ljust(w) for x, w in zip(row, widths, strict=True)) for row in rows]
    for p in plan.programs:
        lines += [""] if p.transfers or p.counted_gib or p.error else []
        lines += [
            f"{p.name}: {t.kind}{' between slices' if t.crosses_slices else ''} x {t.executed:g}, "
            f"{t.result_gib:.3g} GiB"
            for t in p.transfers
        ]
        if p.counted_gib:
            parts = ", ".join(f"{name} {size:.2f}" for name, size in p.counted_gib.items())
            lines.append(f"{p.name} (GiB, counted): {parts}")
        if p.unknown:
            lines.append(f"{p.name}: kernels that are not counted: {', '.join(p.unknown)}")
        if p.error:
            lines.append(f"{p.name}: {p.error}")
    verdict = "fits" if plan.fits else f"DOES NOT FIT; nearest remedy: {plan.remedy}"
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions.items())
    return "\n".join([*lines, "", f"{verdict} ({versions})", plan.note])


def _row(p: ProgramPlan, in_use: float | None) -> tuple[str, ...]:
    def number(value: float | None, form: str = ".2f") -> str:
        return "-" if value is None else format(value, form)

    ratio = p.matmul_tflop / p.formula_tflop if p.matmul_tflop and p.formula_tflop else None
    return (
        p.name,
        number(p.peak_gib),
        number(in_use),
        number(p.matmul_tflop, ".4g"),
        number(ratio, ".3f"),
        number(p.attention_tflop, ".3g"),
        number(p.kernel_formula_tflop, ".3g"),
        number(p.rematerialised, "d"),
        number(p.compile_seconds, ".0f"),
    )
