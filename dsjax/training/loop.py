"""The training loop: from a config to a trained model, through stops and restarts."""

from __future__ import annotations

import dataclasses
import logging
import math
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax.sharding import SingleDeviceSharding

from dsjax.checkpoint import RunCheckpoints, write_run_file
from dsjax.config import TrainConfig, to_json
from dsjax.data.loader import Loader, make_eval_batches, make_loader
from dsjax.data.tokenizer import load_tokenizer
from dsjax.kernels import choose_kernels
from dsjax.losses import Batch
from dsjax.metrics import MetricsWriter
from dsjax.model import DeepSeekV2, abstract_model, create_model
from dsjax.sharding import ShardingRules, make_mesh, train_rules
from dsjax.training.preemption import Preemption
from dsjax.training.report import Display, Throughput, step_figures
from dsjax.training.schedule import Schedule
from dsjax.training.step import (
    SKIP_REASONS,
    Guard,
    StepReport,
    TrainState,
    eval_step,
    init_train_state,
    state_shardings,
    train_step,
)
from dsjax.weights import load_weights, save_assets

_LOG = logging.getLogger(__name__)


class TrainingStopped(RuntimeError):
    """Training gave up: too many bad steps in a row."""


@dataclass(frozen=True)
class FitResult:
    """What a run came to.

    Attributes:
        model: the model as it is now.
        step: steps taken.
        finished: False where a signal stopped the run; running it again goes on.
        bits_per_byte: the last held-out evaluation, or None without held-out data.
    """

    model: DeepSeekV2
    step: int
    finished: bool
    bits_per_byte: float | None


def fit(config: TrainConfig) -> FitResult:
    """Trains a model, going on from the run's last complete checkpoint if there is one.

    Args:
        config: the run.

    Raises:
        ValueError: a field of the config does not fit the devices, the data or the checkpoint.
        TrainingStopped: `guard.max_skipped` bad steps in a row.
        RuntimeError: a checkpoint could not be saved.
    """
    run = Path(config.directory)
    run.mkdir(parents=True, exist_ok=True)
    mesh = make_mesh(config.mesh)
    rules = train_rules(mesh if mesh.size > 1 else None)
    kernels = choose_kernels(mesh.devices.flat[0], config.model)
    _check(config, rules)
    schedule = Schedule(config)
    shard = _HostShard(rules, config.batch.size // config.batch.accumulate)
    loader = make_loader(config.data, process_index=shard.index, process_count=shard.count)
    graphdef, params = abstract_model(config.model, rules, kernels)
    with RunCheckpoints(run, config.checkpoint) as checkpoints:
        if checkpoints.latest is None:
            state = _fresh_state(config, rules, kernels)
        else:
            state = _restored_state(config, rules, params, checkpoints, loader, shard)
        if jax.process_index() == 0:
            write_run_file(run, config)
            save_assets(config.data.tokenizer, config.init_from, run)
        loop = _Loop(config, graphdef, schedule, shard, loader, checkpoints)
        try:
            with MetricsWriter(_metrics_folder(run), config.log, to_json(config)) as metrics:
                return loop.run(state, metrics)
        finally:
            loader.close()


def _check(config: TrainConfig, rules: ShardingRules) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: must be at least the "
            f"{tokenizer.vocab_size} of data.tokenizer={config.data.tokenizer!r}"
        )
    slice_size = config.batch.size // config.batch.accumulate
    if slice_size % rules.num_batch_shards():
        raise ValueError(
            f"batch.size={config.batch.size}: its slices of {slice_size} sequences must be "
            f"divisible by the {rules.num_batch_shards()} batch shards of the mesh"
        )


def _metrics_folder(run: Path) -> Path:
    """Every process keeps its own metrics; the first one's are the run's."""
    if jax.process_index() == 0:
        return run
    folder = run / f"process_{jax.process_index()}"
    folder.mkdir(exist_ok=True)
    return folder


class _HostShard:
    """Which rows of every batch this process feeds."""

    def __init__(self, rules: ShardingRules, slice_size: int):
        self.sharding = rules.sharding(None, "batch", "length")
        self.rows_sharding = rules.sharding(None, "batch")
        self.index, self.count = 0, 1
        if self.sharding is not None:
            # Devices along an axis that does not divide the batch hold the same rows, so this
            # may be fewer shards than there are processes.
            indices = self.rows_sharding.addressable_devices_indices_map((1, slice_size))
            starts = {rows.start or 0 for _, rows in indices.values()}
            local = len(starts) * slice_size // rules.num_batch_shards()
            self.count = slice_size // local
            self.index = min(starts) // local

    def place(self, batch: dict[str, np.ndarray], num_slices: int) -> Batch:
        """Makes this host's rows a part of the global batch [slices, sequences, ...]."""

        def put(rows: np.ndarray) -> jax.Array:
            sliced = rows.reshape(num_slices, -1, *rows.shape[1:])
            sharding = self.sharding if rows.ndim > 1 else self.rows_sharding
            if sharding is None:
                return jnp.asarray(sliced)
            return jax.make_array_from_process_local_data(sharding, sliced)

        return {name: put(rows) for name, rows in batch.items()}


def _fresh_state(config: TrainConfig, rules: ShardingRules, kernels: Any) -> TrainState:
    if config.init_from:
        model = load_weights(
            config.init_from, dtype=config.model.param_dtype, rules=rules, kernels=kernels
        )
        expected = dataclasses.replace(
            model.config,
            dtype=config.model.dtype,
            param_dtype=config.model.param_dtype,
            remat=config.model.remat,
        )
        if expected != config.model:
            raise ValueError(f"init_from={config.init_from!r}: is of another model config")
    else:
        model = create_model(config.model, config.seed, rules, kernels)
    params = nnx.state(model)
    init = jax.jit(lambda params: init_train_state(config, params), donate_argnums=0)
    if rules.mesh is None:
        return init(params)
    abstract = jax.eval_shape(lambda params: init_train_state(config, params), params)
    shardings = state_shardings(abstract, config, rules)
    return jax.jit(
        lambda params: init_train_state(config, params),
        donate_argnums=0,
        out_shardings=shardings,
    )(params)


def _restored_state(
    config: TrainConfig,
    rules: ShardingRules,
    params: nnx.State,
    checkpoints: RunCheckpoints,
    loader: Loader,
    shard: _HostShard,
) -> TrainState:
    abstract = jax.eval_shape(lambda params: init_train_state(config, params), params)
    if rules.mesh is None:
        device = SingleDeviceSharding(jax.devices()[0])
        shardings = jax.tree.map(lambda _: device, abstract)
    else:
        shardings = state_shardings(abstract, config, rules)
    abstract = jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        abstract,
        shardings,
    )
    step = checkpoints.latest
    assert step is not None
    restored, optimizer, data_states = checkpoints.restore(
        step, abstract.params, _optimizer_dict(abstract)
    )
    loader.set_state(data_states[shard.index if len(data_states) > 1 else 0])
    return _from_optimizer_dict(optimizer, restored, abstract)


def _optimizer_dict(state: TrainState) -> dict[str, Any]:
    """Lays everything but the parameters out with string keys, as checkpoints want it."""
    adam = {name: optax.tree_utils.tree_get(state.moments, name) for name in ("count", "mu", "nu")}
    return {
        "step": state.step,
        "guard": dict(vars(state.guard)),
        "count": adam["count"],
        "mu": nnx.to_pure_dict(adam["mu"]),
        "nu": nnx.to_pure_dict(adam["nu"]),
    }


def _from_optimizer_dict(
    optimizer: dict[str, Any], params: nnx.State, abstract: TrainState
) -> TrainState:
    """Undoes `_optimizer_dict`; the abstract state gives the structure."""
    moments = {"count": optimizer["count"]}
    for name in ("mu", "nu"):
        moments[name] = jax.tree.map(lambda leaf: leaf, params)
        nnx.replace_by_pure_dict(moments[name], optimizer[name])
    return TrainState(
        step=optimizer["step"],
        params=params,
        moments=optax.tree_utils.tree_set(abstract.moments, **moments),
        guard=Guard(**optimizer["guard"]),
    )


class _Loop:
    """One run's way from a state to the last step."""

    def __init__(
        self,
        config: TrainConfig,
        graphdef: nnx.GraphDef[DeepSeekV2],
        schedule: Schedule,
        shard: _HostShard,
        loader: Loader,
        checkpoints: RunCheckpoints,
    ):
        self.config = config
        self.graphdef = graphdef
        self.schedule = schedule
        self.shard = shard
        self.loader = loader
        self.checkpoints = checkpoints
        self.throughput = Throughput(config, schedule)
        self.eval_batches: Iterable[dict[str, np.ndarray]] = ()
        if config.data.eval_sources:
            rows = config.batch.size // config.batch.accumulate // shard.count
            self.eval_batches = make_eval_batches(
                config.data,
                rows,
                process_index=shard.index,
                process_count=shard.count,
                max_rows=config.log.eval_rows,
            )

    def run(self, state: TrainState, metrics: MetricsWriter) -> FitResult:
        """Trains to the end, or to a signal; saves at the end either way."""
        config = self.config
        start = step = int(state.step)
        bits_per_byte: float | None = None
        evaluated_at = -1
        with Preemption() as preemption, Display(config.num_steps, start) as display:
            if start:
                display.say(f"resumed at step {start} of {config.num_steps}")
            waiting: tuple[int, StepReport] | None = None
            while step < config.num_steps and not preemption.should_stop(step):
                state, report = self._step(state, step)
                step += 1
                # The report of the step before is read while this one runs.
                self._read(waiting, metrics, display)
                waiting = (step, report)
                if step == start + 1:
                    jax.block_until_ready(report)
                    self.throughput.restart(step)  # compilation is not a step's time
                if config.log.eval_every and step % config.log.eval_every == 0:
                    bits_per_byte = self._evaluate(state, step, metrics, display)
                    evaluated_at = step
                    self.throughput.restart(step)
                if step % config.checkpoint.every == 0:
                    self._save(state, step)
            self._read(waiting, metrics, display)
            self._save(state, step)
            finished = step >= config.num_steps
            if finished and evaluated_at != step:
                bits_per_byte = self._evaluate(state, step, metrics, display)
            self.checkpoints.wait()
            if not finished:
                display.say(f"stopped by a signal at step {step}; saved; run again to go on")
        return FitResult(nnx.merge(self.graphdef, state.params), step, finished, bits_per_byte)

    def _step(self, state: TrainState, step: int) -> tuple[TrainState, StepReport]:
        batch_config, size = self.config.batch, self.schedule.batch_size(step)
        num_slices = size // (batch_config.size // batch_config.accumulate)
        rows = self.loader.next_batch(size // self.shard.count)
        rows.pop("num_bytes")
        batch = self.shard.place(rows, num_slices)
        rate = jnp.float32(self.schedule.learning_rate(step))
        return train_step(self.graphdef, self.config, state, batch, rate)

    def _read(
        self,
        waiting: tuple[int, StepReport] | None,
        metrics: MetricsWriter,
        display: Display,
    ) -> None:
        if waiting is None:
            return
        step, report = waiting
        skipped = int(report.skip_reason)
        figures = None
        if step % self.config.log.every == 0 or step == self.config.num_steps or skipped:
            figures = step_figures(report) | self.throughput.figures(step)
            figures["learning_rate"] = self.schedule.learning_rate(step - 1)
            figures["batch_size"] = self.schedule.batch_size(step - 1)
            figures["tokens"] = self.schedule.tokens_before(step)
            metrics.write(step, figures)
        display.step(step, figures)
        if skipped:
            display.say(f"step {step} skipped: {SKIP_REASONS[skipped]}")
        if int(report.skipped_in_a_row) >= self.config.guard.max_skipped:
            raise TrainingStopped(
                f"{self.config.guard.max_skipped} steps in a row were skipped up to step {step}: "
                f"{SKIP_REASONS[skipped]}; the last checkpoint is of step {self.checkpoints.latest}"
            )

    def _save(self, state: TrainState, step: int) -> None:
        self.checkpoints.save(step, state.params, _optimizer_dict(state), self.loader.get_state())

    def _evaluate(
        self, state: TrainState, step: int, metrics: MetricsWriter, display: Display
    ) -> float | None:
        """Evaluates on the held-out rows; returns bits per byte of their documents."""
        sums = np.zeros(3)
        for rows in self.eval_batches:
            batch = jax.tree.map(lambda x: x[0], self.shard.place(rows, 1))
            sums += np.asarray(
                eval_step(self.graphdef, self.config.loss.chunk, state.params, batch), np.float64
            )
        nats, tokens, num_bytes = sums
        if num_bytes == 0:
            return None
        bits_per_byte = nats / math.log(2) / num_bytes
        metrics.write(
            step, {"eval_cross_entropy": nats / tokens, "eval_bits_per_byte": bits_per_byte}
        )
        display.say(f"step {step}: held-out {bits_per_byte:.4f} bits per byte")
        return bits_per_byte


def initialize_processes() -> None:
    """Joins the other processes of a pod or cluster, where the environment describes one."""
    described = ("JAX_COORDINATOR_ADDRESS", "SLURM_JOB_ID", "MEGASCALE_COORDINATOR_ADDRESS")
    hosts = os.environ.get("TPU_WORKER_HOSTNAMES", "")
    if "," in hosts or any(name in os.environ for name in described):
        jax.distributed.initialize()
