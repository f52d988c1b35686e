"""Lanes without a device: each sequence in one of them, one shape of chunk, work divided."""

import numpy as np
import pytest

from dsjax.engine.lanes import Lanes
from dsjax.engine.pages import Pages
from dsjax.engine.scheduler import Scheduler
from dsjax.engine.state import ChunkShape, Limits, Sequence

PAGE = 4
LIMITS = Limits(3, 64, (ChunkShape(1, 16), ChunkShape(3, 4)))


def some_lanes(count: int = 3) -> Lanes:
    return Lanes([Scheduler(LIMITS, Pages(20, PAGE), first_slot=3 * i) for i in range(count)])


def run_all(lanes: Lanes) -> None:
    """Runs every sequence to its end; the host knows a token one step after it was chosen."""
    under_way: list[Sequence] = []
    for _ in range(3000):
        steps = lanes.next_steps()
        for sequence in under_way:
            lanes.read(sequence, 7)
            if len(sequence.tokens) - sequence.num_prompt >= sequence.max_tokens:
                lanes.finish(sequence)
        under_way = []
        if steps is None:
            if lanes.num_unfinished == 0:
                return
            continue
        assert len({step.chunk for step in steps if step.chunk is not None}) <= 1
        for index, (lane, step) in enumerate(zip(lanes.schedulers, steps, strict=True)):
            lane.check()
            for sequence in step.samples:
                assert sequence.lane == index
                assert sequence.slot is not None
                assert sequence.slot // LIMITS.max_batch == index
            under_way += step.samples
    raise AssertionError("not all sequences ended")


@pytest.mark.parametrize("seed", range(5))
def test_all_end_and_each_lane_has_its_share(seed):
    rng = np.random.default_rng(seed)
    lanes, texts = some_lanes(), []
    for _ in range(60):
        prompt = rng.integers(0, 9, rng.integers(1, 40)).tolist()
        texts.append(Sequence(prompt, len(prompt), int(rng.integers(1, 20))))
        lanes.add(texts[-1])
    work = np.zeros(3)
    np.add.at(work, [s.lane for s in texts], [s.num_prompt + s.max_tokens for s in texts])
    assert work.max() - work.min() <= 60  # what one sequence may have
    run_all(lanes)
    assert all(len(s.tokens) == s.num_prompt + s.max_tokens for s in texts)
    assert all(lane.pages.num_held == 0 for lane in lanes.schedulers)


def test_a_prompt_goes_where_its_beginning_lies():
    lanes = some_lanes()
    beginning = list(range(24))
    first = Sequence([*beginning, 1], 25, 2)
    lanes.add(first)
    run_all(lanes)
    others = [Sequence([*beginning, token], 25, 2) for token in range(2, 5)]
    for other in others:
        lanes.add(other)
        run_all(lanes)
    assert {other.lane for other in others} == {first.lane}
    assert all(other.num_shared == 24 for other in others)


def test_what_ends_is_no_more_work():
    lanes = some_lanes(2)
    long, short = Sequence([1] * 30, 30, 20), Sequence([2] * 3, 3, 2)
    lanes.add(long)
    lanes.finish(long)
    lanes.finish(long)
    lanes.add(short)
    lanes.add(Sequence([3] * 3, 3, 2))
    assert {s.lane for lane in lanes.schedulers for s in lane.waiting} == {0, 1}
