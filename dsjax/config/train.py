"""What a training run is: batches, losses, checkpoints and logs, around one model."""

from __future__ import annotations

from dataclasses import dataclass, field

from dsjax.config.data import DataConfig
from dsjax.config.fitting import checked
from dsjax.config.mesh import MeshConfig
from dsjax.config.model import (
    ModelConfig,
    require,
    require_folder,
    require_not_negative,
    require_positive,
    require_seed,
)
from dsjax.config.optimizer import OptimizerConfig
from dsjax.config.runtime import RuntimeConfig
from dsjax.config.watch import ChecksConfig, WatchConfig


@checked
@dataclass(frozen=True)
class BatchConfig:
    """Sequences per optimiser step, over all devices (§3.1.2).

    Attributes:
        size: sequences per step once the ramp is over.
        initial_size: sequences per step at the start; None starts at `size`.
        ramp_tokens: tokens over which the batch grows from `initial_size` to `size`.
        ramp_stages: batch sizes the ramp goes through, both ends included; each compiles once.
        accumulate: slices that the full batch's gradient is summed over, one after the other; a
            smaller batch of the ramp takes slices of the same size, so fewer of them.
    """

    size: int
    initial_size: int | None = None
    ramp_tokens: int = 0
    ramp_stages: int = 4
    accumulate: int = 1

    def __post_init__(self) -> None:
        require_positive(
            "batch",
            size=self.size,
            initial_size=self.initial_size,
            accumulate=self.accumulate,
            ramp_stages=self.ramp_stages,
        )
        require_not_negative("batch", ramp_tokens=self.ramp_tokens)
        require(
            self.size % self.accumulate == 0,
            "batch.accumulate",
            self.accumulate,
            f"must divide batch.size={self.size}",
        )
        if self.initial_size is not None:
            require(
                self.initial_size <= self.size,
                "batch.initial_size",
                self.initial_size,
                f"must not exceed batch.size={self.size}",
            )
            require(
                self.initial_size % (self.size // self.accumulate) == 0,
                "batch.initial_size",
                self.initial_size,
                f"must be a multiple of a slice, {self.size // self.accumulate} sequences",
            )
            require(self.ramp_stages >= 2, "batch.ramp_stages", self.ramp_stages, "must be >= 2")
            # Not an int32, as other sizes are: the paper's are 225 billion.
            require(self.ramp_tokens > 0, "batch.ramp_tokens", self.ramp_tokens, "must be positive")


BALANCE_NOT_CHOSEN = (
    "must be chosen for a model with experts: set expert, device and communication, 0 for none"
)


@checked
@dataclass(frozen=True)
class BalanceConfig:
    """Weights of the three balance losses, the paper's alphas (§2.2.3, eq. 23 to 31).

    None has a default: without them experts go unused, so a run says what it wants, 0 too. The
    paper's are 0.003, 0.05 and 0.02 (§3.1.2).
    """

    expert: float
    device: float
    communication: float

    def __post_init__(self) -> None:
        require_not_negative(
            "loss.balance",
            expert=self.expert,
            device=self.device,
            communication=self.communication,
        )


@checked
@dataclass(frozen=True)
class TokenDropping:
    """The paper's token-dropping option for training (§2.2.4); evaluation never drops.

    Attributes:
        capacity_factor: assignments a device computes, over an even share of all assignments.
        undropped_fraction: share of the sequences exempt from dropping. Each is or is not by a hash
            of the seed, the step and its place in the step's batch.
        budget_rows: sequences, one after another in the batch, that share the devices' budgets.
            None takes those that the devices which share the experts have of a slice, when the run
            starts; the run keeps that. The same number drops the same tokens on any mesh and with
            any accumulation that leaves those sequences together; others are refused.
        seed: of the hash.
    """

    capacity_factor: float = 1.0
    undropped_fraction: float = 0.1
    budget_rows: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(
            "loss.dropping", capacity_factor=self.capacity_factor, budget_rows=self.budget_rows
        )
        require(
            0 <= self.undropped_fraction <= 1,
            "loss.dropping.undropped_fraction",
            self.undropped_fraction,
            "must be between 0 and 1",
        )


@checked
@dataclass(frozen=True)
class LossConfig:
    """What is minimised.

    Attributes:
        balance: weights of the balance losses; a model with experts needs them chosen.
        z_loss: weight of the squared log-partition of the output logits; 0 for none.
        dropping: the token-dropping option, or None for dropless training.
        chunk: tokens whose logits over the vocabulary exist at a time.
        router_entropy: whether a step also measures the entropy of the routers' affinities, for
            the figures; nothing is minimised by it.
    """

    balance: BalanceConfig | None = None
    z_loss: float = 0.0
    dropping: TokenDropping | None = None
    chunk: int = 4096
    router_entropy: bool = False

    def __post_init__(self) -> None:
        require_not_negative("loss", z_loss=self.z_loss)
        require_positive("loss", chunk=self.chunk)


@checked
@dataclass(frozen=True)
class GuardConfig:
    """When a step is skipped rather than applied, and when the run stops.

    Attributes:
        loss_spike: a loss above this multiple of its running mean is a spike.
        norm_spike: the same for the gradient norm.
        warmup_steps: steps before spikes are judged; NaN and infinity are judged always.
        max_skipped: consecutive skipped steps after which the run stops.
    """

    loss_spike: float = 3.0
    norm_spike: float = 20.0
    warmup_steps: int = 100
    max_skipped: int = 10

    def __post_init__(self) -> None:
        require_positive(
            "guard",
            loss_spike=self.loss_spike,
            norm_spike=self.norm_spike,
            max_skipped=self.max_skipped,
        )
        require_not_negative("guard", warmup_steps=self.warmup_steps)


@checked
@dataclass(frozen=True)
class CheckpointConfig:
    """When checkpoints are saved and which are kept.

    Attributes:
        every: steps between checkpoints.
        keep_latest: newest ones kept.
        keep_every: every so many steps one is kept for good; None keeps none.
        max_stall_seconds: how long the steps wait for a save that is still being written when the
            next is due; that one is then put off. What they wait at each save is in the metrics.
        retries: failed saves in a row that are tried again, each as the state is by then; one more
            stops the run.
        retry_seconds: before the first new attempt; doubled for each further one.
    """

    every: int = 1000
    keep_latest: int = 2
    keep_every: int | None = None
    max_stall_seconds: float = 10.0
    retries: int = 3
    retry_seconds: float = 10.0

    def __post_init__(self) -> None:
        require_positive(
            "checkpoint",
            every=self.every,
            keep_latest=self.keep_latest,
            keep_every=self.keep_every,
            retry_seconds=self.retry_seconds,
        )
        require_not_negative(
            "checkpoint", retries=self.retries, max_stall_seconds=self.max_stall_seconds
        )


@checked
@dataclass(frozen=True)
class LogConfig:
    """What is measured and where it goes; `metrics.jsonl` is always written.

    Attributes:
        every: steps between lines of metrics.
        eval_every: steps between held-out evaluations; 0 evaluates at the end alone.
        eval_rows: held-out rows per evaluation, spread evenly over all of them and the same each
            time; 0 takes all.
        eval_ema: whether an evaluation is also of the parameters' moving average, where
            `optimizer.ema_decay` keeps one; takes as long again. Its figures are beside those of
            the parameters themselves, as eval_ema_bits_per_byte and eval_ema_cross_entropy.
        tensorboard: also write event files.
        wandb_project: also log to this Weights & Biases project; "" for none.
    """

    every: int = 10
    eval_every: int = 1000
    eval_rows: int = 0
    eval_ema: bool = True
    tensorboard: bool = False
    wandb_project: str = ""

    def __post_init__(self) -> None:
        require_positive("log", every=self.every)
        require_not_negative("log", eval_every=self.eval_every, eval_rows=self.eval_rows)


@checked
@dataclass(frozen=True)
class TrainConfig:
    """One training run.

    Attributes:
        directory: where checkpoints and metrics go.
        model: what the model is.
        data: its data; `data.length` is the training context.
        batch: sequences per step.
        num_steps: optimiser steps in all.
        runtime: how the model is run; `runtime.dtype` makes a run bfloat16 or float32.
        seed: of the initial weights.
        init_from: a checkpoint or Hugging Face folder whose weights are the start; "" for random.
    """

    directory: str
    model: ModelConfig
    data: DataConfig
    batch: BatchConfig
    num_steps: int
    runtime: RuntimeConfig = field(default_factory=RuntimeConfig)
    mesh: MeshConfig = field(default_factory=MeshConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    guard: GuardConfig = field(default_factory=GuardConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)
    log: LogConfig = field(default_factory=LogConfig)
    watch: WatchConfig = field(default_factory=WatchConfig)
    checks: ChecksConfig = field(default_factory=ChecksConfig)
    seed: int = 0
    init_from: str = ""

    def __post_init__(self) -> None:
        require_positive("train", num_steps=self.num_steps)
        require_seed("seed", self.seed)
        require(self.directory != "", "directory", self.directory, "must name a folder")
        require_folder("directory", self.directory)
        require_folder("init_from", self.init_from)
        require(
            self.data.length <= self.model.max_length,
            "data.length",
            self.data.length,
            f"must not exceed model.max_length={self.model.max_length}",
        )
        require(
            self.model.moe is None or self.loss.balance is not None,
            "loss.balance",
            self.loss.balance,
            BALANCE_NOT_CHOSEN,
        )
        require(
            self.runtime.quantisation is None,
            "runtime.quantisation",
            self.runtime.quantisation,
            "must be none: quantised weights are for generation, and have no gradient",
        )
        require(
            self.runtime.latent_dtype is None,
            "runtime.latent_dtype",
            self.runtime.latent_dtype,
            "must be none: it is of generation's cache, so of load and of --latent-dtype",
        )
        stored = {self.runtime.param_dtype}
        if self.optimizer.rounding == "stochastic":
            stored.add(self.optimizer.moment_dtype)
        require(
            self.optimizer.rounding == "nearest" or "bfloat16" in stored,
            "optimizer.rounding",
            self.optimizer.rounding,
            f"is of bfloat16, and runtime.param_dtype={self.runtime.param_dtype} is not",
        )
