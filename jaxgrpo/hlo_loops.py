"""How often the loops of a compiled XLA program run.

Only scalars that follow from constants are evaluated: where a loop starts, by how much its body
moves a carried value, and what its condition compares that with.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeAlias

from jaxgrpo.hlo_text import Computation, Instruction, Module


class Carried(NamedTuple):
    """A loop's carried value, plus a constant."""

    place: int
    plus: int


class Comparison(NamedTuple):
    left: Value
    direction: str
    right: Value


class Both(NamedTuple):
    """A conjunction: a loop that also stops for another reason."""

    parts: tuple[Value, ...]


class Tuple(NamedTuple):
    parts: tuple[Value, ...]


Value: TypeAlias = int | Carried | Comparison | Both | Tuple | None  # None: not known

_SAME = {"copy", "bitcast", "convert", "reshape", "opt-barrier", "copy-done"}


class Values:
    """The scalars of one computation, as far as they follow from constants and arguments."""

    def __init__(self, module: Module, computation: Computation, arguments: Sequence[Value]):
        self.module = module
        self.computation = computation
        self.arguments = arguments
        self.known: dict[str, Value] = {}

    def __getitem__(self, name: str) -> Value:
        if name not in self.known:
            self.known[name] = self._evaluate(self.computation[name])
        return self.known[name]

    @property
    def root(self) -> Value:
        return self[self.computation.root.name]

    def of(self, names: Sequence[str]) -> tuple[Value, ...]:
        return tuple(self[name] for name in names)

    def _evaluate(self, i: Instruction) -> Value:
        if i.opcode == "parameter":
            return self.arguments[i.number] if i.number < len(self.arguments) else None
        if i.opcode == "constant":
            return int(i.literal) if re.fullmatch(r"-?\d+", i.literal) else None
        if i.opcode in _SAME and len(i.operands) == 1:
            return self[i.operands[0]]
        if i.opcode == "copy-start":
            return self[i.operands[0]]
        if i.opcode == "tuple":
            return Tuple(self.of(i.operands))
        if i.opcode == "get-tuple-element":
            whole = self[i.operands[0]]
            return whole.parts[int(i.attribute("index"))] if isinstance(whole, Tuple) else None
        if i.opcode in ("fusion", "call"):
            called = self.module[i.computations("calls", "to_apply")[0]]
            return Values(self.module, called, self.of(i.operands)).root
        if i.opcode in ("add", "subtract"):
            left, right = self.of(i.operands)
            return _sum(left, right, 1 if i.opcode == "add" else -1)
        if i.opcode == "compare":
            left, right = self.of(i.operands)
            return Comparison(left, i.attribute("direction"), right)
        if i.opcode == "and":
            return Both(self.of(i.operands))
        return None


def _sum(a: Value, b: Value, sign: int) -> Value:
    """a + sign * b where that stays a constant or a carried value plus a constant."""
    if isinstance(a, int) and isinstance(b, int):
        return a + sign * b
    if isinstance(a, Carried) and isinstance(b, int):
        return Carried(a.place, a.plus + sign * b)
    if isinstance(a, int) and isinstance(b, Carried) and sign == 1:
        return Carried(b.place, b.plus + a)
    return None


class Trips(NamedTuple):
    most: int | None  # None: not readable
    exact: bool


def trips(module: Module, loop: Instruction, start: Value) -> Trips:
    """How often a loop's body runs."""
    known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes)
    if known:
        return Trips(int(known[1]), True)
    carried = Tuple(tuple(Carried(k, 0) for k in range(len(loop.shape))))
    condition = Values(module, module[loop.computations("condition")[0]], [carried]).root
    after = Values(module, module[loop.computations("body")[0]], [carried]).root
    if not isinstance(start, Tuple) or not isinstance(after, Tuple):
        return Trips(None, False)
    counts = [trips_until(c, start.parts, after.parts) for c in _comparisons(condition)]
    limits = [count for count in counts if count is not None]
    exact = isinstance(condition, Comparison) and bool(limits)
    return Trips(min(limits) if limits else None, exact)


def _comparisons(condition: Value) -> Iterator[Comparison]:
    if isinstance(condition, Comparison):
        yield condition
    elif isinstance(condition, Both):
        for part in condition.parts:
            yield from _comparisons(part)


_MIRRORED = {"LT": "GT", "LE": "GE", "GT": "LT", "GE": "LE"}


def trips_until(
    comparison: Comparison, start: tuple[Value, ...], after: tuple[Value, ...]
) -> int | None:
    """Trips until `comparison` fails: `i < 10` from 1 by 3 is 3 (i = 1, 4, 7)."""

    def constant(value: Value) -> int | None:  # a bound that the loop carries along unchanged
        if isinstance(value, Carried) and after[value.place] == Carried(value.place, 0):
            first = start[value.place]
            return first + value.plus if isinstance(first, int) else None
        return value if isinstance(value, int) else None

    left, direction, right = comparison
    if constant(left) is not None:
        left, right, direction = right, left, _MIRRORED.get(direction, direction)
    limit = constant(right)
    if not isinstance(left, Carried) or limit is None or direction not in _MIRRORED:
        return None
    first, then = start[left.place], after[left.place]
    if not isinstance(first, int) or not isinstance(then, Carried) or then.place != left.place:
        return None
    upwards = direction in ("LT", "LE")
    step = then.plus if upwards else -then.plus
    way = (limit - first - left.plus) * (1 if upwards else -1) + (direction in ("LE", "GE"))
    return max(-(-way // step), 0) if step > 0 else None


def invariants(module: Module, body: Computation, start: Value) -> Value:
    """What a loop's body knows of its argument: constants that it carries along unchanged."""
    if not isinstance(start, Tuple):
        return None
    carried = Tuple(tuple(Carried(k, 0) for k in range(len(start.parts))))
    after = Values(module, body, [carried]).root
    if not isinstance(after, Tuple):
        return None
    pairs = enumerate(zip(start.parts, after.parts, strict=True))
    return Tuple(tuple(s if a == Carried(k, 0) else None for k, (s, a) in pairs))
