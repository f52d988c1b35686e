"""Lowers a training step for a pod that is not here."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from dsjax.config import (
    GuardConfig,
    LossConfig,
    MeshConfig,
    ModelConfig,
    OptimizerConfig,
    RuntimeConfig,
)
from dsjax.kernels import choose_kernels
from dsjax.mesh import make_mesh, train_rules
from dsjax.model import abstract_model
from dsjax.training.step import abstract_train_state, jitted_train_step


def lower_train_step(
    model: ModelConfig,
    runtime: RuntimeConfig,
    mesh: MeshConfig,
    devices: Sequence[jax.Device],
    *,
    length: int,
    loss: LossConfig,
    rows_per_shard: int = 1,
) -> jax.stages.Lowered:
    """Lowers a whole optimiser step, with AdamW, for devices that need not exist.

    Args:
        model: the model.
        runtime: how it is run.
        mesh: how the devices are divided.
        devices: real, or those of `tpu_devices`.
        length: tokens in a row.
        loss: what is minimised.
        rows_per_shard: rows of the batch for each of its shards.

    Raises:
        ValueError: the mesh does not fit the devices, or does not divide the model.
    """
    rules = train_rules(make_mesh(mesh, list(devices)))
    optimizer = OptimizerConfig()
    kernels = choose_kernels(devices[0], model, runtime, rules)
    graphdef, params = abstract_model(model, runtime, rules, kernels)
    state = abstract_train_state(optimizer, params, rules, devices[0])
    shape = (1, rows_per_shard * rules.num_batch_shards(), length)
    rows = rules.sharding(None, "batch", "length")
    batch = {
        name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows)
        for name in ("tokens", "targets", "positions", "segment_ids")
    }
    batch["weights"] = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=rows)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=rules.sharding())
    step = jitted_train_step(devices[0].platform)
    return step.lower(graphdef, optimizer, loss, GuardConfig(), state, batch, rate)
