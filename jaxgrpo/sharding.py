"""The mesh and what lies where on it.

Mesh axes: `data` (replicas), `fsdp` (prompts and weights), `tensor` (heads, MLP, vocabulary).
Prompts are split over data x fsdp; weights over fsdp x tensor, by the logical axes that each
declares. Slices of TPUs are the outermost part of `data`, so that nothing but the sum of the
gradients crosses the network between them. One device is the 1 x 1 x 1 mesh: there is no other code
path.
"""

from __future__ import annotations

import collections
import functools
import json
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.stages import Wrapped

from jaxgrpo.config import ConfigError, MeshSection
from models.layers import HEAD_AXIS, PROMPT_AXES
from models.low_rank import NO_LORA, Lora
from models.qwen2_5_vl.config import ModelConfig
from models.qwen2_5_vl.model import abstract_model, weight_axes

DATA, FSDP, TENSOR = *PROMPT_AXES, HEAD_AXIS
PROMPTS = PartitionSpec(PROMPT_AXES)  # the leading axis of every batch

# Logical axis of a weight -> mesh axis, for training.
RULES: dict[str, str | None] = {
    "layers": None,
    "rank": None,
    "norm": None,
    "head_dim": None,
    "qkv": None,
    "patch": None,
    "embed": FSDP,
    "vision_embed": FSDP,
    "heads": TENSOR,
    "kv_heads": TENSOR,
    "vision_heads": TENSOR,
    "mlp": TENSOR,
    "vision_mlp": TENSOR,
    "vocab": TENSOR,
}
# The sampler's copy is not split over fsdp: gathering weights for every token would swamp the
# network.
SAMPLER_RULES = {axis: (None if mesh == FSDP else mesh) for axis, mesh in RULES.items()}

_SHORT_MESSAGE = 1 << 14  # bytes, a power of two: a step's failures and more


def say(text: str) -> None:
    """Prints on one process of the job."""
    if jax.process_index() == 0:
        print(text, flush=True)


def make_mesh(config: MeshSection, devices: Any = None) -> Mesh:
    """The mesh over all devices of all processes; `data: -1` takes what the others leave.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or an axis other than `data`
        would cross slices.
    """
    devices = jax.devices() if devices is None else devices
    data = config.data
    if data == -1:
        data = max(len(devices) // (config.fsdp * config.tensor), 1)
    shape = (data, config.fsdp, config.tensor)
    if math.prod(shape) != len(devices):
        raise ConfigError(
            f"mesh.data x mesh.fsdp x mesh.tensor = {data} x {config.fsdp} x {config.tensor} = "
            f"{math.prod(shape)}, but there are {len(devices)} devices; set mesh.data=-1 to use "
            "what fsdp and tensor leave"
        )
    slices = 1
    if devices[0].platform == "tpu":  # a described topology of one slice does not number it
        slices = len({getattr(device, "slice_index", 0) for device in devices})
    if data % slices:
        raise ConfigError(
            f"mesh.data is {data} on {slices} slices: it must be a multiple of the slices, because "
            "mesh.fsdp and mesh.tensor must not cross the network between them; lower mesh.fsdp"
        )
    within = (data // slices, config.fsdp, config.tensor)
    if slices == 1:
        ordered = mesh_utils.create_device_mesh(within, devices, allow_split_physical_axes=True)
    else:
        ordered = mesh_utils.create_hybrid_device_mesh(
            within, (slices, 1, 1), devices, allow_split_physical_axes=True
        )
    return Mesh(ordered, (DATA, FSDP, TENSOR), axis_types=(jax.sharding.AxisType.Auto,) * 3)


def jit_on(mesh: Mesh, function: Callable[..., Any], **options: Any) -> Wrapped:
    """`jax.jit`, with the mesh in force that lays out activations (`layers.split_by_prompt`)."""

    @functools.wraps(function)
    def traced(*args: Any) -> Any:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*args)

    return jax.jit(traced, **options)


def check_divides(
    mesh: Mesh, model: ModelConfig, sizes: dict[str, int], *, replicate_kv: bool = False
) -> None:
    """Checks that head counts and batch sizes divide over the mesh.

    Args:
      sizes: config key -> prompts per step under it, for example {"rollout.prompts": 16}.
      replicate_kv: `mesh.replicate_kv`. Example: 16 query and 2 key/value heads over tensor=4 give
        each device 4 query heads and, replicated, both key/value heads.

    Raises:
      ConfigError: names what does not divide, and by what.
    """
    tensor, rows = mesh.shape[TENSOR], mesh.shape[DATA] * mesh.shape[FSDP]
    heads, kv_heads = model.text.heads, model.text.kv_heads
    may_replicate = tensor % kv_heads == 0 and heads % tensor == 0
    if kv_heads % tensor and not (replicate_kv and may_replicate):
        hint = "; or set mesh.replicate_kv=true, which gives each device all of them"
        raise ConfigError(
            f"mesh.tensor={tensor} does not divide the model's num_key_value_heads ({kv_heads}); "
            f"choose a mesh.tensor that divides them{hint if may_replicate else ''}"
        )
    sharded = {
        "num_attention_heads": heads,
        "vision_config.num_heads": model.vision.heads,
        "intermediate_size": model.text.mlp_width,
        "vision_config.intermediate_size": model.vision.mlp_width,
        "vocab_size": model.text.vocab,
    }
    for name, count in sharded.items():
        if count % tensor:
            raise ConfigError(
                f"mesh.tensor={tensor} does not divide the model's {name} ({count}); "
                f"choose a mesh.tensor that divides it"
            )
    fsdp = mesh.shape[FSDP]
    for name, width in {
        "hidden_size": model.text.width,
        "vision hidden_size": model.vision.width,
    }.items():
        if width % fsdp:
            raise ConfigError(f"mesh.fsdp={fsdp} does not divide the model's {name} ({width})")
    for key, size in sizes.items():
        if size % rows:
            raise ConfigError(
                f"{key}={size} prompts do not divide over mesh.data x mesh.fsdp = {rows} rows; "
                f"use a multiple of {rows}"
            )


def param_shardings(
    config: ModelConfig,
    mesh: Mesh,
    rules: Mapping[str, str | None] = RULES,
    lora: Lora = NO_LORA,
) -> Any:
    """NamedShardings of every weight, in the nesting of the parameters.

    Key/value heads that the mesh does not divide are replicated (see `check_divides`).
    """
    if config.text.kv_heads % mesh.shape[TENSOR]:
        rules = {**rules, "kv_heads": None}
    return jax.tree.map(
        lambda names: NamedSharding(mesh, PartitionSpec(*(rules[name] for name in names))),
        weight_axes(config, lora),
        is_leaf=lambda node: isinstance(node, tuple),
    )


def param_shapes(config: ModelConfig, mesh: Mesh, lora: Lora = NO_LORA) -> Any:
    """The shapes of the weights as declared, float32, and how they lie on the mesh."""
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        abstract_model(config, lora)[1],
        param_shardings(config, mesh, lora=lora),
    )


def put_global(array: np.ndarray, sharding: NamedSharding) -> jax.Array:
    """A host array that every process holds -> a global array; each device takes its slice."""
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


def shardings_like(mesh: Mesh, tree: Any, params: Any, param_shardings: Any) -> Any:
    """Shardings for a tree that holds copies of `params` (Adam moments); the rest is replicated."""
    replicated = NamedSharding(mesh, PartitionSpec())
    structure: Any = jax.tree.structure(params)

    def is_copy(node: Any) -> bool:
        return bool(structure == jax.tree.structure(node))

    return jax.tree.map(
        lambda node: param_shardings if is_copy(node) else replicated, tree, is_leaf=is_copy
    )


def shape_on(mesh: Mesh, spec: PartitionSpec, shape: tuple[int, ...], dtype: Any) -> Any:
    """The shape of a global array and where it lies (`ShapeDtypeStruct`), to compile for."""
    return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, spec))


def put_scalar(mesh: Mesh, value: int) -> jax.Array:
    """A host number -> an int32 on every device; `device_put` would ask the other processes."""
    return put_global(np.array(value, np.int32), NamedSharding(mesh, PartitionSpec()))


def put_prompts(mesh: Mesh, batch: Any) -> Any:
    """Host arrays, this process's rows of a batch -> global arrays split over data x fsdp."""
    sharding = NamedSharding(mesh, PROMPTS)
    return jax.tree.map(lambda x: jax.make_array_from_process_local_data(sharding, x), batch)


def process_rows(mesh: Mesh, prompts: int) -> list[int]:
    """The rows of a batch of `prompts` that this process feeds, rising: of its mesh coordinates.

    Processes that differ only in the tensor coordinate feed the same rows (`shares_rows`). On a
    torus of chips the rows of a host need not be neighbours.

    Raises:
      ConfigError: two processes have some rows in common, but not all.
    """
    rows = _rows_of_processes(mesh, prompts)
    distinct = set(rows.values())
    if sum(map(len, distinct)) != prompts or len(set(map(len, distinct))) > 1:
        shape = " x ".join(map(str, mesh.devices.shape))
        raise ConfigError(
            f"on the mesh of data x fsdp x tensor = {shape}, two processes have some prompts in "
            "common but not all; choose a mesh.tensor that divides the devices of a process, or "
            "the other way round"
        )
    return sorted(rows[jax.process_index()])


def shares_rows(mesh: Mesh) -> bool:
    """Whether several processes feed the same rows of a batch: the tensor axis spans hosts."""
    rows = _rows_of_processes(mesh, mesh.shape[DATA] * mesh.shape[FSDP])
    return len(set(rows.values())) < len(rows)


def _rows_of_processes(mesh: Mesh, prompts: int) -> dict[int, frozenset[int]]:
    of_devices: Mapping[Any, Any] = NamedSharding(mesh, PROMPTS).devices_indices_map((prompts,))
    rows: dict[int, set[int]] = collections.defaultdict(set)
    for device, (part,) in of_devices.items():
        rows[device.process_index].update(range(prompts)[part])
    return {process: frozenset(found) for process, found in rows.items()}


def gather_objects(value: Any) -> list[Any]:
    """Each process's JSON-like value, in the order of the processes, on all of them.

    A collective. Messages are padded to few lengths, each an executable of its own, so that after
    the first short one the next compile nothing.
    """
    if jax.process_count() == 1:
        return [value]
    text = np.frombuffer(json.dumps(value).encode(), np.uint8)
    sizes = multihost_utils.process_allgather(np.array([len(text)])).ravel()
    longest = int(sizes.max())
    padded = np.zeros(max(_SHORT_MESSAGE, 1 << (longest - 1).bit_length()), np.uint8)
    padded[: len(text)] = text
    rows = np.asarray(multihost_utils.process_allgather(padded)).reshape(len(sizes), -1)
    return [
        json.loads(row[:size].tobytes().decode()) for row, size in zip(rows, sizes, strict=True)
    ]
