"""What a run watches for: standing still, lost processes, and silent corruption."""

from __future__ import annotations

from dataclasses import dataclass

from dsjax.config.fitting import checked
from dsjax.config.model import require, require_not_negative, require_positive


@checked
@dataclass(frozen=True)
class WatchConfig:
    """When a run that stands still ends by itself, all times in seconds.

    A process that ends so prints what it waited for and the stack of each of its threads.

    Attributes:
        step_seconds: what a step may always take.
        step_factor: what it may take in medians of the last steps, where that is more.
        start_seconds: for all that comes before the first step: data, processes, a checkpoint.
        compile_seconds: for the first step of each batch size, which compiles.
        save_seconds: for what a save makes the steps wait, and for the last save.
        eval_seconds: for an evaluation.
        peer_seconds: silence after which another process counts as lost; below 30, and several
            times the 2 seconds between two signs of life.
        slow_share: a host is named as slow where its own work takes this share of a step more than
            the median host's.
    """

    step_seconds: float = 30.0
    step_factor: float = 5.0
    start_seconds: float = 3600.0
    compile_seconds: float = 3600.0
    save_seconds: float = 1800.0
    eval_seconds: float = 3600.0
    peer_seconds: float = 20.0
    slow_share: float = 0.1

    def __post_init__(self) -> None:
        require_positive("watch", **vars(self))
        require(
            6 <= self.peer_seconds <= 24,
            "watch.peer_seconds",
            self.peer_seconds,
            "must be from 6 (three signs of life) to 24 (all end in under 30)",
        )


@checked
@dataclass(frozen=True)
class ChecksConfig:
    """How a run looks for silent corruption; 0 leaves a check out.

    Attributes:
        state_every: steps between comparisons of all that a step changes: between replicas where
            the mesh has some (data >= 2), else of each shard with itself before the next step.
        repeat_every: steps between repetitions of a step's gradient, which must be equal bit by
            bit, and of one computation on every device, which must be equal on all.
        max_share: of the time, that all checks may take together; they are made more rarely where
            they would take more.
    """

    state_every: int = 100
    repeat_every: int = 2000
    max_share: float = 0.005

    def __post_init__(self) -> None:
        require_not_negative("checks", state_every=self.state_every, repeat_every=self.repeat_every)
        require_positive("checks", max_share=self.max_share)
