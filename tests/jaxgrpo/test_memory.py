"""Memory counted from shapes: the worked sums of one small model."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from jaxgrpo.config import (
    Config,
    DataSection,
    LoraSection,
    MeshSection,
    ModelSection,
    OptimSection,
    RolloutSection,
)
from jaxgrpo.memory import caches, count
from jaxgrpo.sharding import make_mesh
from jaxgrpo.topology import GIB
from models.attention_backend import XLA, Backend
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.sizes import Size
from tests.oracle.hf_model import released_config

# 3 layers of width 64, 4 query and 2 key/value heads of 16, MLP 96, vocabulary 320.
MODEL = ModelConfig.from_dict(released_config(tied=False))
BUCKET = Size(tokens=100, patches=80, windows=3, frames=2, frame_patches=40)
CONFIG = Config(
    run_dir="unused",
    model=ModelSection(path="unused", logit_chunk=0),
    data=DataSection(train="unused"),
    rollout=RolloutSection(prompts=8, group=2, max_new_tokens=10),
)
HELD = {
    "weights": 4.0,
    "optimiser": 8.0,
    "frozen weights": 0.0,
    "reference": 2.0,
    "sampler's copy": 2.0,
}


def counted(
    program: str, config: Config = CONFIG, backend: Backend = XLA, **mesh: int
) -> dict[str, float]:
    section = MeshSection(**{"data": 1, **mesh})
    devices = jax.devices()[: section.data * section.fsdp * section.tensor]
    return count(program, config, MODEL, BUCKET, make_mesh(section, devices), backend, HELD)


def test_caches_hold_each_prompt_once_and_its_completions() -> None:
    mesh = make_mesh(MeshSection(data=1), jax.devices()[:1])
    token = 2 * 3 * 2 * 16 * 2  # keys and values, layers, heads, dimension, bytes
    found = caches(CONFIG, MODEL, BUCKET, mesh)
    assert found["prompt cache"] * GIB == pytest.approx(8 * 100 * token)
    assert found["completion cache"] * GIB == pytest.approx(8 * 2 * 10 * token)


def test_key_value_heads_are_split_where_they_can_be() -> None:
    whole, half, kept = (
        caches(CONFIG, MODEL, BUCKET, make_mesh(MeshSection(1, 1, t), jax.devices()[:t]))
        for t in (1, 2, 4)
    )
    assert half["prompt cache"] == whole["prompt cache"] / 2
    assert kept["prompt cache"] == whole["prompt cache"]  # two heads on four devices: all of them


def test_an_update_keeps_one_stream_per_layer_and_recomputes_the_rest() -> None:
    update = counted("update")
    packed = 100 + 2 * 10
    kept = 8 * (packed * 3 * 64 + 80 * 3 * 32) * 2
    assert update["activations kept"] * GIB == pytest.approx(kept)
    assert update["weights in the compute type"] == 2.0
    assert update["gradients"] == 4.0 and update["sums over micro-batches"] == 0.0


def test_micro_batches_divide_activations_and_add_a_sum_of_gradients() -> None:
    whole = counted("update")
    config = dataclasses.replace(CONFIG, optim=OptimSection(accumulate=4))
    parts = counted("update", config)
    assert parts["activations kept"] == pytest.approx(whole["activations kept"] / 4)
    assert parts["sums over micro-batches"] == 4.0


def test_a_frozen_tower_keeps_no_activations() -> None:
    model = dataclasses.replace(CONFIG.model, freeze_vision=True)
    frozen = counted("update", dataclasses.replace(CONFIG, model=model))
    assert frozen["activations kept"] * GIB == pytest.approx(8 * 120 * 3 * 64 * 2)


def test_adapters_of_the_decoder_leave_the_frozen_weights_as_they_are() -> None:
    """No copy of them in another type, no gradients, and no activations of the vision tower."""
    config = dataclasses.replace(CONFIG, lora=LoraSection(rank=8))
    mesh = make_mesh(MeshSection(data=1), jax.devices()[:1])
    held = {"weights": 0.1, "optimiser": 0.2, "frozen weights": 2.0, "reference": 0.0}
    held["sampler's copy"] = 2.0
    found = count("update", config, MODEL, BUCKET, mesh, XLA, held)
    assert found["weights"] == pytest.approx(2.1)
    assert found["gradients"] == 0.1 and found["weights in the compute type"] == 0.05
    assert found["activations kept"] * GIB == pytest.approx(8 * 120 * 3 * 64 * 2)
    reference = count("reference", config, MODEL, BUCKET, mesh, XLA, held)
    assert reference["weights"] == 2.0


def test_without_recomputation_every_layer_is_kept() -> None:
    model = dataclasses.replace(CONFIG.model, remat="none")
    kept = counted("update", dataclasses.replace(CONFIG, model=model))
    assert kept["activations kept"] == pytest.approx(3 * kept["one layer's activations"])


def test_prompts_are_divided_over_data_and_fsdp() -> None:
    one, four = counted("update"), counted("update", data=2, fsdp=2)
    assert four["activations kept"] == pytest.approx(one["activations kept"] / 4)


def test_sampling_holds_the_copy_and_the_caches_but_no_gradients() -> None:
    assert counted("rollout").keys() == {
        "sampler's copy",
        "prompt cache",
        "completion cache",
        "one layer's activations",
    }
    assert counted("publish") == {"weights": 4.0, "sampler's copy": 2.0}
    assert counted("reference")["weights"] == 2.0


def test_a_kernel_keeps_scores_on_the_chip() -> None:
    """XLA holds them, float32 and as probabilities, for all queries and heads at once."""
    of_xla, of_kernel = (
        counted("rollout", backend=backend)["one layer's activations"] * GIB
        for backend in (XLA, Backend("cudnn"))
    )
    assert of_xla - of_kernel == pytest.approx(8 * 100 * (100 + 10) * 4 * (4 + 2))
