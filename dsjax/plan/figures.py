"""What a compiled program needs of a chip, as figures for a table or for JSON."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax

from dsjax.plan.collectives import count_collectives
from dsjax.plan.expected import Expected, without_further_passes
from dsjax.plan.pods import Pod
from dsjax.plan.program import Program
from dsjax.plan.timing import collective_seconds, measure
from dsjax.weights.host_experts import stored_bytes


@dataclass(frozen=True)
class Target:
    """What a program is compiled for.

    Attributes:
        topology: libtpu's name of one slice.
        num_slices: slices that DCN joins.
        pod: the chips, in the mesh's order.
        axes: sizes of the mesh's axes.
    """

    topology: str
    num_slices: int
    pod: Pod
    axes: dict[str, int]


def compile_or_say_why(
    compile_program: Callable[[], Any], target: Target, kinds: Mapping[str, Any]
) -> Any:
    """Returns a compiled program.

    Args:
        compile_program: compiles it.
        target: for what.
        kinds: trees of the arrays that it holds, by what they are.

    Raises:
        ValueError: it does not fit; names the largest arrays.
    """
    try:
        return compile_program()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(_no_room(target.topology, str(error), kinds)) from None


def program_figures(target: Target, compiled: Any, expected: Expected) -> dict[str, Any]:
    """Returns the figures of a compiled program that say nothing of what it is for.

    Args:
        target: what it is compiled for.
        compiled: the program.
        expected: what it will meet when it runs.
    """
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    program, pod, axes = without_further_passes(Program.of(text)), target.pod, target.axes
    work = measure(program, pod, axes, expected)
    uses = count_collectives(program, axes, expected.exchange_room)
    taken = collective_seconds(program, pod, axes, expected)
    return {
        "topology": target.topology,
        "slices": target.num_slices,
        "chips": len(pod.devices),
        "mesh": axes,
        "peak_bytes": memory.peak_memory_in_bytes,
        "capacity_bytes": pod.rates.capacity_bytes,
        "flops": work.flops,
        "recomputed_flops": work.recomputed,
        "hbm_bytes": work.hbm_bytes,
        "collective_bytes": sum(use.expected_bytes for use in uses.values()),
        "collectives": {
            name: dataclasses.asdict(use) | {"seconds": taken[name]} for name, use in uses.items()
        },
        "compute_seconds": work.compute_seconds,
        "copy_seconds": work.copy_seconds,
        "collective_seconds": work.collective_seconds,
        "modelled_seconds_serial": work.serial_seconds,
        "modelled_seconds": work.scheduled_seconds,
    }


def device_bytes(tree: Any) -> int:
    """Returns what the arrays of a tree take of one device; they may be shapes with shardings."""
    return sum(size for size, _ in _sizes(tree))


def _sizes(tree: Any) -> list[tuple[int, str]]:
    """Bytes on one device and the name of each array, the largest first."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        size = stored_bytes(leaf.sharding.shard_shape(leaf.shape), leaf.dtype)
        name = ".".join(re.findall(r"\w+", jax.tree_util.keystr(path)))
        found.append((size, name))
    return sorted(found, reverse=True)


def _no_room(topology: str, message: str, kinds: Mapping[str, Any]) -> str:
    needs = re.search(r"\(([\d.]+[KMG])\) exceeds available HBM \(([\d.]+[KMG])\)", message)
    much = f"needs {needs[1]} of {needs[2]} HBM" if needs is not None else "has too little HBM"
    return does_not_fit(f"a chip of {topology}", much, kinds)


def does_not_fit(where: str, much: str, kinds: Mapping[str, Any]) -> str:
    """Says that a step does not fit, how much it needs, and which arrays of one device are largest.

    Args:
        where: "a chip of v5p:4x4x4", say.
        much: "needs 9 GiB of 8", say.
        kinds: trees of the arrays that it holds, by what they are.
    """
    largest = largest_arrays(kinds)
    return f"the step does not fit {where}: it {much}; the largest of its state: {largest}"


def largest_arrays(kinds: Mapping[str, Any]) -> str:
    """Names the three largest arrays of one device among trees of them, by what they are."""
    largest = sorted(
        ((s, f"{k} {n}") for k, t in kinds.items() for s, n in _sizes(t)), reverse=True
    )
    return ", ".join(f"{name} {size / 2**30:.2f} GiB" for size, name in largest[:3])
