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
    TrainConfig,
)
from dsjax.kernels import choose_kernels
from dsjax.mesh import make_mesh, train_rules
from dsjax.model import abstract_model
from dsjax.training.start import check_batch
from dsjax.training.step import abstract_batch, abstract_train_state, jitted_train_step


def lower_train_step(
    model: ModelConfig,
    runtime: RuntimeConfig,
    mesh: MeshConfig,
    devices: Sequence[jax.Device],
    *,
    length: int,
    loss: LossConfig,
    rows_per_shard: int = 1,
    accumulate: int = 1,
    optimizer: OptimizerConfig | None = None,
) -> jax.stages.Lowered:
    """Lowers a whole optimiser step, with AdamW, for devices that need not exist.

    Args:
        model: the model.
        runtime: how it is run.
        mesh: how the devices are divided.
        devices: real, or those of `tpu_devices`.
        length: tokens in a row.
        loss: what is minimised.
        rows_per_shard: rows of a slice of the batch for each of its shards.
        accumulate: slices of a batch.
        optimizer: how gradients become updates; None for AdamW as it comes.

    Raises:
        ValueError: the mesh does not fit the devices, or does not divide the model.
    """
    rules = train_rules(make_mesh(mesh, list(devices)))
    optimizer = optimizer or OptimizerConfig()
    kernels = choose_kernels(devices[0], model, runtime, rules)
    graphdef, params = abstract_model(model, runtime, rules, kernels)
    state = abstract_train_state(optimizer, params, rules, devices[0])
    shape = (accumulate, rows_per_shard * rules.num_batch_shards(), length)
    batch = abstract_batch(rules, shape)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=rules.sharding())
    step = jitted_train_step(devices[0].platform)
    return step.lower(graphdef, optimizer, loss, GuardConfig(), state, batch, rate)


def lower_run(run: TrainConfig, devices: Sequence[jax.Device]) -> jax.stages.Lowered:
    """Lowers the step of a run; its data is not looked at.

    Args:
        run: the run.
        devices: real, or those of `tpu_devices`.

    Raises:
        ValueError: as `lower_train_step`, or the mesh does not divide a slice of the batch.
    """
    rules = train_rules(make_mesh(run.mesh, list(devices)))
    check_batch(run, rules)
    rows = run.batch.size // run.batch.accumulate
    return lower_train_step(
        run.model,
        run.runtime,
        run.mesh,
        devices,
        length=run.data.length,
        loss=run.loss,
        rows_per_shard=rows // rules.num_batch_shards(),
        accumulate=run.batch.accumulate,
        optimizer=run.optimizer,
    )
