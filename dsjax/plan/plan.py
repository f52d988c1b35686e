"""The plan of a run's training step on a pod that is not here."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from dsjax.config import TrainConfig
from dsjax.mesh import make_mesh
from dsjax.plan.expected import Expected
from dsjax.plan.figures import Target, compile_or_say_why, program_figures
from dsjax.plan.lower import lower_run
from dsjax.plan.pods import Pod
from dsjax.plan.state import state_kinds, step_figures
from dsjax.plan.topology import tpu_devices


def plan_training(run: TrainConfig, topology: str, num_slices: int = 1) -> dict[str, Any]:
    """Compiles a run's step for a pod and returns what it needs of a chip, ready for JSON.

    Args:
        run: the run; its data is not looked at.
        topology: libtpu's name of one slice, like "v5p:4x4x4".
        num_slices: slices that DCN joins.

    Returns:
        Bytes, FLOPs and seconds of one device and step. `modelled_seconds` has what the compiled
        schedule runs at a time, `modelled_seconds_serial` nothing hidden. An exchange's first pass
        is counted alone: none further is expected. Where the mesh divides rows, `latent_row_bytes`
        are sent for attention, and `per_head_row_bytes` would be with each head's keys and values.

    Raises:
        ValueError: an unknown topology or chip, a mesh or batch that does not divide, or a step
            that does not fit; names the largest arrays.
    """
    pod = Pod.of(tpu_devices(topology, num_slices))
    mesh = make_mesh(run.mesh, list(pod.devices))
    pod = dataclasses.replace(pod, devices=tuple(mesh.devices.flat))
    target = Target(topology, num_slices, pod, dict(mesh.shape))
    began = time.perf_counter()
    lowered = lower_run(run, pod.devices)
    kinds = state_kinds(run, mesh)
    compiled = compile_or_say_why(lowered.compile, target, kinds)
    seconds = time.perf_counter() - began
    figures = program_figures(target, compiled, Expected(run.runtime.kernels.exchange_room))
    figures |= step_figures(run, mesh, kinds, figures["peak_bytes"])
    taken = figures["modelled_seconds"]
    tokens = run.batch.size * run.data.length / len(pod.devices)
    return {
        **figures,
        "modelled_mfu": figures["model_flops"] / pod.flops_per_second / taken,
        "tokens_per_second_per_chip": tokens / taken,
        "compile_seconds": seconds,
        "assumptions": pod.assumptions(),
    }
