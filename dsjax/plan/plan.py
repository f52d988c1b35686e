"""The plan of a run's training step on a pod that is not here."""

from __future__ import annotations

import dataclasses
import math
import re
import time
from typing import Any

import jax

from dsjax.config import TrainConfig
from dsjax.counts import train_flops_per_token
from dsjax.kernels import choose_kernels
from dsjax.mesh import make_mesh, train_rules
from dsjax.model import abstract_model
from dsjax.plan.collectives import count_collectives
from dsjax.plan.expected import without_further_passes
from dsjax.plan.lower import lower_run
from dsjax.plan.pods import Pod
from dsjax.plan.program import Program
from dsjax.plan.timing import collective_seconds, measure
from dsjax.plan.topology import tpu_devices
from dsjax.training.step import abstract_train_state


def plan_training(run: TrainConfig, topology: str, num_slices: int = 1) -> dict[str, Any]:
    """Compiles a run's step for a pod and returns what it needs of a chip, ready for JSON.

    Args:
        run: the run; its data is not looked at.
        topology: libtpu's name of one slice, like "v5p:4x4x4".
        num_slices: slices that DCN joins.

    Returns:
        Bytes, FLOPs and seconds of one device and step. `modelled_seconds` has what the compiled
        schedule runs at a time, `modelled_seconds_serial` nothing hidden. An exchange's first pass
        is counted alone: none further is expected.

    Raises:
        ValueError: an unknown topology or chip, a mesh or batch that does not divide, or a step
            that does not fit; names the largest arrays.
    """
    pod = Pod.of(tpu_devices(topology, num_slices))
    mesh = make_mesh(run.mesh, list(pod.devices))
    pod = dataclasses.replace(pod, devices=tuple(mesh.devices.flat))
    began = time.perf_counter()
    lowered = lower_run(run, pod.devices)
    rules = train_rules(mesh)
    _, params = abstract_model(
        run.model, run.runtime, rules, choose_kernels(pod.devices[0], run.model, run.runtime, rules)
    )
    state = abstract_train_state(run.optimizer, params, rules, pod.devices[0])
    kinds = {"parameters": state.params, "optimizer": state.moments}
    sizes = {kind: _device_bytes(tree) for kind, tree in kinds.items()}
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        raise ValueError(_no_room(topology, str(error), kinds)) from None
    seconds = time.perf_counter() - began
    memory, text = compiled.memory_analysis(), compiled.as_text()
    assert memory is not None
    assert text is not None
    return {
        "topology": topology,
        "slices": num_slices,
        **_figures(run, pod, dict(mesh.shape), text, memory.peak_memory_in_bytes, sizes),
        "compile_seconds": seconds,
        "assumptions": pod.assumptions(),
    }


def _figures(
    run: TrainConfig, pod: Pod, axes: dict[str, int], text: str, peak: int, sizes: dict[str, int]
) -> dict[str, Any]:
    """What a compiled step needs of a chip: its program's text, peak and state by kind."""
    program, room = without_further_passes(Program.of(text)), run.runtime.kernels.exchange_room
    work = measure(program, pod, axes, room)
    uses = count_collectives(program, axes, room)
    taken = collective_seconds(program, pod, axes, room)
    tokens = run.batch.size * run.data.length / len(pod.devices)
    model_flops = train_flops_per_token(run.model, run.data.length) * tokens
    return {
        "chips": len(pod.devices),
        "mesh": axes,
        "peak_bytes": peak,
        "capacity_bytes": pod.rates.capacity_bytes,
        "parameter_bytes": sizes["parameters"],
        "optimizer_bytes": sizes["optimizer"],
        "activation_bytes": peak - sum(sizes.values()),
        "flops": work.flops,
        "recomputed_flops": work.recomputed,
        "model_flops": model_flops,
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
        "modelled_mfu": model_flops / pod.flops_per_second / work.scheduled_seconds,
        "tokens_per_second_per_chip": tokens / work.scheduled_seconds,
    }


def _sizes(tree: Any) -> list[tuple[int, str]]:
    """Bytes on one device and the name of each array, the largest first."""
    found = []
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        size = math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        name = ".".join(re.findall(r"\w+", jax.tree_util.keystr(path)))
        found.append((size, name))
    return sorted(found, reverse=True)


def _device_bytes(tree: Any) -> int:
    return sum(size for size, _ in _sizes(tree))


def _no_room(topology: str, message: str, kinds: dict[str, Any]) -> str:
    needs = re.search(r"\(([\d.]+[KMG])\) exceeds available HBM \(([\d.]+[KMG])\)", message)
    much = f"needs {needs[1]} of {needs[2]} HBM" if needs is not None else "has too little HBM"
    largest = sorted(
        ((s, f"{k} {n}") for k, t in kinds.items() for s, n in _sizes(t)), reverse=True
    )
    named = ", ".join(f"{name} {size / 2**30:.2f} GiB" for size, name in largest[:3])
    return (
        f"the step does not fit a chip of {topology}: it {much}; the largest of its state: {named}"
    )
