"""FLOPs, bytes and a modelled time of a compiled program, from its instructions in their order.

An instruction takes the longer of its FLOPs at the chip's peak and its bytes at HBM's rate; a
collective what its links take. So the time is a lower bound: no kernel reaches its peak.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from dsjax.plan.collectives import COLLECTIVES, chain_link, find_collective, is_counted_at_its_call
from dsjax.plan.expected import AS_WRITTEN, Expected, attention_flops, decode_work, grouped_bytes
from dsjax.plan.pods import Pod
from dsjax.plan.program import Instruction, Program


@dataclass(frozen=True)
class Work:
    """What a program, or a part of it, does and takes on one chip.

    Attributes:
        flops: of products and kernels, loops multiplied out.
        recomputed: of these, what the backward pass computes a second time.
        hbm_bytes: read and written in HBM.
        compute_seconds: of everything that is no collective and no copy under way.
        copy_seconds: of copies that run beside other work where there is some.
        collective_seconds: of collectives.
        scheduled_seconds: of all, with what the schedule runs at a time.
    """

    flops: float = 0.0
    recomputed: float = 0.0
    hbm_bytes: float = 0.0
    compute_seconds: float = 0.0
    copy_seconds: float = 0.0
    collective_seconds: float = 0.0
    scheduled_seconds: float = 0.0

    def __add__(self, other: Work) -> Work:
        return Work(*(a + b for a, b in zip(self._all(), other._all(), strict=True)))

    def times(self, count: int) -> Work:
        """Returns the work of so many runs."""
        return Work(*(each * count for each in self._all()))

    @property
    def serial_seconds(self) -> float:
        """The time with nothing hidden."""
        return self.compute_seconds + self.copy_seconds + self.collective_seconds

    def _all(self) -> tuple[float, ...]:
        return tuple(vars(self).values())


def measure(
    program: Program, pod: Pod, mesh: Mapping[str, int], expected: Expected = AS_WRITTEN
) -> Work:
    """Returns the work of a program.

    Args:
        program: what one chip runs.
        pod: the chips.
        mesh: sizes of the mesh's axes.
        expected: what the program will meet; ragged exchanges take what is expected.
    """

    @functools.cache
    def body_work(name: str) -> Work:
        body = program.bodies[name]
        named = {each.name: each for each in body}
        total, now = Work(), 0.0
        free, ends = {"copy": 0.0, "links": 0.0}, {}  # type: dict[str, float], dict[str, float]
        for each in body:
            if each.op.endswith(("-done", "-update")):
                now = max(now, max((ends.get(name, 0.0) for name in each.operands), default=0.0))
                if each.op.endswith("-update"):
                    ends[each.name] = max((ends.get(n, 0.0) for n in each.operands), default=0.0)
                continue
            link = chain_link(program, each)
            if link is not None and link.place == "done":
                now = max(now, ends.get(f"chain {link.chain}", 0.0))
                continue
            work = one(each, named)
            total += work
            starts = link is not None and link.place == "start"
            if starts or each.op.endswith("-start"):
                resource = "links" if work.collective_seconds else "copy"
                end = max(now, free[resource]) + work.scheduled_seconds
                ends[f"chain {link.chain}" if link is not None else each.name] = end
                free[resource] = end
            else:
                now += work.scheduled_seconds
        end = max([now, *ends.values()])
        return dataclasses.replace(total, scheduled_seconds=end)

    def one(each: Instruction, named: Mapping[str, Instruction]) -> Work:
        collective = find_collective(program, each, mesh)
        if collective is not None:
            group = collective.groups[0] if collective.groups else ()
            seconds = pod.send_seconds(collective.expected_bytes(expected.exchange_room), group)
            return Work(collective_seconds=seconds, scheduled_seconds=seconds)
        if each.op in ("while", "call", "conditional", "call-start", "async-start"):
            inside = [
                body_work(name).times(trips)
                for name, trips in program.calls(each)
                if not is_counted_at_its_call(program, name)
            ]
            return functools.reduce(Work.__add__, inside, Work())
        if each.op in _FREE:
            return Work()
        of_decode = decode_work(each, named, expected.cached_tokens)
        flops, moved = of_decode or (
            _flops(program, each, named),
            _hbm_bytes(program, each, named, expected.experts_read),
        )
        if each.op in ("copy-start", "slice-start"):
            seconds = moved / pod.rates.hbm_bytes_per_second
            return Work(hbm_bytes=moved, copy_seconds=seconds, scheduled_seconds=seconds)
        seconds = max(flops / pod.flops_per_second, moved / pod.rates.hbm_bytes_per_second)
        again = flops if "rematted_computation" in each.scope else 0.0
        return Work(flops, again, moved, compute_seconds=seconds, scheduled_seconds=seconds)

    return body_work("")


def collective_seconds(
    program: Program, pod: Pod, mesh: Mapping[str, int], expected: Expected = AS_WRITTEN
) -> dict[str, float]:
    """Returns the time of each kind of collective by the name that `count_collectives` gives it.

    Args:
        program: as for `measure`, and so the others.
        pod: the chips.
        mesh: sizes of the mesh's axes.
        expected: ragged exchanges take what is expected.
    """
    found: dict[str, float] = {}
    for name, times in program.executions():
        if is_counted_at_its_call(program, name):
            continue
        for each in program.bodies[name]:
            collective = find_collective(program, each, mesh)
            if collective is None:
                continue
            group = collective.groups[0] if collective.groups else ()
            seconds = pod.send_seconds(collective.expected_bytes(expected.exchange_room), group)
            key = f"{collective.kind} over {collective.axes}"
            found[key] = found.get(key, 0.0) + times * seconds
    return found


_FREE = {"parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all", "iota"}
_FREE |= {"partition-id", "replica-id", "opt-barrier"}
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # written in place; where the update stands
_ESTIMATE = re.compile(r'cost_estimate":\{"flops":"(\d+)".*?"bytes_accessed":"(\d+)"')
_LABELS = re.compile(r"dim_labels=(\w+)_(\w+)->(\w+)")
_WINDOW = re.compile(r"window=\{([^}]*)\}")
_CONTRACTED = re.compile(r"lhs_contracting_dims=\{([\d,]*)\}")


def _flops(program: Program, each: Instruction, named: Mapping[str, Instruction]) -> float:
    estimate = _ESTIMATE.search(each.attributes) if each.op == "custom-call" else None
    if estimate is not None:
        return float(estimate[1])
    if each.op == "custom-call":
        return attention_flops(each, named)
    if each.op in ("convolution", "dot"):
        return _product_flops(each, named)
    if each.op != "fusion":
        return 0.0
    inside = 0.0
    for name in each.called:
        body = {other.name: other for other in program.bodies.get(name, ())}
        inside += sum(_flops(program, other, body) for other in body.values())
    return inside


def _product_flops(each: Instruction, named: Mapping[str, Instruction]) -> float:
    operands = [named[name].arrays[0] for name in each.operands if name in named]
    if len(operands) < 2 or not each.arrays:
        return 0.0
    out = math.prod(each.arrays[0].shape)
    if each.op == "dot":
        contracted = _CONTRACTED.search(each.attributes)
        dims = [int(dim) for dim in contracted[1].split(",") if dim] if contracted else []
        return 2.0 * out * math.prod(operands[0].shape[dim] for dim in dims)
    labels = _LABELS.search(each.attributes)
    if labels is None:
        return 0.0
    left, right, result = labels.groups()
    window = _WINDOW.search(each.attributes)
    parts = dict(part.split("=") for part in window[1].split()) if window is not None else {}
    products = operands[1].shape[right.index("i")]
    for size, dim in zip(each.arrays[0].shape, result, strict=True):
        products *= 1 if dim.isdigit() else size
    for dim in sorted(letter for letter in result if letter.isdigit()):
        place = int(dim)
        taps, stride, spread, apart = (
            int(parts[key].split("x")[place]) if key in parts else 1
            for key in ("size", "stride", "lhs_dilate", "rhs_dilate")
        )
        padding = parts["pad"].split("x")[place].split("_")[0] if "pad" in parts else "0"
        products *= _pairs(
            operands[0].shape[left.index(dim)],
            each.arrays[0].shape[result.index(dim)],
            (taps, stride, spread, apart, int(padding)),
        )
    return 2.0 * products


@functools.cache
def _pairs(size_in: int, size_out: int, window: tuple[int, int, int, int, int]) -> int:
    """Pairs of an output and a tap that meet an input, not padding or the zeros between inputs.

    So libtpu writes dims of batches and heads: as windows that meet one input each.
    """
    taps, stride, spread, apart, padding = window
    found = 0
    for out in range(size_out):
        for tap in range(taps):
            place = out * stride + tap * apart - padding
            found += 0 <= place < (size_in - 1) * spread + 1 and place % spread == 0
    return found


def _hbm_bytes(
    program: Program, each: Instruction, named: Mapping[str, Instruction], experts_read: float
) -> float:
    estimate = _ESTIMATE.search(each.attributes) if each.op == "custom-call" else None
    if estimate is not None:
        return grouped_bytes(each, named, float(estimate[2]), experts_read)
    if each.op == "copy-start":  # the copy, and what is copied
        return float(sum(array.num_bytes for array in each.arrays[:2] if array.in_hbm))
    if each.op == "slice-start":  # its result is the whole, and then the part that is copied
        return float(each.arrays[1].num_bytes * (1 + each.arrays[1].in_hbm))
    body = program.bodies.get(each.called[0], ()) if each.called else ()
    inner = [other for other in body if other.op == "parameter"]
    inner.sort(key=lambda other: int(other.attributes) if other.attributes.isdigit() else 0)
    total = 0.0
    for place, name in enumerate(each.operands):
        arrays = named[name].arrays if name in named else ()
        size = sum(array.num_bytes for array in arrays if array.in_hbm)
        if size and each.op == "fusion" and place < len(inner):
            size = min(size, _read_of(program, body, inner[place].name, size))
        elif each.op in ("dynamic-slice", "gather", *_UPDATES) and place == 0:
            size = 0 if each.op in _UPDATES else each.arrays[0].num_bytes
        total += size
    root = next((other for other in body if other.is_root), each)
    if root.op == "tuple" and len(root.operands) == len(each.arrays):
        ops = {other.name: other.op for other in body}
        passing = ("parameter", *COLLECTIVES)  # what only passes through is no result
        results = zip(root.operands, each.arrays, strict=True)
        return total + sum(x.num_bytes for n, x in results if x.in_hbm and ops[n] not in passing)
    if root.op in _UPDATES:  # in place
        inside = {other.name: other for other in body} if body else named
        place = _UPDATES[root.op]
        update = inside.get(root.operands[place]) if len(root.operands) > place else None
        return total + (update.arrays[0].num_bytes if update is not None else 0)
    return total + sum(array.num_bytes for array in each.arrays if array.in_hbm)


def _read_of(program: Program, body: tuple[Instruction, ...], parameter: str, whole: int) -> int:
    """What a fusion reads of an operand: the slices, where it only slices."""
    read = 0
    for user in body:
        if parameter not in user.operands:
            continue
        first = user.operands[0] == parameter
        if (user.op in _UPDATES and first) or user.op == "tuple" or user.op in COLLECTIVES:
            continue  # in place, passed through, or of a collective
        if user.op in ("dynamic-slice", "gather", "slice") and first:
            read += sum(array.num_bytes for array in user.arrays)
        elif not user.is_root and (
            user.op in ("bitcast", "copy") or (user.op == "fusion" and _is_copy(program, user))
        ):
            read += _read_of(program, body, user.name, whole)
        elif user.op == "fusion" and user.called:
            inner = program.bodies.get(user.called[0], ())
            names = {each.attributes: each.name for each in inner if each.op == "parameter"}
            for place, name in enumerate(user.operands):
                if name == parameter and str(place) in names:
                    read += _read_of(program, inner, names[str(place)], whole)
        else:
            return whole
    return min(read, whole)


def _is_copy(program: Program, fusion: Instruction) -> bool:
    """Whether a fusion within a fusion only lays its operand out otherwise."""
    body = program.bodies.get(fusion.called[0], ()) if fusion.called else ()
    return bool(body) and {each.op for each in body} <= {"parameter", "bitcast", "copy"}
