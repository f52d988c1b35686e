"""A compiled program as text, read once: its computations, and how often each runs."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass


@dataclass(frozen=True)
class Instruction:
    """One line of a program.

    Attributes:
        name: its own, without "%".
        type: its result's, with layouts; a tuple's in parentheses.
        op: such as "fusion" or "all-gather-start".
        operands: names of what it reads.
        attributes: what follows the operands, as written.
        is_root: whether it is its computation's result.
    """

    name: str
    type: str
    op: str
    operands: tuple[str, ...]
    attributes: str
    is_root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of the result, those of nested tuples one after another."""
        return arrays_of(self.type)

    @property
    def emitter(self) -> str:
        """The name of what libtpu made of it, "" where it says nothing."""
        found = _EMITTER.search(self.attributes)
        return "" if found is None else found[1]

    @property
    def scope(self) -> str:
        """Where in the model it comes from, as JAX named it; "" where that is lost."""
        found = _SCOPE.search(self.attributes)
        return "" if found is None else found[1]

    @functools.cached_property
    def called(self) -> tuple[str, ...]:
        """The computations that it runs; not the condition of a loop."""
        names = _CALLED.findall(self.attributes)
        for branches in _BRANCHES.findall(self.attributes):
            names += [branch.strip().lstrip("%") for branch in branches.split(",")]
        return tuple(names)


@dataclass(frozen=True)
class Array:
    """An array in a program: its type's name, its sizes, and whether it lies in HBM."""

    dtype: str
    shape: tuple[int, ...]
    in_hbm: bool = True

    @property
    def num_bytes(self) -> int:
        """Its size without padding."""
        return self.bytes_of(math.prod(self.shape))

    def bytes_of(self, count: int) -> int:
        """The size of so many of its numbers."""
        bits = 8 if self.dtype == "pred" else int(_BITS.findall(self.dtype)[0])
        return count * bits // 8


@dataclass(frozen=True)
class Program:
    """What one chip runs.

    Attributes:
        bodies: instructions of each computation, by its name, in the order in which they run; the
            entry's name is "".
    """

    bodies: dict[str, tuple[Instruction, ...]]

    @classmethod
    def of(cls, hlo: str) -> Program:
        """Reads the text that `Compiled.as_text()` gives."""
        bodies: dict[str, list[Instruction]] = {}
        current: list[Instruction] = []
        for line in hlo.splitlines():
            header = _HEADER.match(line)
            if header is not None:
                current = bodies.setdefault("" if header["entry"] else header["name"], [])
                continue
            found = _INSTRUCTION.match(line)
            if found is None:
                continue
            operands, attributes = _split_operands(line[found.end() :])
            if found["op"] in ("constant", "parameter"):
                operands, attributes = "", operands  # a value is no operand
            current.append(
                Instruction(
                    found["name"],
                    found["type"],
                    found["op"],
                    tuple(_OPERAND.findall(operands)),
                    attributes,
                    bool(found["root"]),
                )
            )
        return cls({name: tuple(body) for name, body in bodies.items()})

    def executions(self) -> Iterator[tuple[str, int]]:
        """Yields every computation that the entry reaches, with the times it runs, per caller."""
        waiting = [("", 1)]
        while waiting:
            name, times = waiting.pop()
            yield name, times
            for instruction in self.bodies[name]:
                waiting += [(other, times * trips) for other, trips in self.calls(instruction)]

    def calls(self, instruction: Instruction) -> Iterator[tuple[str, int]]:
        """Yields the computations that an instruction runs, with the times one execution does."""
        if instruction.op.endswith(("-done", "-update")):
            return  # an asynchronous call is counted where it starts
        trips = self.trips(instruction) if instruction.op == "while" else 1
        for name in instruction.called:
            if name in self.bodies:
                yield name, trips

    def trips(self, loop: Instruction) -> int:
        """The trip count of a loop: XLA's note of it, or the constant its counter is held against.

        One where how often it runs depends on data.
        """
        known = _TRIPS.search(loop.attributes)
        if known is not None:
            return int(known[1])
        condition = _CONDITION.search(loop.attributes)
        body = self.bodies.get(condition[1], ()) if condition is not None else ()
        constants = {
            each.name: int(each.attributes)
            for each in body
            if each.op == "constant" and each.attributes.isdigit()
        }
        for each in body:
            if "direction=LT" in each.attributes:
                for operand in each.operands:
                    if operand in constants:
                        return constants[operand]
        return 1


_HEADER = re.compile(r"(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\{$")
_INSTRUCTION = re.compile(
    r"\s+(?P<root>ROOT )?%?(?P<name>[\w.\-]+) = (?P<type>.*?) (?P<op>[a-z][a-z0-9\-]*)\("
)
_OPERAND = re.compile(r"%([\w.\-]+)")
_CALLED = re.compile(r"(?:body|calls|to_apply|async_execution_thread_calls)=%?([\w.\-]+)")
_CONDITION = re.compile(r"condition=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_TRIPS = re.compile(r'known_trip_count":\{"n":"(\d+)"')
_ARRAY = re.compile(r"\b([a-z]+\d+[a-z0-9]*|pred)\[([\d,]*)\](?:\{([^}]*)\})?")
_EMITTER = re.compile(r'"emitter":"(\w+)"')
_SCOPE = re.compile(r'op_name="([^"]*)"')
_SPACE = re.compile(r"S\((\d+)\)")
_BITS = re.compile(r"\d+")


def arrays_of(type_text: str) -> tuple[Array, ...]:
    """Returns the arrays of a type as a program writes it."""
    found = []
    for dtype, sizes, layout in _ARRAY.findall(type_text):
        space = _SPACE.search(layout)
        shape = tuple(int(size) for size in sizes.split(",") if size)
        # Space 0, which is not written, is HBM; 1 is VMEM, and so on.
        found.append(Array(dtype, shape, space is None or space[1] == "0"))
    return tuple(found)


def _split_operands(rest: str) -> tuple[str, str]:
    """Splits what follows an opening parenthesis into what it encloses and what comes after."""
    depth = 1
    for place, letter in enumerate(rest):
        depth += (letter == "(") - (letter == ")")
        if depth == 0:
            return rest[:place], rest[place + 1 :]
    return rest, ""
