"""Back ends on a mesh of simulated devices, with key/value heads that divide it or not."""

from __future__ import annotations

from typing import Any

import jax
import pytest
from jax import Array
from jax.sharding import NamedSharding, PartitionSpec

from jaxgrpo.config import MeshSection
from jaxgrpo.sharding import make_mesh
from models.attention_backend import XLA, Backend, Kernel
from tests.models.attention_cases import Case, Heads, assert_as_xla, frames, groups

LENGTHS = (5, 8, 1, 7)
CASES = {
    "groups": groups(Heads(8, 2, 8), LENGTHS, tokens=8, group=2, completion=4),
    "frames": frames(Heads(4, 4, 8), (((3, 2), (4,)),) * 4, slots=6),
}
# Two key heads on four devices lie whole on each.
MESHES = {"2x2x2": MeshSection(2, 2, 2), "1x2x4": MeshSection(1, 2, 4, replicate_kv=True)}


def on_mesh(case: Case, section: MeshSection) -> Case:
    """The same arrays, heads split over the tensor axis where it divides them."""
    mesh = make_mesh(section)

    def put(x: Any) -> Array:
        heads = "tensor" if x.shape[-2] % mesh.shape["tensor"] == 0 else None
        middle = [None] * (x.ndim - 3)
        spec = PartitionSpec(("data", "fsdp"), *middle, heads)
        return jax.device_put(x, NamedSharding(mesh, spec))

    def attend(q: Array, k: Array, v: Array, backend: Backend) -> Array:
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return case.attend(q, k, v, backend)

    q, k, v = map(put, case.arrays)
    return Case(attend, (q, k, v), case.real)


@pytest.mark.parametrize(
    ("kernel", "use", "mesh"),
    [
        ("splash", "groups", "2x2x2"),
        ("splash", "groups", "1x2x4"),
        ("splash", "frames", "2x2x2"),
        ("cudnn", "groups", "1x2x4"),
        ("cudnn", "frames", "1x2x4"),
    ],
)
def test_a_kernel_on_eight_devices_is_xlas_attention(kernel: Kernel, use: str, mesh: str) -> None:
    assert_as_xla(on_mesh(CASES[use], MESHES[mesh]), Backend(kernel, emulated=True))


def test_prompts_and_heads_are_split_and_nothing_else_moves() -> None:
    """Each device runs the kernel on its own: no collective, where key heads divide the mesh."""
    case = on_mesh(CASES["groups"], MESHES["2x2x2"])
    backend = Backend("cudnn", emulated=True)
    program = jax.jit(lambda q, k, v: case.attend(q, k, v, backend)).lower(*case.arrays).compile()
    text = program.as_text()
    assert text and not any(
        word in text for word in ("all-gather", "all-reduce", "all-to-all", "collective-permute")
    )
    assert program.output_shardings.spec == PartitionSpec(("data", "fsdp"), None, "tensor")


def test_xla_is_the_default() -> None:
    assert XLA == Backend() == Backend(kernel="xla", chunk=0, emulated=False)
