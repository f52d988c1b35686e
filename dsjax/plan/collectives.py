"""What a compiled program sends between chips, read from its text."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "ragged-all-to-all",
    "all-to-all",
    "collective-permute",
)


@dataclass(frozen=True)
class CollectiveUse:
    """What one kind of collective over one set of mesh axes does in a program.

    Attributes:
        instructions: times it is written in the program.
        executions: times it runs, loops multiplied out.
        bytes: what one chip sends over all executions, at the least: (n-1)/n of the whole array
            for a gather, a scatter or an all-to-all over n chips, twice that for an all-reduce. A
            ragged all-to-all counts the room there is to receive, as the program does not say how
            much of it is used.
    """

    instructions: int
    executions: int
    bytes: int


def count_collectives(hlo: str) -> dict[str, CollectiveUse]:
    """Counts the collectives of a compiled program.

    Args:
        hlo: `Compiled.as_text()`, the program of one chip.

    Returns:
        By "kind over axes", as in "all-gather over fsdp+expert"; chips that no mesh axis names
        are given by their number, as in "all-reduce over 4 chips".
    """
    bodies = _computations(hlo)
    uses: dict[str, CollectiveUse] = {}
    for name, times in _executions(bodies):
        for line in bodies[name]:
            found = _INSTRUCTION.match(line)
            if found is None or found["op"].removesuffix("-start") not in COLLECTIVES:
                continue
            kind = found["op"].removesuffix("-start")
            over, chips = _chips(line)
            sent = _sent_bytes(kind, found["type"], chips, found["op"].endswith("-start"))
            key = f"{kind} over {over}"
            old = uses.get(key, CollectiveUse(0, 0, 0))
            uses[key] = CollectiveUse(
                old.instructions + 1, old.executions + times, old.bytes + times * sent
            )
    return dict(sorted(uses.items()))


_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?:ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<op>[a-z][a-z0-9\-]*)\("
)
_CALLED = re.compile(r"(?:body|calls|to_apply|async_execution_thread_calls)=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_CONSTANT = re.compile(r"%?([\w.\-]+) = s32\[\]\S* constant\((\d+)\)")
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\]")
_BITS = re.compile(r"\d+")


def _computations(hlo: str) -> dict[str, list[str]]:
    """Returns the lines of each computation by its name; the entry's is ""."""
    bodies: dict[str, list[str]] = {}
    current: list[str] = []
    for line in hlo.splitlines():
        header = _HEADER.match(line)
        if header is not None:
            current = bodies.setdefault("" if header["entry"] else header["name"], [])
        else:
            current.append(line)
    return bodies


def _executions(bodies: dict[str, list[str]]) -> Iterator[tuple[str, int]]:
    """Yields every computation that the entry reaches, with the times it runs."""
    waiting = [("", 1)]
    while waiting:
        name, times = waiting.pop()
        yield name, times
        for line in bodies[name]:
            found = _INSTRUCTION.match(line)
            if found is None or found["op"].endswith(("-done", "-update")):
                continue  # an asynchronous call is counted where it starts
            inside = times * (_trips(bodies, line) if found["op"] == "while" else 1)
            called = _CALLED.findall(line)
            for branches in _BRANCHES.findall(line):
                called += [branch.strip().lstrip("%") for branch in branches.split(",")]
            waiting += [(other, inside) for other in called if other in bodies]


def _trips(bodies: dict[str, list[str]], line: str) -> int:
    """The trip count of a loop: XLA's note of it, or the constant its counter is held against."""
    known = _TRIPS.search(line)
    if known is not None:
        return int(known[1])
    condition = _CONDITION.search(line)
    lines = bodies.get(condition[1], []) if condition is not None else []
    constants = {name: int(value) for name, value in _CONSTANT.findall("\n".join(lines))}
    for each in lines:
        if "direction=LT" in each:
            for operand in re.findall(r"%([\w.\-]+)", each.partition("compare(")[2]):
                if operand in constants:
                    return constants[operand]
    return 1  # how often it runs depends on data


def _chips(line: str) -> tuple[str, int]:
    """The mesh axes that a collective runs over, and the number of chips in one of its groups."""
    groups = re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line)
    if groups is not None:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([\w]+)'=(\d+)", groups[1])}
        axes = re.findall(r"'([\w]+)'", groups[2])
        chips = math.prod(sizes[axis] for axis in axes)
        named = all(not axis.startswith("axis_") for axis in axes)
        return ("+".join(axes) if named and axes else f"{chips} chips"), chips
    groups = re.search(r"replica_groups=\[(\d+),(\d+)\]", line)
    if groups is not None:
        return f"{groups[2]} chips", int(groups[2])
    groups = re.search(r"replica_groups=\{\{([\d,]*)\}", line)
    if groups is not None:
        chips = groups[1].count(",") + 1
        return f"{chips} chips", chips
    return "pairs", 2


def _sent_bytes(kind: str, result: str, chips: int, started: bool) -> int:
    sizes = [_array_bytes(dtype, dims) for dtype, dims in _ARRAY.findall(result)]
    # The result of a start holds operands beside results; the larger half is the whole array, but
    # a ragged exchange names what it sends, then what it fills.
    size = sum(sizes)
    if started:
        size = sizes[1] if kind == "ragged-all-to-all" else max(sizes)
    match kind:
        case "all-reduce":
            return 2 * size * (chips - 1) // chips
        case "reduce-scatter":  # the result is one chip's part
            return size if started else size * (chips - 1)
        case "collective-permute":
            return size
    return size * (chips - 1) // chips


def _array_bytes(dtype: str, dims: str) -> int:
    bits = 8 if dtype == "pred" else int(_BITS.findall(dtype)[0])
    return math.prod(int(size) for size in dims.split(",") if size) * bits // 8
