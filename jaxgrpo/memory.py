"""Memory of a step counted from shapes, where no compiler can be asked.

Every figure is per device and in GiB. What is counted is what must exist at once however the
compiler schedules; the temporary copies that it makes are not, so the sums are lower bounds.

Legend: P prompts on a device in a micro-batch, G completions per prompt, S prompt tokens, C
        completion tokens, L layers, D width, N query heads, K key/value heads, H head dimension,
        F MLP width, V vocabulary.
"""

from __future__ import annotations

from functools import partial

from jax.sharding import Mesh

from jaxgrpo.config import Config
from jaxgrpo.sharding import DATA, FSDP, TENSOR
from jaxgrpo.topology import GIB
from models.attention_backend import Backend
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.sizes import Size


def caches(config: Config, model: ModelConfig, bucket: Size, mesh: Mesh) -> dict[str, float]:
    """Keys and values while sampling: of the prompts once, and of their G completions."""
    text, rollout = model.text, config.rollout
    prompts = rollout.prompts // (mesh.shape[DATA] * mesh.shape[FSDP])
    tensor = mesh.shape[TENSOR]
    kv_heads = text.kv_heads if text.kv_heads % tensor else text.kv_heads // tensor
    token = 2 * text.layers * kv_heads * text.head_dim * _width(config)
    return {
        "prompt cache": prompts * bucket.tokens * token / GIB,
        "completion cache": prompts * rollout.group * rollout.max_new_tokens * token / GIB,
    }


def count(
    program: str,
    config: Config,
    model: ModelConfig,
    bucket: Size,
    mesh: Mesh,
    backend: Backend,
    held: dict[str, float],
) -> dict[str, float]:
    """What a program of training holds at once, by name.

    Args:
      program: "publish", "rollout", "reference", "update" or "update_again".
      backend: what computes attention there.
      held: GiB of "weights", "optimiser", "frozen weights", "reference" and "sampler's copy".
    """
    weights = held["weights"] + held["frozen weights"]
    if program == "publish":
        return {"weights": weights, "sampler's copy": held["sampler's copy"]}
    prompts = config.rollout.prompts // (mesh.shape[DATA] * mesh.shape[FSDP])
    layer_of = partial(_layer, config, model, bucket, mesh, backend)
    if program == "rollout":
        return {
            "sampler's copy": held["sampler's copy"],
            **caches(config, model, bucket, mesh),
            "one layer's activations": layer_of(prompts, bucket.tokens),
        }
    packed = bucket.tokens + config.rollout.group * config.rollout.max_new_tokens
    if program == "reference":
        return {
            "weights": held["reference"] + held["frozen weights"],
            "one layer's activations": layer_of(prompts, packed),
            "logits": _logits(config, model, mesh, prompts),
        }
    prompts //= config.optim.accumulate
    copy = held["weights"] * _width(config) / 4
    trained_vision = not config.vision_frozen
    kept = prompts * packed * model.text.layers * model.text.width
    kept += prompts * bucket.patches * model.vision.depth * model.vision.width * trained_vision
    layer = layer_of(prompts, packed)
    if config.model.remat == "none":
        saved = layer * model.text.layers
    else:
        saved = kept * _width(config) / GIB
    sums = held["weights"] if config.optim.accumulate > 1 else 0.0
    return {
        "weights": weights,
        "optimiser": held["optimiser"],
        "weights in the compute type": copy,
        "gradients in the compute type": copy,
        "gradients": held["weights"],
        "sums over micro-batches": sums,
        "activations kept": saved,
        "one layer's activations": layer,
        "logits": _logits(config, model, mesh, prompts),
    }


def _width(config: Config) -> int:
    """Bytes of a number in the compute type."""
    return 2 if config.model.compute_dtype == "bfloat16" else 4


def _layer(
    config: Config,
    model: ModelConfig,
    bucket: Size,
    mesh: Mesh,
    backend: Backend,
    prompts: int,
    tokens: int,
) -> float:
    """One decoder layer: the stream, q, k, v, the MLP, and XLA's scores of a block of queries."""
    text, tensor = model.text, mesh.shape[TENSOR]
    heads = (text.heads + 2 * text.kv_heads) * text.head_dim
    stream = tokens * (3 * text.width + (heads + 3 * text.mlp_width) // tensor) * _width(config)
    queries = min(backend.chunk or tokens, tokens) if backend.kernel == "xla" else 0
    keys = bucket.tokens + config.rollout.max_new_tokens
    scores = queries * keys * text.heads // tensor * (4 + _width(config))
    return prompts * (stream + scores) / GIB


def _logits(config: Config, model: ModelConfig, mesh: Mesh, prompts: int) -> float:
    """A chunk of float32 logits and of their log-softmax."""
    length = config.rollout.max_new_tokens
    positions = config.rollout.group * min(config.model.logit_chunk or length, length)
    return 2 * 4 * prompts * positions * model.text.vocab / mesh.shape[TENSOR] / GIB
