"""What a run holds on each device from step to step, and the figures that follow from it alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jax.sharding import Mesh

from dsjax.config import TrainConfig
from dsjax.counts import train_flops_per_token
from dsjax.mesh import train_rules
from dsjax.model import abstract_model
from dsjax.plan.context import row_bytes
from dsjax.plan.figures import device_bytes
from dsjax.training.step import abstract_train_state


def state_kinds(run: TrainConfig, mesh: Mesh) -> dict[str, Any]:
    """Returns trees of the shapes of a run's parameters and of its optimizer's moments.

    Args:
        run: the run.
        mesh: of devices that need not exist.
    """
    rules = train_rules(mesh)
    _, params = abstract_model(run.model, run.runtime, rules)
    state = abstract_train_state(run.optimizer, params, rules, mesh.devices.flat[0])
    return {"parameters": state.params, "optimizer": state.moments}


def state_figures(kinds: Mapping[str, Any]) -> dict[str, int]:
    """Returns what `state_kinds` takes of one device."""
    return {
        "parameter_bytes": device_bytes(kinds["parameters"]),
        "optimizer_bytes": device_bytes(kinds["optimizer"]),
    }


def step_figures(
    run: TrainConfig, mesh: Mesh, kinds: Mapping[str, Any], peak_bytes: int
) -> dict[str, Any]:
    """Returns the figures of one device that a run's step has whatever it is compiled for.

    Args:
        run: the run.
        mesh: its devices.
        kinds: of `state_kinds`.
        peak_bytes: what the compiled step takes of a device.
    """
    held = state_figures(kinds)
    tokens = run.batch.size * run.data.length / mesh.size
    flops = train_flops_per_token(run.model, run.data.length, run.optimizer.frozen)
    return {
        **row_bytes(run, train_rules(mesh)),
        **held,
        "activation_bytes": peak_bytes - sum(held.values()),
        "model_flops": flops * tokens,
    }
