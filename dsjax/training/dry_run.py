"""A run built as it would be and not begun: what is wrong with it, and what it will need."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config import TrainConfig
from dsjax.data.loader import make_eval_batches, make_loader
from dsjax.data.prepare import is_prepared
from dsjax.model import abstract_model
from dsjax.processes import HostShard
from dsjax.training.schedule import Schedule
from dsjax.training.start import (
    check_start,
    check_stored,
    check_vocabulary,
    lay_out,
)
from dsjax.training.step import abstract_batch, abstract_train_state, jitted_train_step
from dsjax.weights.run_steps import chosen_step, steps_of


def dry_run(
    config: TrainConfig, devices: Sequence[jax.Device] | None = None, step: int | None = None
) -> dict[str, Any]:
    """Builds a run on the devices that are here, reads a batch, and compiles its steps.

    Nothing is trained, no weight is made and nothing is written. Data that the run would make
    itself (`data.prepare`) and that are not there are said and left out.

    Args:
        config: the run.
        devices: as `fit` takes them.
        step: the checkpoint that the run would go on from; None takes the newest.

    Returns:
        Sizes, ready for JSON; bytes are of one device but for `checkpoint_bytes`. `peak_bytes` is
        the compiler's figure of the largest step, `capacity_bytes` what the device has, or None
        where it does not say.

    Raises:
        ValueError: a field does not fit the devices, the data or the checkpoint, or the step does
            not fit a device.
    """
    run = Path(config.directory).absolute()
    config, stored, mesh, rules, kernels = lay_out(config, devices)
    device = mesh.devices.flat[0]
    graphdef, params = abstract_model(config.model, config.runtime, rules, kernels)
    state = abstract_train_state(config.optimizer, params, rules, device)
    resumes_at = 0
    if step is not None:
        resumes_at = int(chosen_step(run, step).name)
    elif steps := steps_of(run):
        resumes_at = int(steps[0].name)
    if stored is not None and resumes_at:
        check_stored(stored, config, run)
    elif config.init_from:
        check_start(config)
    data = _read_data(config, HostShard(rules))

    schedule = Schedule(config)
    slice_rows = config.batch.size // config.batch.accumulate
    train_step = jitted_train_step(device.platform)
    rate = jax.ShapeDtypeStruct((), jnp.float32, sharding=rules.sharding())
    began, peak = time.perf_counter(), 0
    for size in schedule.batch_sizes:
        batch = abstract_batch(rules, (size // slice_rows, slice_rows, config.data.length))
        lowered = train_step.lower(
            graphdef, config.optimizer, config.loss, config.guard, state, batch, rate
        )
        try:
            memory = lowered.compile().memory_analysis()
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            raise ValueError(
                f"batch.size={size}: the step does not fit a device: {str(error).splitlines()[0]}"
            ) from None
        peak = max(peak, memory.peak_memory_in_bytes)
    capacity = (device.memory_stats() or {}).get("bytes_limit")
    stored_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))
    return {
        "directory": str(run),
        "resumes_at": resumes_at,
        "steps": config.num_steps,
        "tokens": schedule.total_tokens,
        "batch_sizes": list(schedule.batch_sizes),
        "data": data,
        "processes": jax.process_count(),
        "devices": mesh.size,
        "device": device.device_kind,
        "mesh": dict(mesh.shape),
        "parameters": sum(leaf.size for leaf in jax.tree.leaves(params)),
        "parameter_bytes": _device_bytes(state.params),
        "optimizer_bytes": _device_bytes(state.moments),
        "peak_bytes": peak,
        "capacity_bytes": capacity,
        "checkpoint_bytes": stored_bytes,
        "compile_seconds": round(time.perf_counter() - began, 3),
    }


def _read_data(config: TrainConfig, shard: HostShard) -> str:
    """Opens the data and reads a batch; returns what was found."""
    data = config.data
    if data.prepare is not None and not is_prepared(data):
        return f"not there yet; the run will make them in {data.prepare.folder} and beside it"
    check_vocabulary(config)
    rows = max(1, Schedule(config).batch_size(0) // shard.count)
    loader = make_loader(data, process_index=shard.index, process_count=shard.count)
    with contextlib.closing(loader):
        loader.next_batch(rows)
    if data.eval_sources:
        make_eval_batches(data, 1, process_index=shard.index, process_count=shard.count)
    return f"{len(data.sources)} sources, {len(data.eval_sources)} held out; a batch was read"


def _device_bytes(tree: Any) -> int:
    return sum(
        math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        for leaf in jax.tree.leaves(tree)
    )
