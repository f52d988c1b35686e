"""The training loop: from a config to a trained model, through stops and restarts."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsjax.config import DataConfig, LogConfig, ModelConfig, TrainConfig, to_json
from dsjax.config.run_file import RUN_FILE, write_run_file
from dsjax.config.serialize import differing_fields
from dsjax.config.stored import run_from_json
from dsjax.data.loader import Loader, make_eval_batches, make_loader
from dsjax.data.prepare import prepare_data
from dsjax.data.tokenizer import load_tokenizer
from dsjax.files import read_json
from dsjax.kernels import Kernels, choose_kernels
from dsjax.mesh import ShardingRules, make_mesh, train_rules
from dsjax.model import DeepSeekV2, abstract_model, create_model
from dsjax.processes import HostShard
from dsjax.progress import JobProgress
from dsjax.training.checkpoints import RunCheckpoints, optimizer_to_dict, state_from_dict
from dsjax.training.data_place import check_data, keeps_place, restore_place
from dsjax.training.dropping import with_budget
from dsjax.training.folder import only_run_in
from dsjax.training.metrics import MetricsWriter
from dsjax.training.preemption import Preemption
from dsjax.training.report import Throughput, one_line, step_figures
from dsjax.training.schedule import Schedule
from dsjax.training.step import (
    SKIP_REASONS,
    StepReport,
    TrainState,
    abstract_train_state,
    eval_step,
    init_train_state,
    jitted_train_step,
)
from dsjax.weights import load_weights, locate, save_assets
from dsjax.weights.sources import steps_of

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


def fit(config: TrainConfig, devices: Sequence[jax.Device] | None = None) -> FitResult:
    """Trains a model, going on from the run's last complete checkpoint if there is one.

    Args:
        config: the run.
        devices: those to train on; None takes all of every process.

    Raises:
        ValueError: a field of the config does not fit the devices, the data or the checkpoint.
        TrainingStopped: `guard.max_skipped` bad steps in a row.
        RuntimeError: another run is going on in the folder, or a checkpoint could not be saved.
    """
    run = Path(config.directory).absolute()
    mesh = make_mesh(config.mesh, None if devices is None else list(devices))
    rules = train_rules(mesh if mesh.size > 1 else None)
    device = mesh.devices.flat[0]
    kernels = choose_kernels(device, config.model, config.runtime, rules)
    _check_batch(config, rules)
    stored = _stored_config(run)
    config = with_budget(config, rules, stored)
    with only_run_in(run):
        return _fit_alone(config, stored, mesh, rules, kernels)


def _fit_alone(
    config: TrainConfig,
    stored: TrainConfig | None,
    mesh: Mesh,
    rules: ShardingRules,
    kernels: Kernels,
) -> FitResult:
    run = Path(config.directory).absolute()
    device = mesh.devices.flat[0]
    _prepare_data(config.data)
    _check_vocabulary(config)
    shard = HostShard(rules)
    loader = make_loader(config.data, process_index=shard.index, process_count=shard.count)
    with contextlib.closing(loader):
        eval_batches = _eval_batches(config, shard)
        graphdef, params = abstract_model(config.model, config.runtime, rules, kernels)
        abstract = abstract_train_state(config.optimizer, params, rules, device)
        with RunCheckpoints(run, config.checkpoint) as checkpoints:
            if stored is not None and steps_of(run):
                _check_same(stored.model, config.model, f"directory={str(run)!r}")
                check_data(stored.data, config.data, str(run))
            keep_place = stored is None or keeps_place(stored.data, config.data)
            state = _restored_state(abstract, checkpoints, loader if keep_place else None, shard)
            if state is None:
                state = _fresh_state(config, abstract, rules, kernels)
            if jax.process_index() == 0:
                write_run_file(run, config)
                save_assets(config.data.tokenizer, config.init_from, run)
            with _open_metrics(config, run, int(state.step)) as metrics:
                loop = _Loop(
                    config, graphdef, shard, loader, eval_batches, checkpoints, metrics, mesh
                )
                return loop.run(state)


class _Loop:
    """One run's way from a state to the last step."""

    def __init__(
        self,
        config: TrainConfig,
        graphdef: nnx.GraphDef[DeepSeekV2],
        shard: HostShard,
        loader: Loader,
        eval_batches: Iterable[dict[str, np.ndarray]],
        checkpoints: RunCheckpoints,
        metrics: MetricsWriter,
        mesh: Mesh,
    ):
        self.config = config
        self.graphdef = graphdef
        self.shard = shard
        self.loader = loader
        self.eval_batches = eval_batches
        self.checkpoints = checkpoints
        self.metrics = metrics
        self.train_step = jitted_train_step(mesh.devices.flat[0].platform)
        self.schedule = Schedule(config)
        self.throughput = Throughput(config, self.schedule, mesh)
        self.progress = JobProgress(
            "training", config.num_steps, unit="steps", shown=jax.process_index() == 0
        )

    def run(self, state: TrainState) -> FitResult:
        """Trains to the end, or to a signal; saves at the end either way."""
        config, log = self.config, self.config.log
        step = int(state.step)
        bits_per_byte: float | None = None
        evaluated_at = -1
        unread: tuple[int, StepReport] | None = None
        compiled_size = 0
        with Preemption() as preemption, self.progress:
            self.progress.reach(step)
            if step:
                self.progress.say(f"resumed at step {step} of {config.num_steps}")
            while step < config.num_steps and not preemption.should_stop(step):
                state, report = self._step(state, step)
                step += 1
                # The report of the step before is read while this one runs.
                self._read(unread)
                unread = (step, report)
                if (size := self.schedule.batch_size(step - 1)) != compiled_size:
                    jax.block_until_ready(report)
                    self.throughput.restart(step)  # compilation is not a step's time
                    compiled_size = size
                if step % config.checkpoint.every == 0:
                    jax.block_until_ready(report)  # the step's own time is counted
                    with self.throughput.leaving_out():
                        self._save(state, step)
                if log.eval_every and step % log.eval_every == 0:
                    self._read(unread)
                    unread = None
                    bits_per_byte = self._evaluate(state, step)
                    evaluated_at = step
                    self.throughput.restart(step)
            self._read(unread)
            self._save(state, step)
            finished = step >= config.num_steps
            if finished and evaluated_at != step:
                bits_per_byte = self._evaluate(state, step)
            self.checkpoints.wait()
            if not finished:
                self.progress.say(f"stopped by a signal at step {step}; saved; run again to go on")
        return FitResult(nnx.merge(self.graphdef, state.params), step, finished, bits_per_byte)

    def _step(self, state: TrainState, step: int) -> tuple[TrainState, StepReport]:
        config, size = self.config, self.schedule.batch_size(step)
        num_slices = size // (config.batch.size // config.batch.accumulate)
        rows = self.loader.next_batch(size // self.shard.count)
        rows.pop("num_bytes")
        batch = self.shard.place(rows, num_slices)
        rate = jnp.float32(self.schedule.learning_rate(step))
        return self.train_step(
            self.graphdef, config.optimizer, config.loss, config.guard, state, batch, rate
        )

    def _read(self, unread: tuple[int, StepReport] | None) -> None:
        """Waits for a step's report, shows and writes its figures, and stops a run that is lost."""
        if unread is None:
            return
        step, report = unread
        config, skipped = self.config, int(report.skip_reason)
        self.progress.reach(step)
        if step % config.log.every == 0 or step == config.num_steps or skipped:
            figures = step_figures(report) | self.throughput.figures(step)
            figures["learning_rate"] = self.schedule.learning_rate(step - 1)
            figures["batch_size"] = self.schedule.batch_size(step - 1)
            figures["tokens"] = self.schedule.tokens_before(step)
            self.metrics.write(step, figures)
            self.progress.note(one_line(figures))
        if skipped:
            self.progress.say(f"step {step} skipped: {SKIP_REASONS[skipped]}")
        if int(report.skipped_in_a_row) >= config.guard.max_skipped:
            self.checkpoints.wait()
            raise TrainingStopped(
                f"{config.guard.max_skipped} steps in a row were skipped up to step {step}: "
                f"{SKIP_REASONS[skipped]}; the last checkpoint is of step {self.checkpoints.latest}"
            )

    def _save(self, state: TrainState, step: int) -> None:
        data_state = {"shard": self.shard.index, "state": self.loader.get_state()}
        self.checkpoints.save(step, state.params, optimizer_to_dict(state), data_state)

    def _evaluate(self, state: TrainState, step: int) -> float | None:
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
        self.metrics.write(
            step, {"eval_cross_entropy": nats / tokens, "eval_bits_per_byte": bits_per_byte}
        )
        self.progress.say(f"step {step}: held-out {bits_per_byte:.4f} bits per byte")
        return bits_per_byte


def _check_batch(config: TrainConfig, rules: ShardingRules) -> None:
    slice_size = config.batch.size // config.batch.accumulate
    if slice_size % rules.num_batch_shards():
        raise ValueError(
            f"batch.size={config.batch.size}: its slices of {slice_size} sequences must be "
            f"divisible by the {rules.num_batch_shards()} batch shards of the mesh"
        )


def _prepare_data(data: DataConfig) -> None:
    """Makes the run's data, where its config says how, by one process for all."""
    if data.prepare is None:
        return
    if jax.process_index() == 0:
        prepare_data(data)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("data prepared")


def _check_vocabulary(config: TrainConfig) -> None:
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.model.vocab_size:
        raise ValueError(
            f"model.vocab_size={config.model.vocab_size}: must be at least the "
            f"{tokenizer.vocab_size} of data.tokenizer={config.data.tokenizer!r}"
        )


def _stored_config(run: Path) -> TrainConfig | None:
    """Returns what the run's folder says that it is; None where it says nothing."""
    path = run / RUN_FILE
    if not path.exists():
        return None
    try:
        content = read_json(path)
    except ValueError as error:
        # The steps' own shapes are checked in any case, and the file is written anew.
        _LOG.warning("%s: damaged, so this run's config is not compared with it", error)
        return None
    return run_from_json(content, str(path))


def _check_start(config: TrainConfig) -> None:
    """Compares with the model to start from, before any weight is read.

    What fine-tuning changes is said and taken from the run; all else must be the same.
    """
    here, there = config.model, locate(config.init_from).config
    as_here = dataclasses.replace(
        there,
        **{name: getattr(here, name) for name in ("max_length", "norm_eps", "init_std")},
        attention=dataclasses.replace(
            there.attention, yarn=here.attention.yarn, rope_theta=here.attention.rope_theta
        ),
    )
    _check_same(as_here, here, f"init_from={config.init_from!r}")
    for field in differing_fields(there, here, "model."):
        _LOG.warning("init_from=%r: %s; going on with this run's", config.init_from, field)


def _check_same(there: ModelConfig, here: ModelConfig, where: str) -> None:
    # How long a context may be is a limit of use: it changes no parameter.
    there = dataclasses.replace(there, max_length=here.max_length)
    if there != here:
        fields = "; ".join(differing_fields(there, here, "model."))
        raise ValueError(f"{where}: holds a model of another config: {fields}")


def _open_metrics(config: TrainConfig, run: Path, start: int) -> MetricsWriter:
    """Every process keeps its own lines; the first one's are the run's, and it alone has sinks."""
    if jax.process_index() == 0:
        return MetricsWriter(run, config.log, to_json(config), start)
    folder = run / f"process_{jax.process_index()}"
    folder.mkdir(exist_ok=True)
    return MetricsWriter(folder, LogConfig(), {}, start)


def _eval_batches(config: TrainConfig, shard: HostShard) -> Iterable[dict[str, np.ndarray]]:
    if not config.data.eval_sources:
        return ()
    return make_eval_batches(
        config.data,
        config.batch.size // config.batch.accumulate // shard.count,
        process_index=shard.index,
        process_count=shard.count,
        max_rows=config.log.eval_rows,
    )


def _fresh_state(
    config: TrainConfig, abstract: TrainState, rules: ShardingRules, kernels: Kernels
) -> TrainState:
    if config.init_from:
        _check_start(config)
        model = load_weights(
            config.init_from,
            dtype=config.runtime.param_dtype,
            runtime=config.runtime,
            rules=rules,
            kernels=kernels,
        )
    else:
        model = create_model(config.model, config.seed, config.runtime, rules, kernels)
    create = functools.partial(init_train_state, config.optimizer)
    shardings = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    return jax.jit(create, donate_argnums=0, out_shardings=shardings)(nnx.state(model))


def _restored_state(
    abstract: TrainState, checkpoints: RunCheckpoints, loader: Loader | None, shard: HostShard
) -> TrainState | None:
    found = checkpoints.restore_newest(abstract.params, optimizer_to_dict(abstract))
    if found is None:
        return None
    params, optimizer, data_states = found
    if loader is not None:
        restore_place(loader, data_states, shard.index)
    return state_from_dict(optimizer, params, abstract)
