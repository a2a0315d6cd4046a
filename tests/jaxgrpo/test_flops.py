"""The formula against PyTorch's FLOP counter on the original, and against our compiled programs.

Legend: S prompt tokens, C completion tokens, T = S + C.
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import torch
from jax.sharding import SingleDeviceSharding
from torch.utils.flop_counter import FlopCounterMode

from jaxgrpo.config import GrpoSection, MeshSection
from jaxgrpo.flops import (
    Flops,
    Step,
    branch_shares,
    is_attention,
    reference_flops,
    rollout_flops,
    update_flops,
)
from jaxgrpo.hlo import Work, read
from jaxgrpo.programs import prompt_shapes, reference_program, rollout_program
from jaxgrpo.rollout import Sampling
from jaxgrpo.sharding import make_mesh
from jaxgrpo.update import UpdateBatch, grpo_gradients, split_frozen
from models.attention import attend_completions
from models.attention_backend import Backend
from models.low_rank import Lora
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import random_adapters
from models.qwen2_5_vl.positions import Grid
from models.qwen2_5_vl.processor import Prompt
from models.qwen2_5_vl.sizes import Size
from tests.jaxgrpo.aot import tpu_devices
from tests.jaxgrpo.cases import VOCAB, SmallModel, small_model
from tests.oracle import hf_model
from tests.oracle.prompts import grids, random_prompt

C = 6
LAYOUT = [3, Grid(2, 8, 16), 9]  # whole windows: the original's ragged ones are not padded


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> SmallModel:
    return small_model(tmp_path_factory.mktemp("model"), tied=True)


# ---- against PyTorch ----


class Counted(NamedTuple):
    """FLOPs that PyTorch counted."""

    products: int
    attention: int  # written as batched products (bmm); nothing else is


def counted(small: SmallModel, prompt: Prompt, *, backward: bool) -> Counted:
    """One pass of the original over [prompt, C tokens], gradients of all weights if asked for."""
    completion = np.full(C, 7, np.int32)
    with FlopCounterMode(display=False) as counter:
        logits = hf_model.logits(small.original, prompt, *grids(LAYOUT), completion)
        if backward:
            logits.sum().backward()
    by_operator = counter.get_flop_counts()["Global"]
    attention = by_operator.pop(torch.ops.aten.bmm)
    return Counted(sum(by_operator.values()), attention)


def parts(flops: Flops, *suffixes: str) -> tuple[int, int]:
    """(products, attention) of the parts whose names end so."""
    chosen = [part for part in flops.parts if part.name.split(": ")[-1] in suffixes]
    return sum(part.matmul for part in chosen), sum(part.attention for part in chosen)


@pytest.mark.parametrize("backward", [False, True])
def test_the_formula_counts_what_pytorch_counts_on_the_original(
    small: SmallModel, backward: bool
) -> None:
    """Products are equal to the last FLOP. Two things are computed differently, on purpose: the
    original projects all T positions to the vocabulary where we need C, and lets prompt tokens read
    the (masked) completion, S * C pairs that we leave out."""
    config = small.policy.config
    prompt = random_prompt(np.random.default_rng(0), LAYOUT, vocab=VOCAB)
    step = Step(prompt.size, prompts=1, group=1, length=C)
    ours = update_flops(config, step) if backward else reference_flops(config, step)
    if backward:  # the logits are made twice: a chunk's are not kept
        ours = Flops(tuple(part for part in ours.parts if "recomputed" not in part.name))
    theirs = counted(small, prompt, backward=backward)

    s, times = len(prompt.tokens), 3 if backward else 1
    text = config.text
    unread = times * text.layers * 4 * text.heads * text.head_dim * s * C
    other_logits = times * 2 * s * text.width * text.vocab
    assert ours.matmul + other_logits == theirs.products
    assert ours.attention + unread == theirs.attention


# ---- against our programs ----

BUCKET = Size(tokens=40, patches=64, windows=4, frames=2, frame_patches=48)
# One chunk of logits is not computed again on CPUs: XLA sees through it.
PLAIN = Step(BUCKET, prompts=2, group=3, length=8, logit_chunk=3)
# Two blocks of the prompt's queries, one of the completions': see the last section for more.
CHUNKED = dataclasses.replace(PLAIN, backend=Backend(chunk=24), remat="layer")
FROZEN = dataclasses.replace(PLAIN, freeze_vision=True)
# Everything has adapters and is computed again; the decoder's MLPs alone, nothing computed again.
EVERYWHERE = ("text.attention", "text.mlp", "vision.attention", "vision.mlp")
ADAPTED = dataclasses.replace(CHUNKED, lora=Lora(3, 6.0, EVERYWHERE))
ADAPTED_MLP = dataclasses.replace(FROZEN, lora=Lora(3, 6.0, ("text.mlp",)))


def executed(program: Any, config: ModelConfig) -> Work:
    """What a compiled program does."""
    return read(program.compile().as_text(), branch_shares=branch_shares(config.vision)).work


def shapes_of(small: SmallModel, step: Step) -> tuple[Any, Any, Any, Any]:
    """(policy, mesh, prompts, features) of a step; features only if the tower is frozen."""
    policy = small.policy._replace(
        remat=step.remat,
        logit_chunk=step.logit_chunk,
        backend=step.backend,
        lora=step.lora,
    )
    mesh = make_mesh(MeshSection(data=1), jax.devices()[:1])
    prompt = prompt_shapes(mesh, policy.config.vision, step.bucket, step.prompts)
    units = step.bucket.patches // policy.config.vision.merge_area
    features = (step.prompts, units, policy.config.text.width)
    shape = jax.ShapeDtypeStruct(features, np.float32) if step.freeze_vision else None
    return policy, mesh, prompt, shape


def completions(step: Step, dtype: Any = np.int32) -> Any:
    return jax.ShapeDtypeStruct((step.prompts, step.group, step.length), dtype)


def check(work: Work, flops: Flops) -> None:
    assert work.flops(lambda matmul: not is_attention(matmul)) == pytest.approx(flops.matmul)
    # A block's scores that are computed again in one program are sometimes found again on CPUs.
    assert work.flops(is_attention) == pytest.approx(flops.attention, rel=0.01)
    assert work.unknown == []


def test_a_rollout_executes_the_formula(small: SmallModel) -> None:
    step = CHUNKED
    policy, mesh, prompt, _ = shapes_of(small, step)
    sampling = Sampling(step.group, step.length)
    scalar = jax.ShapeDtypeStruct((), np.int32)
    program = rollout_program(mesh, policy, sampling, True)
    work = executed(program.lower(small.params, prompt, scalar, scalar), policy.config)
    check(work, rollout_flops(policy.config, step))
    assert [(b.kind, b.times) for b in work.bounds] == [("loop", step.length)]


@pytest.mark.parametrize("step", [CHUNKED, FROZEN])
def test_a_reference_pass_executes_the_formula(small: SmallModel, step: Step) -> None:
    policy, mesh, prompt, features = shapes_of(small, step)
    trained, frozen = split_frozen(small.params, step.freeze_vision)
    lowered = reference_program(mesh, policy).lower(
        trained, frozen, prompt, features, completions(step)
    )
    check(executed(lowered, policy.config), reference_flops(policy.config, step))


@pytest.mark.parametrize("step", [CHUNKED, FROZEN, ADAPTED, ADAPTED_MLP])
def test_an_update_executes_the_formula(small: SmallModel, step: Step) -> None:
    policy, _, prompt, features = shapes_of(small, step)
    params = small.params
    if step.lora.rank:
        params = params | {"lora": random_adapters(policy.config, step.lora, 0)}
    trained, frozen = split_frozen(params, step.freeze_vision)
    per_completion = jax.ShapeDtypeStruct((step.prompts, step.group), np.float32)
    batch = UpdateBatch(
        prompt=prompt,
        features=features,
        completions=completions(step),
        lengths=jax.ShapeDtypeStruct((step.prompts, step.group), np.int32),
        finished=jax.ShapeDtypeStruct((step.prompts, step.group), np.bool_),
        advantages=per_completion,
        sampler_logp=completions(step, np.float32),
        old_logp=None,
        ref_logp=None,
    )
    lowered = jax.jit(
        lambda trained, frozen, batch: grpo_gradients(
            policy, trained, frozen, batch, GrpoSection(kl=0.0)
        )
    ).lower(trained, frozen, batch)
    check(executed(lowered, policy.config), update_flops(policy.config, step))


def test_completions_in_blocks_of_queries_are_computed_again() -> None:
    """On a TPU: XLA on CPUs merges what is computed again with what a layer computes again."""
    p, g, c, s, chunk, n, k, h = 2, 4, 32, 64, 32, 4, 2, 16
    (device, *_) = tpu_devices("v5e:2x2")

    def loss(q: Any, own: Any, prompt: Any, valid: Any) -> Any:
        return jnp.sum(jnp.sin(attend_completions(q, *own, *prompt, valid, chunk)))

    on = SingleDeviceSharding(device)
    q, own, prompt = (
        jax.ShapeDtypeStruct(shape, jnp.bfloat16, sharding=on)
        for shape in ((p, g, c, n, h), (p, g, c, k, h), (p, s, k, h))
    )
    valid = jax.ShapeDtypeStruct((p, s), np.bool_, sharding=on)
    gradients = jax.jit(jax.value_and_grad(loss, argnums=(0, 1, 2)))
    program = gradients.lower(q, (own, own), (prompt, prompt), valid).compile()
    pairs = g * (c * s + sum(8 * end for end in (8, 16, 24, 32)))
    forward_backward_scores_again = 1 + 2 + 1 / 2
    assert read(program.as_text()).work.flops(is_attention) == (
        forward_backward_scores_again * p * 4 * n * h * pairs
    )


# ---- what the numbers are about ----


def released(name: str) -> ModelConfig:
    """Qwen2.5-VL 3B's published sizes."""
    raw = hf_model.released_config(
        tied=True,
        vocab=151936,
        hidden_size=2048,
        intermediate_size=11008,
        num_attention_heads=16,
        num_key_value_heads=2,
        num_hidden_layers=36,
        rope_scaling={"type": "mrope", "mrope_section": [16, 24, 24]},
    )
    raw["vision_config"] |= {
        "depth": 32,
        "hidden_size": 1280,
        "intermediate_size": 3420,
        "num_heads": 16,
        "out_hidden_size": 2048,
        "fullatt_block_indexes": [7, 15, 23, 31],
    }
    return ModelConfig.from_dict(raw, source=name)


def test_sharing_a_prompt_costs_its_tokens_once() -> None:
    """8 answers of 64 tokens to 1,100: 1,612 tokens go through the layers instead of 9,312."""
    size = Size(tokens=1100, patches=0, windows=0, frames=0, frame_patches=0)
    shared = Step(size, prompts=1, group=8, length=64)
    repeated = Step(size, prompts=8, group=1, length=64)
    config = released("3B")
    layers = [parts(update_flops(config, step), "layers")[0] for step in (shared, repeated)]
    assert layers[1] / layers[0] == pytest.approx(9312 / 1612)


def test_the_layers_of_the_3b_model_take_two_flops_per_weight_and_token() -> None:
    """2.77 billion of its weights are the layers' matrices."""
    size = Size(tokens=1000, patches=0, windows=0, frames=0, frame_patches=0)
    flops = rollout_flops(released("3B"), Step(size, prompts=1, group=1, length=1))
    assert parts(flops, "prefill")[0] == 2 * 1000 * 2_774_532_096


def test_blocks_of_queries_halve_causal_attention() -> None:
    size = Size(tokens=4096, patches=0, windows=0, frames=0, frame_patches=0)
    whole, blocks, exact = (
        parts(rollout_flops(released("3B"), Step(size, 1, 1, 1, backend=backend)), "prefill")[1]
        for backend in (Backend(chunk=0), Backend(chunk=1024), Backend(chunk=1))
    )
    assert blocks / whole == (1 + 2 + 3 + 4) / 16
    assert exact / whole == (4096 * 4097 / 2) / 4096**2


# ---- kernels ----

TEXT = Size(tokens=4096, patches=0, windows=0, frames=0, frame_patches=0)


def test_splash_computes_whole_blocks_twice_forward_and_seven_times_backward() -> None:
    """8 blocks of a prompt in each of 36; 8 completions of one block read those 8 and their own."""
    step = Step(TEXT, 1, group=8, length=512, backend=Backend("splash"), remat="layer")
    flops = {part.name: part for part in update_flops(released("3B"), step).parts}
    product = 2 * 36 * 16 * 128 * (8 * 9 // 2 + 8 * (8 + 1)) * 512**2
    assert flops["forward: layers"].kernel == 2 * product
    assert flops["backward: layers"].kernel == 7 * product
    assert flops["recomputed: layers"].kernel == 2 * product
    assert all(part.attention == 0 for part in flops.values())


def test_cudnn_skips_what_is_above_the_diagonal_of_a_prompt() -> None:
    step = Step(TEXT, 1, group=8, length=512, backend=Backend("cudnn"))
    flops = {part.name: part for part in update_flops(released("3B"), step).parts}
    product = 2 * 36 * 16 * 128 * (4096 * 4097 // 2 + 8 * 512 * (4096 + 512))
    assert flops["forward: layers"].kernel == 2 * product
    assert flops["backward: layers"].kernel == 5 * product


def test_windows_and_decoding_stay_with_xla_and_frames_are_padded_to_blocks() -> None:
    """A row of 720 patches is two blocks of 384; heads of 80 are padded to 128."""
    size = TEXT._replace(patches=1440, windows=24, frames=2, frame_patches=720)
    config = released("3B")
    kernel, xla = (
        {part.name: part for part in rollout_flops(config, Step(size, 1, 8, 64, 0, b)).parts}
        for b in (Backend("splash"), Backend())
    )
    assert kernel["vision"].kernel == 4 * 2 * 768**2 * 4 * 16 * 128
    assert kernel["vision"].attention == 28 * 24 * 64**2 * 4 * 16 * 80
    assert kernel["decode"] == xla["decode"] and kernel["vision"].matmul == xla["vision"].matmul
    assert xla["vision"].kernel == xla["prefill"].kernel == kernel["prefill"].attention == 0
