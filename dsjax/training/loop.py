"""The training loop: from a config to a trained model, through stops and restarts."""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh

from dsjax.config import DataConfig, LogConfig, TrainConfig, to_json
from dsjax.config.run_file import write_run_file
from dsjax.data.loader import Loader, make_eval_batches, make_loader
from dsjax.data.prepare import prepare_data
from dsjax.kernels import Kernels
from dsjax.mesh import ShardingRules
from dsjax.model import DeepSeekV2, abstract_model
from dsjax.processes import HostShard, HostTimes, Watch
from dsjax.progress import JobProgress
from dsjax.training.checkpoints import RunCheckpoints
from dsjax.training.corruption import Checks
from dsjax.training.data_place import keeps_place
from dsjax.training.folder import gather_json, only_run_in
from dsjax.training.metrics import MetricsWriter
from dsjax.training.preemption import Preemption
from dsjax.training.report import Throughput, one_line, step_figures
from dsjax.training.saving import Saver
from dsjax.training.schedule import Schedule
from dsjax.training.start import (
    check_stored,
    check_vocabulary,
    fresh_state,
    lay_out,
    restored_state,
)
from dsjax.training.step import (
    SKIP_REASONS,
    StepReport,
    TrainState,
    abstract_train_state,
    eval_step,
    jitted_train_step,
)
from dsjax.weights import save_assets
from dsjax.weights.checksums import CHECKSUMS_FILE
from dsjax.weights.run_steps import chosen_step, steps_of

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


def fit(
    config: TrainConfig, devices: Sequence[jax.Device] | None = None, step: int | None = None
) -> FitResult:
    """Trains a model, going on from the run's last complete checkpoint if there is one.

    Args:
        config: the run.
        devices: those to train on; None takes all of every process.
        step: the checkpoint to go on from; later ones are moved to `set_aside` in the run's folder.

    Raises:
        ValueError: a field of the config does not fit the devices, the data or the checkpoint.
        TrainingStopped: `guard.max_skipped` bad steps in a row.
        RuntimeError: another run is going on in the folder, or a checkpoint could not be saved.

    Where the run stands still or has lost a process, this one prints the stack of each of its
    threads and ends with code 75 (`config.watch`).
    """
    run = Path(config.directory).absolute()
    chosen_step(run, step)  # what is wrong with it is said before minutes of making data
    config, stored, mesh, rules, kernels = lay_out(config, devices)
    with Watch(config.watch) as watch, only_run_in(run):
        return _fit_alone(config, stored, mesh, rules, kernels, watch, step)


def _fit_alone(
    config: TrainConfig,
    stored: TrainConfig | None,
    mesh: Mesh,
    rules: ShardingRules,
    kernels: Kernels,
    watch: Watch,
    step: int | None,
) -> FitResult:
    run = Path(config.directory).absolute()
    device = mesh.devices.flat[0]
    _prepare_data(config.data)
    check_vocabulary(config)
    shard = HostShard(rules)
    loader = make_loader(config.data, process_index=shard.index, process_count=shard.count)
    with contextlib.closing(loader):
        eval_batches = _eval_batches(config, shard)
        graphdef, params = abstract_model(config.model, config.runtime, rules, kernels)
        abstract = abstract_train_state(config.optimizer, params, rules, device)
        with RunCheckpoints(run, config.checkpoint) as checkpoints:
            if stored is not None and steps_of(run):
                check_stored(stored, config, run)
            keep_place = stored is None or keeps_place(stored.data, config.data)
            state = restored_state(
                abstract, checkpoints, loader if keep_place else None, shard, step
            )
            if state is None:
                state = fresh_state(config, abstract, rules, kernels)
            if jax.process_index() == 0:
                (run / CHECKSUMS_FILE).unlink(missing_ok=True)  # until the new ones are there
                write_run_file(run, config)
                save_assets(config.data.tokenizer, config.init_from, run)
            with _open_metrics(config, run, int(state.step)) as metrics:
                loop = _Loop(
                    config, graphdef, shard, loader, eval_batches, checkpoints, metrics, mesh, watch
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
        watch: Watch,
    ):
        self.config = config
        self.watch = watch
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
        self.saver = Saver(
            checkpoints, config.checkpoint, config.log.every, watch, self.progress.say
        )
        hosts = [said["host"] for said in gather_json({"host": watch.heartbeat.host})]
        self.checks = Checks(config.checks, mesh, hosts, self.progress.say)
        self.hosts = HostTimes(config.watch.slow_share, self.progress.say)

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
                if (size := self.schedule.batch_size(step)) != compiled_size:
                    self._read(unread)  # its time is over before the next step compiles
                    unread = None
                    with self.watch.waiting(
                        f"step {step + 1}, which compiles", config.watch.compile_seconds
                    ):
                        state, report = self._step(state, step)
                        jax.block_until_ready(report)
                    self.throughput.restart(step + 1)  # compilation is not a step's time
                    compiled_size = size
                else:
                    self.watch.step(step + 1)
                    state, report = self._step(state, step)
                step += 1
                # The report of the step before is read while this one runs.
                self._read(unread)
                unread = (step, report)
                self._check(state, report, step)
                if self.saver.is_due(step):
                    # Whoever is killed after a save has the figures of every step up to it.
                    self._read(unread)
                    unread = None
                    with self.throughput.leaving_out():
                        self.saver.save(step, state, self._data_state())
                if log.eval_every and step % log.eval_every == 0:
                    self._read(unread)
                    unread = None
                    bits_per_byte = self._evaluate(state, step)
                    evaluated_at = step
                    self.throughput.restart(step)
            self._read(unread)
            self.saver.finish(step, state, self._data_state())
            finished = step >= config.num_steps
            if finished and evaluated_at != step:
                bits_per_byte = self._evaluate(state, step)
            if not finished:
                self.progress.say(f"stopped by a signal at step {step}; saved; run again to go on")
        return FitResult(nnx.merge(self.graphdef, state.params), step, finished, bits_per_byte)

    def _check(self, state: TrainState, report: StepReport, step: int) -> None:
        """Looks for silent corruption in the state, where it is time to."""
        if not self.checks.is_due("state", step):
            return
        jax.block_until_ready(report)
        with self.throughput.leaving_out(), self._checking(step):
            self.checks.after_update(state, step)

    def _checking(self, step: int) -> contextlib.AbstractContextManager[None]:
        limit = self.config.watch.compile_seconds  # the first check of each kind compiles
        return self.watch.waiting(f"checks for silent corruption at step {step}", limit)

    def _step(self, state: TrainState, step: int) -> tuple[TrainState, StepReport]:
        config, size = self.config, self.schedule.batch_size(step)
        num_slices = size // (config.batch.size // config.batch.accumulate)
        with self.hosts.own_work():
            rows = self.loader.next_batch(size // self.shard.count)
            rows.pop("num_bytes")
            batch = self.shard.place(rows, num_slices)
        if self.checks.is_due("repeat", step):
            jax.block_until_ready(state)
            with self.throughput.leaving_out(), self._checking(step):
                self.checks.repeat(self.graphdef, config.loss, state, batch, step)
        if self.checks.has_unconfirmed:
            with self.throughput.leaving_out(), self._checking(step):
                self.checks.before_update(state, step)
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
            moe = config.model.moe
            figures = step_figures(report, 1 if moe is None else moe.num_groups)
            figures |= self.throughput.figures(step)
            figures["learning_rate"] = self.schedule.learning_rate(step - 1)
            figures["batch_size"] = self.schedule.batch_size(step - 1)
            figures["tokens"] = self.schedule.tokens_before(step)
            figures |= self.saver.take_figures()
            figures |= self.hosts.figures(
                self.watch.heartbeat, self.checks.probe_seconds, figures.get("step_seconds")
            )
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

    def _data_state(self) -> dict[str, Any]:
        return {"shard": self.shard.index, "state": self.loader.get_state()}

    def _evaluate(self, state: TrainState, step: int) -> float | None:
        """Evaluates on the held-out rows; returns the parameters' bits per byte of documents."""
        bits_per_byte = self._held_out(state.params, step, "")
        if state.moments.ema is not None and self.config.log.eval_ema:
            self._held_out(state.moments.ema, step, "ema_")
        return bits_per_byte

    def _held_out(self, params: nnx.State, step: int, prefix: str) -> float | None:
        """Evaluates some parameters, of which the prefix tells the figures."""
        sums = np.zeros(3)
        with self.watch.waiting(f"evaluating step {step}", self.config.watch.eval_seconds):
            for rows in self.eval_batches:
                batch = jax.tree.map(lambda x: x[0], self.shard.place(rows, 1))
                sums += np.asarray(
                    eval_step(self.graphdef, self.config.loss.chunk, params, batch), np.float64
                )
        nats, tokens, num_bytes = sums
        if num_bytes == 0:
            return None
        bits_per_byte = nats / math.log(2) / num_bytes
        figures = {"cross_entropy": nats / tokens, "bits_per_byte": bits_per_byte}
        self.metrics.write(step, {f"eval_{prefix}{name}": x for name, x in figures.items()})
        what = " of the moving average" if prefix else ""
        self.progress.say(f"step {step}: held-out {bits_per_byte:.4f} bits per byte{what}")
        return bits_per_byte


def _prepare_data(data: DataConfig) -> None:
    """Makes the run's data, where its config says how, by one process for all."""
    if data.prepare is None:
        return
    if jax.process_index() == 0:
        prepare_data(data)
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("data prepared")


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
