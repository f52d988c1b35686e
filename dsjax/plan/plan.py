"""The plan of a run's training step on a pod that is not here."""

from __future__ import annotations

import dataclasses
import time
from typing import Any

from dsjax.config import TrainConfig
from dsjax.counts import train_flops_per_token
from dsjax.kernels import choose_kernels
from dsjax.mesh import make_mesh, train_rules
from dsjax.model import abstract_model
from dsjax.plan.context import row_bytes
from dsjax.plan.expected import Expected
from dsjax.plan.figures import Target, compile_or_say_why, device_bytes, program_figures
from dsjax.plan.lower import lower_run
from dsjax.plan.pods import Pod
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
    rules = train_rules(mesh)
    _, params = abstract_model(
        run.model, run.runtime, rules, choose_kernels(pod.devices[0], run.model, run.runtime, rules)
    )
    state = abstract_train_state(run.optimizer, params, rules, pod.devices[0])
    kinds = {"parameters": state.params, "optimizer": state.moments}
    compiled = compile_or_say_why(lowered.compile, target, kinds)
    seconds = time.perf_counter() - began
    figures = program_figures(target, compiled, Expected(run.runtime.kernels.exchange_room))
    parameters, moments = (device_bytes(tree) for tree in kinds.values())
    tokens = run.batch.size * run.data.length / len(pod.devices)
    flops = train_flops_per_token(run.model, run.data.length, run.optimizer.frozen)
    model_flops = flops * tokens
    taken = figures["modelled_seconds"]
    return {
        **figures,
        **row_bytes(run, rules),
        "parameter_bytes": parameters,
        "optimizer_bytes": moments,
        "activation_bytes": figures["peak_bytes"] - parameters - moments,
        "model_flops": model_flops,
        "modelled_mfu": model_flops / pod.flops_per_second / taken,
        "tokens_per_second_per_chip": tokens / taken,
        "compile_seconds": seconds,
        "assumptions": pod.assumptions(),
    }
