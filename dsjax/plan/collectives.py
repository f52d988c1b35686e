"""What a compiled program sends between chips, read from its text."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from dsjax.plan.program import Instruction, Program

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
        expected_bytes: the same with the rows that a ragged all-to-all is expected to move.
    """

    instructions: int
    executions: int
    bytes: int
    expected_bytes: int


@dataclass(frozen=True)
class Collective:
    """One collective of a program, as libtpu or XLA emits it.

    Attributes:
        kind: one of `COLLECTIVES`.
        axes: the mesh axes that it runs over, in the mesh's order; where no axis is known, what the
            program says instead, such as "8 chips".
        groups: ids of the chips of each group, or () where the program does not say.
        chips: chips of a group.
        bytes: what a chip sends, as `CollectiveUse.bytes`.
        started: it only begins here and ends with its "-done".
    """

    kind: str
    axes: str
    groups: tuple[tuple[int, ...], ...]
    chips: int
    bytes: int
    started: bool

    def expected_bytes(self, exchange_room: float) -> int:
        """What a chip is expected to send, where ragged exchanges have room over the mean."""
        ragged = self.kind == "ragged-all-to-all"
        return round(self.bytes / exchange_room) if ragged else self.bytes


def count_collectives(
    hlo: str | Program, mesh: Mapping[str, int] | None = None, exchange_room: float = 1.0
) -> dict[str, CollectiveUse]:
    """Counts the collectives of a compiled program.

    Args:
        hlo: `Compiled.as_text()`, the program of one chip, or that already read.
        mesh: sizes of the mesh's axes, in the order in which they lay out the chips. With it, every
            group of chips is given by the axes along which its chips differ.
        exchange_room: how much more room a ragged exchange has than the rows that are expected.

    Returns:
        By "kind over axes", as in "all-gather over fsdp+expert"; chips that no mesh axis names
        are given by their number, as in "all-reduce over 4 chips".
    """
    program = Program.of(hlo) if isinstance(hlo, str) else hlo
    uses: dict[str, CollectiveUse] = {}
    for name, times in program.executions():
        if is_counted_at_its_call(program, name):
            continue
        for instruction in program.bodies[name]:
            found = find_collective(program, instruction, mesh)
            if found is None:
                continue
            key = f"{found.kind} over {found.axes}"
            old = uses.get(key, CollectiveUse(0, 0, 0, 0))
            uses[key] = CollectiveUse(
                old.instructions + 1,
                old.executions + times,
                old.bytes + times * found.bytes,
                old.expected_bytes + times * found.expected_bytes(exchange_room),
            )
    return dict(sorted(uses.items()))


def find_collective(
    program: Program, instruction: Instruction, mesh: Mapping[str, int] | None = None
) -> Collective | None:
    """Returns the collective that an instruction is, or None where it is none.

    An all-reduce of which each chip keeps its part is emitted as one reduce-scatter, and is written
    as a fusion that calls the all-reduce and the slice. One that runs beside products, on v5e and
    v6e, is written once in each of a chain of fusions: that which starts it, the products, and that
    which waits for it. The fusion, of a chain the first, is then the collective; what fusions call
    (`is_counted_at_its_call`) is not to be counted again.
    """
    kind, started = instruction.op.removesuffix("-start"), instruction.op.endswith("-start")
    arrays, written = instruction.arrays, instruction
    if instruction.op == "fusion":
        name = next(iter(instruction.called), "")
        link = chain_link(program, instruction)
        if link is not None:
            if link.place != "start":
                return None
            written = link.collective
            kind, arrays = written.op, written.arrays
        elif is_fused_scatter(program, name):
            kind = "reduce-scatter"
            written = next(each for each in program.bodies[name] if each.op == "all-reduce")
        else:
            return None
    elif kind not in COLLECTIVES:
        return None
    axes, groups, chips = _chips(written, kind, mesh)
    sent = _sent_bytes(kind, [array.num_bytes for array in arrays], chips, started)
    return Collective(kind, axes, groups, chips, sent, started)


@dataclass(frozen=True)
class ChainLink:
    """A fusion as a part of a collective that runs beside products.

    Attributes:
        chain: the same for all of one collective.
        place: where in it: "start", "middle" (products) or "done".
        collective: what is written in it of the collective.
    """

    chain: str
    place: str
    collective: Instruction


def chain_link(program: Program, fusion: Instruction) -> ChainLink | None:
    """Returns what a fusion is of a collective that runs beside products, or None."""
    for name in fusion.called if fusion.op == "fusion" else ():
        body = program.bodies.get(name, ())
        for each in body:
            found = _CHAIN.search(each.attributes)
            if found is not None and each.op in COLLECTIVES:
                marks = "".join(other.attributes for other in body if other.op == "custom-call")
                starts, ends = _STARTS in marks, _ENDS in marks
                place = "start" if starts else "done" if ends else "middle"
                return ChainLink(found[1], place, each)
    return None


def is_counted_at_its_call(program: Program, computation: str) -> bool:
    """Whether the collective in a computation is that of the fusion which calls it."""
    body = program.bodies.get(computation, ())
    chained = any(each.op in COLLECTIVES and _CHAIN.search(each.attributes) for each in body)
    return chained or is_fused_scatter(program, computation)


def is_fused_scatter(program: Program, computation: str) -> bool:
    """Whether a computation is an all-reduce and the slice of it that a chip keeps."""
    body = {each.name: each for each in program.bodies.get(computation, ())}
    if not any(each.op == "all-reduce" for each in body.values()):
        return False
    kept = next((each for each in body.values() if each.is_root), None)
    while kept is not None and kept.op in ("bitcast", "reshape", "copy", "convert"):
        kept = body.get(kept.operands[0])
    if kept is None or kept.op != "dynamic-slice":
        return False
    source = body.get(kept.operands[0])
    while source is not None and source.op in ("bitcast", "reshape", "copy"):
        source = body.get(source.operands[0])
    return source is not None and source.op == "all-reduce"


_CHAIN = re.compile(r'chain_id="(\d+)"')
_STARTS, _ENDS = '"AsyncCollectiveStart"', '"AsyncCollectiveDone"'
_NAMED = re.compile(r"replica_groups=mesh\[([^\]]*)\](.*?) \{([^}]*)\}")
_IOTA = re.compile(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
_SHAPE = re.compile(r"replica_groups=\[(\d+),(\d+)\]")
_LISTED = re.compile(r"replica_groups=\{(\{[\d,{}]*\})\}")
_PAIRS = re.compile(r"source_target_pairs=\{(\{[\d,{}]*\})\}")
_DEVICES = re.compile(r"device_ids=\(?\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_Groups = tuple[tuple[int, ...], ...]


def _chips(
    instruction: Instruction, kind: str, mesh: Mapping[str, int] | None
) -> tuple[str, _Groups, int]:
    """The mesh axes that a collective runs over, its groups, and the chips of one group."""
    text = instruction.attributes
    if kind == "collective-permute":
        pairs = _PAIRS.search(text)
        groups = _listed(pairs[1]) if pairs is not None else ()
        return _axes(groups, mesh) or "pairs", groups, 2
    named, iota, shape, listed = (p.search(text) for p in (_NAMED, _IOTA, _SHAPE, _LISTED))
    if named is not None:
        sizes = {axis: int(size) for axis, size in re.findall(r"'([\w]+)'=(\d+)", named[1])}
        chosen = re.findall(r"'([\w]+)'", named[3])
        axes = [axis for axis in sizes if axis in chosen]
        chips = math.prod(sizes[axis] for axis in axes)
        groups = _grid_groups(tuple(sizes.items()), tuple(axes), named[2])
        if mesh is None and axes and all(not axis.startswith("axis_") for axis in axes):
            return "+".join(axes), groups, chips
    elif iota is not None:
        groups = _iota_groups(iota[1], iota[2], iota[3] or "")
        chips = len(groups[0])
    elif shape is not None:
        return f"{shape[2]} chips", (), int(shape[2])
    elif listed is not None:
        groups = _listed(listed[1])
        chips = len(groups[0])
    else:  # one group of all
        chips = math.prod((mesh or {"": 1}).values())
        groups = (tuple(range(chips)),)
    return _axes(groups, mesh) or f"{chips} chips", groups, chips


def _axes(groups: _Groups, mesh: Mapping[str, int] | None) -> str | None:
    """The axes along which the chips of a group differ, where all groups agree."""
    if mesh is None or not groups or max(map(max, groups)) >= math.prod(mesh.values()):
        return None
    places = np.array([np.unravel_index(group, tuple(mesh.values())) for group in groups])
    differ = np.any(places != places[..., :1], axis=(0, 2))
    return "+".join(axis for axis, yes in zip(mesh, differ, strict=True) if yes) or None


@functools.cache
def _grid_groups(sizes: tuple[tuple[str, int], ...], over: tuple[str, ...], order: str) -> _Groups:
    """The groups of chips along some axes of a grid that the program names."""
    shape = tuple(size for _, size in sizes)
    ids = np.arange(math.prod(shape))
    devices = _DEVICES.search(order)
    if devices is not None:  # a transposed count, as in "device_ids=([4,2]T(1,0))"
        counted = devices[2] or devices[1]
        ids = np.array(_iota_groups(devices[1], counted, devices[3] or "")).reshape(-1)
    inside = [place for place, (axis, _) in enumerate(sizes) if axis in over]
    outside = [place for place in range(len(sizes)) if place not in inside]
    chips = math.prod(shape[place] for place in inside)
    grid = ids.reshape(shape).transpose(*outside, *inside).reshape(-1, chips)
    return tuple(tuple(map(int, group)) for group in grid)


@functools.cache
def _iota_groups(shape: str, counted: str, order: str) -> _Groups:
    """The groups of XLA's "[groups,chips]<=[sizes]T(order)"."""
    sizes = [int(size) for size in counted.split(",")]
    grid = np.arange(math.prod(sizes)).reshape(sizes)
    if order:
        grid = grid.transpose([int(place) for place in order.split(",")])
    last = int(shape.split(",")[-1])
    return tuple(tuple(map(int, group)) for group in grid.reshape(-1, last))


def _listed(text: str) -> _Groups:
    return tuple(
        tuple(int(each) for each in group.split(",")) for group in re.findall(r"\{([\d,]+)\}", text)
    )


def _sent_bytes(kind: str, sizes: list[int], chips: int, started: bool) -> int:
    # The result of a start holds operands beside results; the larger half is the whole array, but
    # a ragged exchange names what it sends, then what it fills.
    size = sum(sizes)
    if started and sizes:
        size = sizes[1] if kind == "ragged-all-to-all" else _larger_half(sizes)
    match kind:
        case "all-reduce":
            return 2 * size * (chips - 1) // chips
        case "reduce-scatter":  # the result is one chip's part
            return size * (chips - 1) // chips if started else size * (chips - 1)
        case "collective-permute":
            return size
    return size * (chips - 1) // chips


def _larger_half(sizes: list[int]) -> int:
    """Of operands and the results that follow them, and perhaps counters, the larger sum.

    Counters are scalars; the arrays are as many operands as results.
    """
    arrays = [size for size in sizes if size > 4]
    half = len(arrays) // 2
    if not half or len(arrays) % 2:
        return max(sizes)
    return max(sum(arrays[:half]), sum(arrays[half:]))
