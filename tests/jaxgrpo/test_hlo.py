"""What is read from compiled programs: known functions on eight devices, and lines by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from jaxgrpo.hlo import Report, read
from jaxgrpo.hlo_text import HloError
from tests.jaxgrpo.aot import tpu_devices

A, B, C = 16, 24, 40  # [A, B] x [B, C]
ONE = 2 * A * B * C
SQUARE = 2 * A * A * A
F32 = 4

WHOLE, X, Y, XY = (PartitionSpec(*axes) for axes in ((), ("x",), ("y",), (("x", "y"),)))
COLUMNS = PartitionSpec(None, "y")


@pytest.fixture(scope="module", params=["cpu", "tpu"])
def devices(request: pytest.FixtureRequest) -> np.ndarray:
    """Eight devices of this machine, or of a TPU slice that is only compiled for."""
    if request.param == "cpu":
        return np.array(jax.devices()[:8])
    return tpu_devices("v5e:2x4")


def mesh_of(devices: np.ndarray) -> Mesh:
    return Mesh(devices.reshape(2, 4), ("x", "y"))


def compiled(
    devices: np.ndarray,
    function: Callable[..., Any],
    *shapes: tuple[int, ...],
    specs: tuple[Any, ...] | None = None,
    out: Any = WHOLE,
    donate: tuple[int, ...] = (),
    **options: Any,
) -> Report:
    """Reads `function` compiled for float32 arguments, on a mesh of 2 x 4 devices if split."""
    if specs is None:
        mesh = Mesh(devices[:1].reshape(1, 1), ("x", "y"))
        specs = (WHOLE,) * len(shapes)
    else:
        mesh = mesh_of(devices)
    arguments = [
        jax.ShapeDtypeStruct(shape, jnp.float32, sharding=NamedSharding(mesh, spec))
        for shape, spec in zip(shapes, specs, strict=True)
    ]
    jitted = jax.jit(function, out_shardings=NamedSharding(mesh, out), donate_argnums=donate)
    return read(jitted.lower(*arguments).compile().as_text(), **options)


def halves(name: str) -> tuple[float, float]:
    return 0.75, 0.25


# ---- matrix products ----


@pytest.mark.parametrize(
    ("subscripts", "left", "right", "flops"),
    [
        ("ab,bc->ac", (A, B), (B, C), ONE),
        ("ba,bc->ca", (B, A), (B, C), ONE),
        ("xyab,xybc->xyac", (3, 5, A, B), (3, 5, B, C), 15 * ONE),
        (
            "pgtkrh,pskh->pkgrts",
            (2, 3, 8, 4, 2, 16),
            (2, 12, 4, 16),
            2 * 2 * 4 * 3 * 2 * 8 * 12 * 16,
        ),
    ],
)
def test_a_product_is_two_flops_per_multiply_add(
    devices: np.ndarray, subscripts: str, left: Any, right: Any, flops: int
) -> None:
    """On TPUs these are convolutions, whose batch dimensions are dilated windows."""
    report = compiled(devices, lambda a, b: jnp.einsum(subscripts, a, b), left, right)
    assert report.work.flops() == flops
    assert report.work.bounds == report.work.unknown == []


def test_a_product_keeps_the_name_it_has_in_the_program(devices: np.ndarray) -> None:
    report = compiled(devices, lambda a, b: jnp.einsum("ab,bc->ca", a, b), (A, B), (B, C))
    assert report.work.flops(lambda matmul: "ab,bc->ca" in matmul.op_name) == ONE
    assert report.work.flops(lambda matmul: "ab,bc->ac" in matmul.op_name) == 0


def test_a_gradient_is_two_more_products(devices: np.ndarray) -> None:
    def gradients(a: Any, b: Any) -> Any:
        return jax.value_and_grad(lambda ab: jnp.sum(jnp.sin(ab[0] @ ab[1])))((a, b))

    assert compiled(devices, gradients, (A, B), (B, C)).work.flops() == 3 * ONE


# ---- loops and branches ----


def test_a_scan_multiplies_by_its_length(devices: np.ndarray) -> None:
    def f(x: Any, w: Any) -> Any:
        return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0]

    report = compiled(devices, f, (A, A), (7, A, A))
    assert report.work.flops() == 7 * SQUARE
    assert report.work.bounds == []


def test_nested_scans_multiply(devices: np.ndarray) -> None:
    def f(x: Any, w: Any) -> Any:
        def outer(x: Any, _: Any) -> Any:
            return jax.lax.scan(lambda x, w: (jnp.sin(x @ w), None), x, w)[0], None

        return jax.lax.scan(outer, x @ x, None, length=5)[0]

    assert compiled(devices, f, (A, A), (3, A, A)).work.flops() == 16 * SQUARE


def test_a_loop_from_2_to_11_by_3_runs_three_times(devices: np.ndarray) -> None:
    def f(x: Any) -> Any:
        body = lambda state: (state[0] + 3, jnp.sin(state[1] @ state[1]))
        return jax.lax.while_loop(lambda state: state[0] < 11, body, (jnp.int32(2), x))

    report = compiled(devices, f, (A, A))
    assert report.work.flops() == 3 * SQUARE
    assert report.work.bounds == []


def stops_early(x: Any) -> Any:
    def unfinished(state: Any) -> Any:
        return (state[0] < 9) & ~jnp.all(state[1] > 0)

    return jax.lax.while_loop(
        unfinished, lambda state: (state[0] + 1, jnp.sin(state[1] @ state[1])), (jnp.int32(0), x)
    )


def test_a_loop_that_may_stop_early_counts_its_limit_and_says_so(devices: np.ndarray) -> None:
    report = compiled(devices, stops_early, (A, A))
    assert report.work.flops() == 9 * SQUARE
    assert [(b.kind, b.times) for b in report.work.bounds] == [("loop", 9)]


def until_positive(x: Any) -> Any:
    return jax.lax.while_loop(lambda x: jnp.any(x < 0), lambda x: jnp.sin(x @ x), x)


def test_a_loop_without_a_limit_needs_one(devices: np.ndarray) -> None:
    with pytest.raises(HloError, match="cannot be read; give loop_limit"):
        compiled(devices, until_positive, (A, A))


def test_a_given_limit_is_an_upper_bound(devices: np.ndarray) -> None:
    report = compiled(devices, until_positive, (A, A), loop_limit=6)
    assert report.work.flops() == 6 * SQUARE
    assert [(b.kind, b.times) for b in report.work.bounds] == [("loop", 6)]


def either(x: Any, w: Any) -> Any:
    def layer(x: Any, w: Any) -> Any:
        once = lambda x: jnp.sin(x @ w)
        return jax.lax.cond(x[0, 0] > 0, lambda x: once(once(once(x))), once, x), None

    return jax.lax.scan(layer, x, w)[0]


def test_a_conditional_counts_its_heaviest_branch_and_says_so(devices: np.ndarray) -> None:
    report = compiled(devices, either, (A, A), (4, A, A))
    assert report.work.flops() == 4 * 3 * SQUARE
    assert [(b.kind, b.times) for b in report.work.bounds] == [("conditional", 4)]


def test_branches_are_weighed_when_their_shares_are_known(devices: np.ndarray) -> None:
    """Shares are in the order [when false, when true]."""
    report = compiled(devices, either, (A, A), (4, A, A), branch_shares=halves)
    assert report.work.flops() == (3 * 1 + 1 * 3) * SQUARE
    assert report.work.bounds == []


def test_shares_must_fit_the_branches(devices: np.ndarray) -> None:
    with pytest.raises(HloError, match="has 2 branches: expected as many shares with the sum 1"):
        compiled(devices, either, (A, A), (4, A, A), branch_shares=lambda _: (1.0, 1.0))


# ---- collectives ----


def found(report: Report) -> list[tuple[Any, ...]]:
    return [
        (c.kind, c.times, c.result_bytes, c.operand_bytes, c.group_size)
        for c in report.work.collectives
    ]


def test_gathering_a_split_weight(devices: np.ndarray) -> None:
    report = compiled(
        devices,
        lambda x: jnp.sin(x),
        (512, 512),
        specs=(XY,),
        out=X,
    )
    assert found(report) == [("all-gather", 1, 512 * 256 * F32, 512 * 64 * F32, 4)]


def test_summing_a_split_contraction_in_a_loop(devices: np.ndarray) -> None:
    """The products shrink to a device's share; each of the five trips communicates."""

    split = NamedSharding(mesh_of(devices), COLUMNS)

    def f(x: Any, w: Any) -> Any:
        def layer(x: Any, w: Any) -> Any:
            return jax.lax.with_sharding_constraint(jnp.sin(x @ w), split), None

        return jax.lax.scan(layer, x, w)[0]

    specs = (COLUMNS, PartitionSpec(None, "y", None))
    report = compiled(devices, f, (128, 512), (5, 512, 512), specs=specs, out=specs[0])
    assert report.work.flops() == 5 * 2 * 128 * 512 * 512 / 4
    whole, part = 128 * 512 * F32, 128 * 128 * F32
    assert found(report) in (
        [("all-reduce", 5, whole, whole, 4)],
        [("reduce-scatter", 5, part, whole, 4)],
    )


def test_a_reduce_scatter_counts_what_stays(devices: np.ndarray) -> None:
    def f(x: Any) -> Any:
        mesh = mesh_of(devices)
        return jax.shard_map(
            lambda x: jax.lax.psum_scatter(x, "y", scatter_dimension=0, tiled=True),
            mesh=mesh,
            in_specs=COLUMNS,
            out_specs=Y,
        )(x)

    report = compiled(devices, f, (512, 512), specs=(COLUMNS,), out=Y)
    assert found(report) == [("reduce-scatter", 1, 128 * 128 * F32, 512 * 128 * F32, 4)]


def test_passing_on_and_exchanging(devices: np.ndarray) -> None:
    def f(x: Any) -> Any:
        def inside(x: Any) -> Any:
            x = jax.lax.ppermute(x, "y", [(0, 1), (1, 2), (2, 3), (3, 0)])
            return jax.lax.all_to_all(x, "x", 0, 1, tiled=True)

        mesh = mesh_of(devices)
        return jax.shard_map(inside, mesh=mesh, in_specs=XY, out_specs=XY)(x)

    report = compiled(devices, f, (512, 256), specs=(XY,), out=XY)
    share = 64 * 256 * F32
    kinds = {c.kind: (c.times, c.group_size) for c in report.work.collectives}
    assert kinds == {"collective-permute": (1, 2), "all-to-all": (1, 2)}
    assert {c.result_bytes for c in report.work.collectives} == {share}


@pytest.mark.parametrize(("axis", "crosses"), [("x", True), ("y", False)])
def test_a_sum_over_the_outer_axis_crosses_slices(
    devices: np.ndarray, axis: str, crosses: bool
) -> None:
    """Two slices of four devices."""

    out = {"x": Y, "y": X}[axis]

    def f(x: Any) -> Any:
        return jax.shard_map(
            lambda x: jax.lax.psum(x, axis), mesh=mesh_of(devices), in_specs=XY, out_specs=out
        )(x)

    report = compiled(devices, f, (512, 256), specs=(XY,), out=out, devices_per_slice=4)
    assert [c.crosses_slices for c in report.work.collectives] == [crosses]


# ---- donation ----


def test_donated_arguments_are_counted(devices: np.ndarray) -> None:
    report = compiled(devices, lambda a, b: (a + 1, b * 2), (A, B), (B, C), donate=(1,))
    assert report.donation == ((1,), B * C * F32)


def test_nothing_donated_is_nothing(devices: np.ndarray) -> None:
    assert compiled(devices, lambda a: a + 1, (A, B)).donation == ((), 0)


# ---- what XLA writes only for large programs, by hand ----


def by_hand(*lines: str, functions: str = "") -> Report:
    """A program of `lines` on x: f32[8,8]."""
    body = "\n".join(f"  {line}" for line in lines)
    return read(
        f"HloModule hand, num_partitions=4\n{functions}\n"
        f"ENTRY %main (x: f32[8,8]) -> f32[8,8] {{\n  %x = f32[8,8]{{1,0}} parameter(0)\n{body}\n}}"
    )


DOT = "dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}"


def test_rematerialisation_by_xla_is_told_apart() -> None:
    report = by_hand(f"%d = f32[8,8]{{1,0}} {DOT}", f"ROOT %d.remat = f32[8,8]{{1,0}} {DOT}")
    assert report.work.rematerialised == ["d.remat"]
    assert report.work.flops() == 2 * 1024
    assert report.work.flops(lambda matmul: matmul.rematerialised) == 1024


def test_a_rematerialised_fusion_holds_rematerialised_products() -> None:
    functions = (
        "%f (x: f32[8,8]) -> f32[8,8] {\n  %x = f32[8,8]{1,0} parameter(0)\n"
        f"  ROOT %d = f32[8,8]{{1,0}} {DOT}\n}}\n"
    )
    line = "ROOT %fusion.1.remat2 = f32[8,8]{1,0} fusion(%x), kind=kOutput, calls=%f"
    report = by_hand(line, functions=functions)
    assert report.work.rematerialised == ["fusion.1.remat2"]
    assert report.work.flops(lambda matmul: matmul.rematerialised) == 1024


def test_a_kernel_is_listed_as_unknown() -> None:
    report = by_hand(
        'ROOT %k = f32[8,8]{1,0} custom-call(%x), custom_call_target="tpu_custom_call"'
    )
    assert [(u.name, u.what, u.times) for u in report.work.unknown] == [("k", "tpu_custom_call", 1)]


def test_a_collective_is_counted_at_its_start() -> None:
    report = by_hand(
        "%s = (f32[8,8]{1,0}, f32[32,8]{1,0}) all-gather-start(%x), replica_groups=[1,4]<=[4], "
        "dimensions={0}",
        "ROOT %d = f32[32,8]{1,0} all-gather-done(%s)",
    )
    assert found(report) == [("all-gather", 1, 32 * 8 * F32, 8 * 8 * F32, 4)]


GATHER = 'all-gather(%x), replica_groups=[1,4]<=[4], frontend_attributes={chain_id="3"}'


def test_a_collective_that_goes_on_through_fusions_is_counted_once() -> None:
    report = by_hand(
        f"%g = f32[32,8]{{1,0}} {GATHER}",
        '%s = f32[8,8]{1,0} custom-call(%g), custom_call_target="AsyncCollectiveStart"',
        f"%h = f32[32,8]{{1,0}} {GATHER}",
        'ROOT %d = f32[8,8]{1,0} custom-call(%h), custom_call_target="AsyncCollectiveDone"',
    )
    assert found(report) == [("all-gather", 1, 32 * 8 * F32, 8 * 8 * F32, 4)]


def test_a_collective_that_nothing_starts_is_an_error() -> None:
    with pytest.raises(HloError, match="goes on with a collective that nothing starts"):
        by_hand(f"ROOT %g = f32[32,8]{{1,0}} {GATHER}")


def test_a_product_inside_a_reduction_is_an_error() -> None:
    functions = (
        "%f (a: f32[8,8], b: f32[8,8]) -> f32[8,8] {\n  %x = f32[8,8]{1,0} parameter(0)\n"
        f"  ROOT %d = f32[8,8]{{1,0}} {DOT}\n}}\n"
    )
    with pytest.raises(HloError, match="a reduce whose function f multiplies"):
        by_hand("ROOT %r = f32[8]{0} reduce(%x, %x), to_apply=%f", functions=functions)


def test_a_call_that_is_started_is_counted_once() -> None:
    functions = (
        "%f (x: f32[8,8]) -> f32[8,8] {\n  %x = f32[8,8]{1,0} parameter(0)\n"
        f"  ROOT %d = f32[8,8]{{1,0}} {DOT}\n}}\n"
    )
    report = by_hand(
        "%s = ((f32[8,8]{1,0}), f32[8,8]{1,0}) call-start(%x), to_apply=%f",
        "ROOT %d = f32[8,8]{1,0} call-done(%s)",
        functions=functions,
    )
    assert report.work.flops() == 1024


def test_a_product_that_is_started_by_itself_is_an_error() -> None:
    with pytest.raises(HloError, match="d: dot-start is not understood"):
        by_hand(f"ROOT %d = f32[8,8]{{1,0}} {DOT.replace('dot(', 'dot-start(')}")
