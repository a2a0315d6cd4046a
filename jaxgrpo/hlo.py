"""What one execution of a compiled XLA program does, read from its text.

`compiled.as_text()` is the program of one device after partitioning and fusion. The reader walks it
from the entry, multiplies by the trips of loops, and adds up matrix products and collectives. What
it cannot know is an error or is listed: nothing is guessed.

- Matrix products are `dot` and `convolution` (on TPUs XLA writes products as convolutions), two
  FLOPs per multiply-add that exists: windows that fall on padding or between dilated elements
  multiply nothing. Products that XLA turned into elementwise arithmetic are not seen.
- A loop's trips are XLA's `known_trip_count`, else (limit - start) / step. A loop that may
  also stop earlier counts its limit, and one without a readable limit what the caller allows; both
  are listed in `bounds`, as are conditionals whose branches the caller did not weigh.
- Collectives are counted where they start. On TPUs one may go on through several fusions, and a
  reduce-scatter is a fusion of an all-reduce with a slice: each is counted once, as what it is.

Bytes are those of the values, without a layout's padding.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from jaxgrpo.hlo_loops import Values, invariants, trips
from jaxgrpo.hlo_text import (
    Computation,
    HloError,
    Instruction,
    Module,
    replica_groups,
    shape_bytes,
)


class Matmul(NamedTuple):
    """A dot or a convolution."""

    name: str
    op_name: str  # where it comes from in the traced program; "" where XLA dropped it
    batched: bool  # a dot with batch dimensions (XLA drops their op_name on CPUs)
    flops: int  # of one execution
    times: float  # executions
    rematerialised: bool  # XLA computes it again by its own choice, to save memory

    @property
    def executed(self) -> float:
        """FLOPs of all executions."""
        return self.flops * self.times


class Collective(NamedTuple):
    """A transfer between devices."""

    name: str
    op_name: str
    kind: str  # all-reduce, all-gather, reduce-scatter, all-to-all, collective-permute, ...
    result_bytes: int  # per device and execution
    operand_bytes: int  # per device and execution
    group_size: int  # devices that take part together; 2 for a permute's pairs
    crosses_slices: bool
    times: float  # executions


class Bound(NamedTuple):
    """A loop or conditional whose work is an upper bound."""

    kind: str  # "loop" or "conditional"
    name: str
    op_name: str
    times: float  # executions of the loop's body; of the conditional


class Unknown(NamedTuple):
    """Something whose work the text does not show: a kernel, a transfer to the host."""

    name: str
    what: str  # the opcode, or a custom call's target
    op_name: str
    times: float


@dataclasses.dataclass
class Work:
    """What one execution of a program, or of a part of it, does on one device."""

    matmuls: list[Matmul] = dataclasses.field(default_factory=list)
    collectives: list[Collective] = dataclasses.field(default_factory=list)
    bounds: list[Bound] = dataclasses.field(default_factory=list)
    unknown: list[Unknown] = dataclasses.field(default_factory=list)
    rematerialised: list[str] = dataclasses.field(default_factory=list)  # instructions, by name

    def flops(self, which: Callable[[Matmul], bool] = lambda _: True) -> float:
        """Executed FLOPs of the matrix products that `which` selects."""
        return sum(matmul.executed for matmul in self.matmuls if which(matmul))

    def collective_bytes(self, which: Callable[[Collective], bool] = lambda _: True) -> float:
        """Executed result bytes of the collectives that `which` selects."""
        return sum(c.result_bytes * c.times for c in self.collectives if which(c))

    def add(self, other: Work, times: float = 1) -> None:
        """Adds the work of a part that runs `times` times."""
        for field in ("matmuls", "collectives", "bounds", "unknown"):
            mine = self.__dict__[field]
            mine += [x._replace(times=x.times * times) for x in other.__dict__[field]]
        self.rematerialised += other.rematerialised

    @property
    def matters(self) -> bool:
        return bool(self.matmuls or self.collectives or self.unknown)


class Donation(NamedTuple):
    """Arguments whose memory the results take over."""

    parameters: tuple[int, ...]  # flat argument numbers
    bytes: int


class Report(NamedTuple):
    work: Work
    donation: Donation


def read(
    text: str,
    *,
    loop_limit: int | None = None,
    branch_shares: Callable[[str], Sequence[float] | None] = lambda _: None,
    devices_per_slice: int | None = None,
) -> Report:
    """Reads a compiled program.

    Args:
      text: `compiled.as_text()`.
      loop_limit: the most trips of a loop whose limit cannot be read.
      branch_shares: op_name of a conditional -> how often each branch runs, summing to 1 (of
        `lax.cond`: [when false, when true]); None: the branch with the most FLOPs and, separately,
        the one with the most bytes.
      devices_per_slice: to say which collectives cross slices; slices are the outermost part of
        the mesh.

    Raises:
      HloError: the text has a construct that is not understood and that may do work, or a loop
        that works without a limit and no `loop_limit` is given.
    """
    module = Module.parse(text)
    reader = _Reader(module, loop_limit, branch_shares, devices_per_slice)
    work = reader.computation(module.entry, Values(module, module.entry, ()))
    return Report(work, _donation(module))


def _donation(module: Module) -> Donation:
    shapes = {i.number: i.shape for i in module.entry if i.opcode == "parameter"}
    total = 0
    for parameter, path in module.aliased:
        shape = shapes[parameter]
        for index in path:
            shape = shape[index]
        total += shape_bytes(shape)
    return Donation(tuple(sorted({parameter for parameter, _ in module.aliased})), total)


# ---- the walk ----

_TRANSFERS = {
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
}
_OPAQUE = {"send", "recv", "infeed", "outfeed"}
# Custom calls without matrix products; others are listed as unknown.
_PLAIN = {
    "AllocateBuffer",
    "AssumeGatherIndicesInBound",
    "AsyncCollectiveDone",
    "AsyncCollectiveStart",
    "ConcatBitcast",
    "GatherScatterIndicesBitpacked",
    "TopK",
}


class _Reader:
    """Walks a module."""

    def __init__(
        self,
        module: Module,
        loop_limit: int | None,
        branch_shares: Callable[[str], Sequence[float] | None],
        devices_per_slice: int | None,
    ):
        self.module = module
        self.loop_limit = loop_limit
        self.branch_shares = branch_shares
        self.devices_per_slice = devices_per_slice

    def computation(
        self, computation: Computation, values: Values, caller: Instruction | None = None
    ) -> Work:
        """The work of one execution; `caller` is the fusion that this is the inside of."""
        work = Work()
        for i in computation:
            if caller is None and ".remat" in i.name:
                work.rematerialised.append(i.name)
            work.add(self._instruction(computation, i, values, caller))
        return work

    def _instruction(
        self, inside: Computation, i: Instruction, values: Values, caller: Instruction | None
    ) -> Work:
        kind = i.opcode.removesuffix("-start")
        if i.opcode in ("dot-start", "convolution-start"):
            raise HloError(f"{i.name}: {i.opcode} is not understood; jaxgrpo/hlo.py must learn it")
        if i.opcode in ("dot", "convolution"):
            return Work(matmuls=[_matmul(inside, i, caller)])
        if kind in _TRANSFERS:
            return Work(collectives=self._collective(inside, i, kind, caller))
        if i.opcode in _OPAQUE:
            return Work(unknown=[Unknown(i.name, i.opcode, i.op_name, 1)])
        if kind == "custom-call" and i.target not in _PLAIN:
            return Work(unknown=[Unknown(i.name, i.target, i.op_name, 1)])
        if i.opcode == "while":
            return self._loop(i, values)
        if i.opcode == "conditional":
            return self._conditional(i, values)
        if i.opcode.endswith(("-done", "-update")):  # counted at their start
            return Work()
        if kind in ("fusion", "call", "async"):  # tpu7x starts calls too
            called = self.module[i.computations("calls", "to_apply")[0]]
            arguments = Values(self.module, called, values.of(i.operands))
            return self.computation(called, arguments, i if kind == "fusion" else caller)
        for name in i.computations():  # the scalar function of a reduction, a sort, ...
            called = self.module[name]
            if self.computation(called, Values(self.module, called, ())).matters:
                raise HloError(
                    f"{i.name}: a {i.opcode} whose function {name} multiplies matrices or "
                    "communicates is not understood; jaxgrpo/hlo.py must learn to weigh it"
                )
        return Work()

    def _loop(self, i: Instruction, values: Values) -> Work:
        start = values[i.operands[0]]
        count, exact = trips(self.module, i, start)
        body = self.module[i.computations("body")[0]]
        condition = self.module[i.computations("condition")[0]]
        inner = [invariants(self.module, body, start)]
        once = self.computation(body, Values(self.module, body, inner))
        test = self.computation(condition, Values(self.module, condition, inner))
        if not (once.matters or test.matters):
            return Work()
        if count is None:
            count = self.loop_limit
        if count is None:
            raise HloError(
                f"the trips of the loop {i.name} ({i.op_name or 'no op_name'}) cannot be read; "
                "give loop_limit, the most that it runs"
            )
        work = Work()
        work.add(once, count)
        work.add(test, count + 1)
        if not exact:
            work.bounds.append(Bound("loop", i.name, i.op_name, count))
        return work

    def _conditional(self, i: Instruction, values: Values) -> Work:
        names = i.computations("branch_computations")
        if not names:  # the other way of writing a boolean one
            names = i.computations("false_computation") + i.computations("true_computation")
            operands = i.operands[:0:-1]
        else:
            operands = i.operands[1:]
        branches = [
            self.computation(
                self.module[name],
                Values(self.module, self.module[name], values.of([operand])),
            )
            for name, operand in zip(names, operands, strict=True)
        ]
        if not any(branch.matters for branch in branches):
            return Work()
        shares = self.branch_shares(i.op_name)
        work = Work()
        if shares is None:
            heaviest = max(branches, key=Work.flops)
            widest = max(branches, key=Work.collective_bytes)
            work.add(dataclasses.replace(heaviest, collectives=widest.collectives))
            if any(branch != branches[0] for branch in branches):
                work.bounds.append(Bound("conditional", i.name, i.op_name, 1))
            return work
        if len(shares) != len(branches) or not math.isclose(sum(shares), 1):
            raise HloError(
                f"the conditional {i.name} ({i.op_name}) has {len(branches)} branches: expected "
                f"as many shares with the sum 1, found {list(shares)}"
            )
        for branch, share in zip(branches, shares, strict=True):
            work.add(branch, share)
        return work

    def _collective(
        self, inside: Computation, i: Instruction, kind: str, caller: Instruction | None
    ) -> list[Collective]:
        users = [u for u in inside if i.name in u.operands]
        if "chain_id=" in i.attributes and not any(
            u.target == "AsyncCollectiveStart" for u in users
        ):
            self._check_chain(i)
            return []  # goes on from the fusion that started it
        result = i.shape
        if i.opcode in ("all-gather-start", "collective-permute-start"):
            result = i.shape[1]  # (operands, results, ...)
        if caller is not None and inside.name.startswith("all-reduce-scatter"):
            kind, result = "reduce-scatter", caller.shape
        groups = replica_groups(i, self.module.devices)
        size = self.devices_per_slice
        return [
            Collective(
                name=i.name,
                op_name=i.op_name or (caller.op_name if caller else ""),
                kind=kind,
                result_bytes=shape_bytes(result),
                operand_bytes=sum(shape_bytes(inside[name].shape) for name in i.operands),
                group_size=groups.shape[1],
                crosses_slices=bool(size and np.any(groups // size != groups[:, :1] // size)),
                times=1,
            )
        ]

    def _check_chain(self, i: Instruction) -> None:
        """A collective that goes on must have started somewhere."""
        chain = re.search(r'chain_id="(\d+)"', i.attributes)
        if chain is None or chain[1] not in self.module.started_chains:
            raise HloError(f"{i.name} goes on with a collective that nothing starts")


# ---- FLOPs ----


def _matmul(inside: Computation, i: Instruction, caller: Instruction | None) -> Matmul:
    flops = _dot_flops(inside, i) if i.opcode == "dot" else _convolution_flops(inside, i)
    return Matmul(
        name=i.name,
        op_name=i.op_name or (caller.op_name if caller else ""),
        batched=i.opcode == "dot"
        and "lhs_batch_dims={}" not in i.attributes
        and "lhs_batch_dims" in i.attributes,
        flops=flops,
        times=1,
        rematerialised=".remat" in i.name or (caller is not None and ".remat" in caller.name),
    )


def _dot_flops(inside: Computation, i: Instruction) -> int:
    """[a, c] x [c, b] is 2 * a * b * c."""
    left = inside[i.operands[0]].shape.dims
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", i.attributes)
    sizes = [left[int(d)] for d in contracted[1].split(",") if d] if contracted else []
    return 2 * math.prod(i.shape.dims) * math.prod(sizes)


def _convolution_flops(inside: Computation, i: Instruction) -> int:
    """2 * batch * in features * out features * the (output, window) pairs that meet an element."""
    left, kernel = (inside[name].shape.dims for name in i.operands)
    labels = re.fullmatch(r"(\w+)_(\w+)->(\w+)", i.attribute("dim_labels"))
    if labels is None:
        raise HloError(f"{i.name}: dim_labels={i.attribute('dim_labels')} are not understood")
    at_left, at_kernel, at_out = ({c: n for n, c in enumerate(labels[k])} for k in (1, 2, 3))
    window = dict(re.findall(r"(\w+)=(\S+)", i.attribute("window", "{}").strip("{}")))

    def numbers(key: str, default: int) -> list[int]:
        count = len(at_left) - 2
        return [int(x) for x in window[key].split("x")] if key in window else [default] * count

    strides, dilated = numbers("stride", 1), numbers("lhs_dilate", 1)
    spread = numbers("rhs_dilate", 1)
    low = [int(x.split("_")[0]) for x in window["pad"].split("x")] if "pad" in window else None
    pairs = 1
    for d in range(len(at_left) - 2):
        pairs *= _met(
            left[at_left[str(d)]],
            kernel[at_kernel[str(d)]],
            i.shape.dims[at_out[str(d)]],
            strides[d],
            low[d] if low else 0,
            dilated[d],
            spread[d],
        )
    groups = re.search(r"batch_group_count=(\d+)", i.attributes)
    batch = left[at_left["b"]] // (int(groups[1]) if groups else 1)
    return 2 * batch * kernel[at_kernel["i"]] * kernel[at_kernel["o"]] * pairs


def _met(
    size: int, window: int, outputs: int, stride: int, low: int, dilated: int, spread: int
) -> int:
    """(output, window element) pairs of one axis that meet an element of the input.

    `dilated` - 1 holes lie between the input's elements, `spread` - 1 between the window's.
    Example: 3 elements, a window of 3, padding 2 and 3 outputs meet at 1 + 2 + 3 places.
    """
    met = 0
    starts = np.arange(outputs, dtype=np.int64) * stride - low
    for element in range(window):
        place = starts + element * spread
        met += int(
            np.count_nonzero((place >= 0) & (place % dilated == 0) & (place // dilated < size))
        )
    return met
