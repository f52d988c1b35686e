"""What an engine says of itself."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass

from dsjax.engine.active import Active
from dsjax.engine.lanes import Lanes
from dsjax.engine.state import Step

# Times that percentiles are taken of: the newest so many.
_WINDOW = 10_000


@dataclass(frozen=True)
class Figures:
    """An engine's figures; times in seconds.

    Attributes:
        num_waiting: requests in the queue.
        num_running: requests that have pages.
        pages_held: pages that running requests hold.
        pages_remembered: pages whose content other prompts can share.
        num_pages: pages of the pool.
        steps: steps so far.
        finished: requests so far that have ended.
        prompt_tokens: tokens of prompts read so far, without those shared.
        shared_tokens: tokens of prompts that the pool held already.
        tokens: tokens generated so far.
        preemptions: times that a request had to give up its pages.
        first_token_p50: median time from arrival to the first token.
        first_token_p99: the time that one in a hundred exceeds.
        between_tokens_p50: median time between two tokens of a request.
        between_tokens_p99: the time that one in a hundred exceeds.
        waited_share: share of the time since the first step that the host waited for the device.
        waited_seconds: the time itself.
    """

    num_waiting: int
    num_running: int
    pages_held: int
    pages_remembered: int
    num_pages: int
    steps: int
    finished: int
    prompt_tokens: int
    shared_tokens: int
    tokens: int
    preemptions: int
    first_token_p50: float
    first_token_p99: float
    between_tokens_p50: float
    between_tokens_p99: float
    waited_share: float
    waited_seconds: float


class Meter:
    """Counts what an engine does."""

    def __init__(self) -> None:
        self._steps = self._finished = self._prompt_tokens = self._shared = self._tokens = 0
        self._first: deque[float] = deque(maxlen=_WINDOW)
        self._between: deque[float] = deque(maxlen=_WINDOW)
        self._waited = 0.0
        self._begun: float | None = None

    def step(self, steps: Iterable[Step]) -> None:
        """Counts a step of all lanes."""
        self._begun = self._begun or time.monotonic()
        self._steps += 1
        self._prompt_tokens += sum(piece.num_tokens for step in steps for piece in step.pieces)

    def waited(self, seconds: float) -> None:
        """Counts time in which the host waited for the device."""
        self._waited += seconds

    def token(self, active: Active, now: float) -> None:
        """Counts a token."""
        self._tokens += 1
        if active.newest_at is None:
            self._first.append(now - active.arrived)
        else:
            self._between.append(now - active.newest_at)
        active.newest_at = now

    def finished(self, active: Active) -> None:
        """Counts a request that has ended."""
        self._finished += 1
        self._shared += active.sequence.num_shared

    def figures(self, lanes: Lanes) -> Figures:
        """Returns all figures."""
        schedulers = lanes.schedulers
        pages = [lane.pages for lane in schedulers]
        whole = 0.0 if self._begun is None else time.monotonic() - self._begun
        return Figures(
            sum(len(lane.waiting) for lane in schedulers),
            sum(len(lane.running) for lane in schedulers),
            sum(each.num_held for each in pages),
            sum(each.num_remembered for each in pages),
            sum(each.num_pages for each in pages),
            self._steps,
            self._finished,
            self._prompt_tokens,
            self._shared,
            self._tokens,
            sum(lane.num_preemptions for lane in schedulers),
            _percentile(self._first, 50),
            _percentile(self._first, 99),
            _percentile(self._between, 50),
            _percentile(self._between, 99),
            self._waited / whole if whole else 0.0,
            self._waited,
        )


def _percentile(values: deque[float], percent: int) -> float:
    if not values:
        return math.nan
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, len(ordered) * percent // 100)]
