"""The text of an optimised XLA module, parsed as far as `hlo.py` needs it.

One line is one instruction, `%name = shape opcode(%operands), key=value, ...`; computations are
blocks of lines; the first line holds what concerns the whole module.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator
from functools import cached_property
from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numpy.typing import NDArray


class HloError(ValueError):
    """The text of a compiled program that is not understood."""


class Shape(NamedTuple):
    """An array's element type and dimensions."""

    dtype: str
    dims: tuple[int, ...]


Shapes: TypeAlias = Any  # a Shape, or a tuple of Shapes (nested)

_BITS = {"pred": 8, "token": 0, "opaque": 0, "c64": 64, "c128": 128}
_LEADING_SHAPE = re.compile(r"(\w+)\[([^\]]*)\](\{[^{}]*\})?")
_COMMENT = re.compile(r"/\*.*?\*/")
# What a Pallas kernel says of itself: the only attribute that is written over several lines.
_KERNEL_NOTES = re.compile(r"kernel_metadata=\{\n.*?\n\}", re.DOTALL)
_REFERENCES = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(
    r"\b(calls|to_apply|body|condition|branch_computations|true_computation|false_computation"
    r"|called_computations)=(\{[^}]*\}|%[\w.\-]+)"
)


def shape_bytes(shape: Shapes) -> int:
    """Bytes of an array or of all parts of a tuple, without a layout's padding."""
    if not isinstance(shape, Shape):
        return sum(shape_bytes(part) for part in shape)
    if shape.dtype in _BITS:
        bits = _BITS[shape.dtype]
    else:
        match = re.match(r"[a-z]+(\d+)", shape.dtype)
        if match is None:
            raise HloError(f"the element type {shape.dtype} is not known")
        bits = int(match[1])
    return -(-math.prod(shape.dims) * bits // 8)


def parse_shape(text: str) -> tuple[Shapes, str]:
    """The shape that `text` starts with, and the rest: `(f32[2]{0}, s32[]) x` -> tuple, ` x`."""
    if text.startswith("("):
        parts, rest = [], text[1:]
        while not rest.startswith(")"):
            part, rest = parse_shape(rest.lstrip(", "))
            parts.append(part)
        return tuple(parts), rest[1:]
    match = _LEADING_SHAPE.match(text)
    if match is None:
        raise HloError(f"expected a shape, found {text[:80]!r}")
    dims = tuple(int(d.removeprefix("<=")) for d in match[2].split(",") if d)
    return Shape(match[1], dims), text[match.end() :]


class Instruction:
    """One line of a computation."""

    def __init__(self, line: str):
        self.is_root = line.startswith("ROOT ")
        name, _, rest = line.removeprefix("ROOT ").partition(" = ")
        self.name = name.lstrip("%")
        self.shape, rest = parse_shape(rest)
        self.opcode, _, rest = rest.strip().partition("(")
        end = _closing(rest)
        self.literal = rest[:end]  # a constant's value, a parameter's number
        self.operands = tuple(_REFERENCES.findall(rest[:end]))
        self.attributes = rest[end + 1 :]

    @property
    def number(self) -> int:
        """A parameter's."""
        return int(self.literal)

    @cached_property
    def op_name(self) -> str:
        """The path in the traced program, "" if there is none."""
        match = re.search(r'op_name="((?:[^"\\]|\\.)*)"', self.attributes)
        return match[1] if match else ""

    @cached_property
    def target(self) -> str:
        """A custom call's."""
        match = re.search(r'custom_call_target="([^"]*)"', self.attributes)
        return match[1] if match else ""

    def attribute(self, key: str, default: str | None = None) -> str:
        """The value of `key=value`: a word or {...}."""
        match = re.search(rf"\b{key}=(\{{[^}}]*\}}|[^\s,]+)", self.attributes)
        if match is None and default is None:
            raise HloError(f"{self.name}: a {self.opcode} without {key}=")
        return match[1] if match else str(default)

    def computations(self, *keys: str) -> list[str]:
        """The computations that it names, under these keys only if any are given."""
        before_metadata = self.attributes.partition("metadata={")[0]
        return [
            name
            for key, names in _CALLED.findall(before_metadata)
            if not keys or key in keys
            for name in _REFERENCES.findall(names)
        ]


def _closing(text: str) -> int:
    """The index of the parenthesis that closes one opened just before `text`."""
    depth = 1
    for match in re.finditer(r"[()]|\"(?:[^\"\\]|\\.)*\"", text):
        depth += {"(": 1, ")": -1}.get(match[0], 0)
        if depth == 0:
            return match.start()
    raise HloError(f"no closing parenthesis in {text[:80]!r}")


class Computation:
    """Instructions in order of execution."""

    def __init__(self, name: str, lines: list[str]):
        self.name = name
        self.lines = lines

    @cached_property
    def by_name(self) -> dict[str, Instruction]:
        instructions = [Instruction(line) for line in self.lines]
        return {i.name: i for i in instructions}

    @cached_property
    def root(self) -> Instruction:
        return next(i for i in self if i.is_root)

    def __getitem__(self, name: str) -> Instruction:
        return self.by_name[name]

    def __iter__(self) -> Iterator[Instruction]:
        return iter(self.by_name.values())


@dataclasses.dataclass(frozen=True)
class Module:
    """A whole program."""

    computations: dict[str, Computation]
    entry: Computation
    devices: int
    aliased: list[tuple[int, tuple[int, ...]]]  # (argument, place in it if it is a tuple)
    started_chains: frozenset[str]  # of collectives that go on through several fusions

    def __getitem__(self, name: str) -> Computation:
        return self.computations[name]

    @classmethod
    def parse(cls, text: str) -> Module:
        """Reads `compiled.as_text()`.

        Raises:
          HloError: it is not such a text.
        """
        header, _, body = text.partition("\n")
        body = _KERNEL_NOTES.sub("", body)
        if not header.startswith("HloModule "):
            raise HloError(f"expected the text of a compiled program, found {header[:80]!r}")
        if re.search(r"replica_count=(?!1\b)", header):
            raise HloError("programs of several replicas (pmap) are not understood")
        computations: dict[str, Computation] = {}
        entry: Computation | None = None
        lines: list[str] | None = None
        for line in body.splitlines():
            start = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
            if start:
                lines = []
                computations[start[2]] = Computation(start[2], lines)
                entry = computations[start[2]] if start[1] else entry
            elif line.startswith("}"):
                lines = None
            elif lines is not None and " = " in line:
                lines.append(_COMMENT.sub("", line.strip()))
        if entry is None:
            raise HloError("the program has no entry computation")
        partitions = re.search(r"num_partitions=(\d+)", header)
        return cls(
            computations,
            entry,
            int(partitions[1]) if partitions else 1,
            _aliased(header),
            _started_chains(computations),
        )


def _aliased(header: str) -> list[tuple[int, tuple[int, ...]]]:
    """`input_output_alias={ {0}: (3, {}, may-alias) }` -> [(3, ())]."""
    found = re.findall(r"\{[\d, ]*\}: \((\d+), \{([\d, ]*)\}, m\w+-alias\)", header)
    return [(int(number), tuple(int(x) for x in path.split(",") if x)) for number, path in found]


def _started_chains(computations: dict[str, Computation]) -> frozenset[str]:
    """The chains of the collectives that an AsyncCollectiveStart takes up."""
    chains = set()
    for computation in computations.values():
        if any('"AsyncCollectiveStart"' in line for line in computation.lines):
            for i in computation:
                if i.target == "AsyncCollectiveStart":
                    attributes = computation[i.operands[0]].attributes
                    chains.update(re.findall(r'chain_id="(\d+)"', attributes))
    return frozenset(chains)


# ---- who talks to whom ----


def replica_groups(i: Instruction, devices: int) -> NDArray[np.int64]:
    """[groups, members] of a collective's devices; a permute's pairs are its groups.

    XLA writes them in four ways: `{{0,1},{2,3}}`; `[2,2]<=[2,2]T(1,0)`, which is
    `arange(4).reshape(2, 2).transpose(1, 0).reshape(2, 2)`; by axes of a mesh,
    `mesh['a'=2,'b'=2] {'b'}`, perhaps with another order of devices; and `{}`, all devices.
    """
    pairs = re.search(r"\bsource_target_pairs=(\{[{}\d,]*\})", i.attributes)
    if pairs:
        return _listed(pairs[1])
    iota = re.search(
        r"\breplica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", i.attributes
    )
    if iota:
        return _iota(iota[3], iota[4]).reshape(int(iota[1]), int(iota[2]))
    listed = re.search(r"\breplica_groups=(\{[{}\d,]*\})", i.attributes)
    if listed:
        return _listed(listed[1]) if "0" in listed[1] else np.arange(devices)[None]
    mesh = re.search(
        r"\breplica_groups=mesh\[((?:'\w+'=\d+,?)+)\](?:, device_ids=\((.*?\)?)\))?"
        r" \{((?:'\w+',?)*)\}",
        i.attributes,
    )
    if mesh:
        return _along_axes(*mesh.groups())
    raise HloError(f"{i.name}: the groups of devices are not understood: {i.attributes[:200]}")


def _iota(dims: str, permutation: str | None) -> NDArray[np.int64]:
    """Device numbers: ("2,3", "1,0") -> [[0 3] [1 4] [2 5]]."""
    sizes = [int(d) for d in dims.split(",")]
    ids = np.arange(math.prod(sizes)).reshape(sizes)
    return ids.transpose([int(d) for d in permutation.split(",")]) if permutation else ids


def _along_axes(axes: str, order: str | None, members: str) -> NDArray[np.int64]:
    """The groups along some axes of a mesh, whose devices may be listed in another order."""
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", axes)}
    permuted = re.fullmatch(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", order or "")
    if permuted:
        ids = _iota(permuted[1], permuted[2])
    elif order:
        ids = np.array([int(x) for x in order.split(",")])
    else:
        ids = np.arange(math.prod(sizes.values()))
    names, along = list(sizes), re.findall(r"'(\w+)'", members)
    axis_order = [names.index(n) for n in [n for n in names if n not in along] + along]
    groups = ids.reshape(tuple(sizes.values())).transpose(axis_order)
    return groups.reshape(-1, math.prod(sizes[n] for n in along))


def _listed(text: str) -> NDArray[np.int64]:
    rows = [[int(x) for x in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", text)]
    if len({len(row) for row in rows}) != 1:
        raise HloError(f"groups of devices of different sizes are not understood: {text[:80]}")
    return np.array(rows)
