"""Batch size and learning rate of every step, as functions of the step alone (§3.1.2)."""

from __future__ import annotations

import bisect
import itertools

from dsjax.config import BatchConfig, TrainConfig


class Schedule:
    """The paper's schedules, precomputed on the host: a resumed run needs only its step.

    Attributes:
        num_steps: steps of the run.
        total_tokens: tokens of the run.
    """

    def __init__(self, config: TrainConfig):
        self._optimizer = config.optimizer
        self._length = config.data.length
        # (first step, first token, sequences) of each stretch of steps with one batch size
        self._stretches: list[tuple[int, int, int]] = []
        step = tokens = 0
        for sequences, until_token in _ramp(config.batch):
            self._stretches.append((step, tokens, sequences))
            if until_token is None:
                break
            steps = max(1, -(-(until_token - tokens) // (sequences * self._length)))
            step, tokens = step + steps, tokens + steps * sequences * self._length
        self.num_steps = config.num_steps
        self.total_tokens = self.tokens_before(config.num_steps)

    @property
    def batch_sizes(self) -> tuple[int, ...]:
        """The sequences of the run's steps, each number once, in the order in which they come."""
        return tuple(size for first, _, size in self._stretches if first < self.num_steps)

    def batch_size(self, step: int) -> int:
        """Returns the sequences of a step."""
        return self._stretch(step)[2]

    def tokens_before(self, step: int) -> int:
        """Returns the tokens trained on before a step."""
        first_step, first_token, sequences = self._stretch(step)
        return first_token + (step - first_step) * sequences * self._length

    def learning_rate(self, step: int) -> float:
        """Returns a step's rate: linear warm-up, then decays at fractions of all tokens."""
        optimizer = self._optimizer
        if step < optimizer.warmup_steps:
            return optimizer.peak_learning_rate * (step + 1) / optimizer.warmup_steps
        fraction = self.tokens_before(step) / self.total_tokens
        decays = bisect.bisect_right(optimizer.decay_at, fraction)
        return optimizer.peak_learning_rate * optimizer.decay_factor**decays

    def _stretch(self, step: int) -> tuple[int, int, int]:
        index = bisect.bisect_right(self._stretches, step, key=lambda stretch: stretch[0]) - 1
        return self._stretches[index]


def _ramp(batch: BatchConfig) -> list[tuple[int, int | None]]:
    """Returns (sequences, token it lasts to) of each stage; the last one never ends.

    Sizes rise evenly in whole slices of gradient accumulation, so that a stage changes how many
    slices a step adds up and not their shape.
    """
    if batch.initial_size is None or batch.initial_size == batch.size:
        return [(batch.size, None)]
    slice_size = batch.size // batch.accumulate
    first, last = batch.initial_size // slice_size, batch.accumulate
    stages = batch.ramp_stages - 1
    sizes = [slice_size * round(first + (last - first) * i / stages) for i in range(stages + 1)]
    ends: list[int | None] = [batch.ramp_tokens * (i + 1) // stages for i in range(stages)]
    # Stages that round to one size are one stage, which lasts as long as the last of them.
    merged = dict(itertools.zip_longest(sizes, ends))
    return list(merged.items())
