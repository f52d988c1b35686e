"""How gradients become updates."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsjax.config.fitting import checked
from dsjax.config.model import require, require_not_negative, require_positive
from dsjax.config.runtime import DTYPES, DType

Rounding = Literal["nearest", "stochastic", "compensated"]
ROUNDINGS: tuple[Rounding, ...] = ("nearest", "stochastic", "compensated")


@checked
@dataclass(frozen=True)
class OptimizerConfig:
    """AdamW and the paper's schedules (§3.1.2).

    Attributes:
        peak_learning_rate: after the warm-up.
        warmup_steps: steps of linear warm-up from 0.
        decay_factor: the learning rate is multiplied by it at each fraction in `decay_at`.
        decay_at: fractions of all tokens at which the learning rate decays.
        beta1: decay of the first moment.
        beta2: decay of the second moment.
        epsilon: added to the root of the second moment.
        weight_decay: decoupled, on matrices alone.
        clip_norm: bound on the global gradient norm.
        moment_dtype: type that both moments are stored in; the arithmetic is float32.
        rounding: of what a step stores in bfloat16. "nearest" loses updates below half a unit of
            a parameter's last place. "stochastic" rounds parameters and moments up or down at
            random, right in the mean, and costs no memory. "compensated" keeps what rounding took
            off a parameter beside it, in 2 bytes more (Kahan), and rounds moments to nearest.
        ema_decay: of a moving average of the parameters, kept beside them in float32 (4 bytes each)
            and in the checkpoints; smaller while n updates are fewer than it looks back on,
            (1 + n) / (10 + n). None keeps none.
        frozen: patterns of names of parameters that are not trained, such as
            "moe_layers.feed_forward.w_*", the routed experts: they have neither gradients nor
            moments, so of a parameter only its own bytes are kept. `*` stands for any part.
    """

    peak_learning_rate: float = 2.4e-4
    warmup_steps: int = 2000
    decay_factor: float = 0.316
    decay_at: tuple[float, ...] = (0.6, 0.9)
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0
    moment_dtype: DType = "float32"
    rounding: Rounding = "nearest"
    ema_decay: float | None = None
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        require_positive(
            "optimizer",
            peak_learning_rate=self.peak_learning_rate,
            decay_factor=self.decay_factor,
            epsilon=self.epsilon,
            clip_norm=self.clip_norm,
        )
        require_not_negative(
            "optimizer", warmup_steps=self.warmup_steps, weight_decay=self.weight_decay
        )
        for name in ("beta1", "beta2"):
            value = getattr(self, name)
            require(0 <= value < 1, f"optimizer.{name}", value, "must be in [0, 1)")
        if self.ema_decay is not None:
            inside = 0 < self.ema_decay < 1
            require(inside, "optimizer.ema_decay", self.ema_decay, "must be between 0 and 1")
            reason = "must be none with optimizer.frozen: an average is of all parameters"
            require(not self.frozen, "optimizer.ema_decay", self.ema_decay, reason)
        ordered = list(self.decay_at) == sorted(self.decay_at)
        inside = all(0 < fraction < 1 for fraction in self.decay_at)
        require(
            ordered and inside,
            "optimizer.decay_at",
            self.decay_at,
            "must be rising fractions between 0 and 1",
        )
        for name, choices in (("moment_dtype", DTYPES), ("rounding", ROUNDINGS)):
            value = getattr(self, name)
            require(value in choices, f"optimizer.{name}", value, f"must be one of {choices}")
        if self.moment_dtype == "bfloat16" and self.rounding != "stochastic":
            for name in ("beta1", "beta2"):
                # Of 8 bits a moment loses at least half of the last, or is rounded back to itself.
                require(
                    getattr(self, name) <= 1 - 2**-8,
                    f"optimizer.{name}",
                    getattr(self, name),
                    "must be at most 0.99609375, or a bfloat16 moment never falls; take "
                    "rounding=stochastic or moment_dtype=float32",
                )
