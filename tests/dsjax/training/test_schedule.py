"""Learning rate and batch size of every step (§3.1.2)."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from dsjax.config import BatchConfig, OptimizerConfig
from dsjax.training.schedule import Schedule
from tests.dsjax.training.small_runs import LENGTH, small_run

pytestmark = pytest.mark.core


def schedule(num_steps: int, batch: BatchConfig, optimizer: OptimizerConfig) -> Schedule:
    config = small_run(Path("run"), Path("corpus"))
    return Schedule(replace(config, num_steps=num_steps, batch=batch, optimizer=optimizer))


def test_learning_rate_warms_up_and_falls_at_60_and_90_percent():
    optimizer = OptimizerConfig(peak_learning_rate=2.0, warmup_steps=4)
    made = schedule(100, BatchConfig(size=8), optimizer)
    rates = [made.learning_rate(step) for step in range(100)]
    np.testing.assert_allclose(rates[:4], [0.5, 1.0, 1.5, 2.0], rtol=1e-12)
    np.testing.assert_allclose(rates[4:60], 2.0, rtol=1e-12)
    np.testing.assert_allclose(rates[60:90], 2.0 * 0.316, rtol=1e-12)
    np.testing.assert_allclose(rates[90:], 2.0 * 0.316**2, rtol=1e-12)


def test_decay_is_of_tokens_not_of_steps():
    # 10 steps of 8 sequences, then 20 of 16: 60 % of the 400 sequences end 10 steps into those.
    batch = BatchConfig(
        size=16, initial_size=8, ramp_tokens=80 * LENGTH, ramp_stages=2, accumulate=2
    )
    optimizer = OptimizerConfig(peak_learning_rate=1.0, warmup_steps=0, decay_at=(0.6,))
    made = schedule(30, batch, optimizer)
    assert made.total_tokens == 400 * LENGTH
    assert [made.learning_rate(step) for step in (19, 20)] == [1.0, 0.316]


def test_batch_ramp_goes_through_even_stages_by_tokens():
    batch = BatchConfig(
        size=32, initial_size=8, ramp_tokens=3 * 96 * LENGTH, ramp_stages=4, accumulate=4
    )
    made = schedule(100, batch, OptimizerConfig(warmup_steps=0))
    sizes = [made.batch_size(step) for step in range(100)]
    # 96 sequences each: 12 steps of 8, 6 of 16, 4 of 24, and then 32 for good.
    assert sizes == [8] * 12 + [16] * 6 + [24] * 4 + [32] * 78
    assert made.tokens_before(22) == batch.ramp_tokens


def test_a_stage_that_no_step_divides_ends_with_the_step_that_passes_it():
    batch = BatchConfig(
        size=16, initial_size=8, ramp_tokens=20 * LENGTH, ramp_stages=2, accumulate=2
    )
    made = schedule(10, batch, OptimizerConfig(warmup_steps=0))
    assert [made.batch_size(step) for step in range(5)] == [8, 8, 8, 16, 16]


@pytest.mark.parametrize(
    "batch",
    [
        BatchConfig(size=16),
        BatchConfig(size=32, initial_size=8, ramp_tokens=9999, ramp_stages=4, accumulate=4),
        BatchConfig(size=8, initial_size=4, ramp_tokens=100, ramp_stages=7, accumulate=8),
        BatchConfig(size=12, initial_size=8, ramp_tokens=3, ramp_stages=5, accumulate=3),
    ],
)
def test_tokens_before_is_the_sum_of_the_steps(batch: BatchConfig):
    made = schedule(60, batch, OptimizerConfig(warmup_steps=0))
    sizes = [made.batch_size(step) for step in range(60)]
    assert sizes == sorted(sizes)
    assert sizes[-1] == batch.size
    expected = np.cumsum([0, *(size * LENGTH for size in sizes)])
    assert [made.tokens_before(step) for step in range(61)] == expected.tolist()
    assert made.total_tokens == expected[-1]


def test_the_papers_ramp():
    tokens = 225_000_000_000 * LENGTH // 4096
    batch = BatchConfig(size=9216, initial_size=2304, ramp_tokens=tokens, accumulate=4)
    made = schedule(20_000, batch, OptimizerConfig())
    crossed = next(step for step in range(20_000) if made.batch_size(step) == 9216)
    assert {made.batch_size(step) for step in range(crossed)} == {2304, 4608, 6912}
    assert 0 <= made.tokens_before(crossed) - tokens < 3 * 9216 * LENGTH
