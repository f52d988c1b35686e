"""Requests that come when they come: arrivals, lengths, and what an engine makes of them."""

from __future__ import annotations

import contextlib
import itertools
import math
import threading
import time
from collections.abc import Callable, Container, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dsjax.engine import Engine, Request, TextPiece
from dsjax.engine.pending import Chosen, Reading

SAMPLE_SECONDS = 0.001


@dataclass(frozen=True)
class Lengths:
    """A log-normal distribution of tokens, cut at the longest.

    Attributes:
        median: tokens.
        sigma: standard deviation of their logarithm.
        longest: what is drawn longer has this length.
    """

    median: int
    sigma: float
    longest: int

    def draw(self, rng: np.random.Generator, count: int) -> np.ndarray:
        """Returns whole numbers from 1 to the longest."""
        drawn = rng.lognormal(math.log(self.median), self.sigma, count)
        return np.clip(np.rint(drawn), 1, self.longest).astype(int)

    def __str__(self) -> str:
        return f"log-normal, median {self.median}, sigma {self.sigma:g}, cut at {self.longest}"


def arrivals(rng: np.random.Generator, rate: float, seconds: float) -> np.ndarray:
    """Returns the times of a Poisson process of `rate` a second, rising, until `seconds`."""
    times = np.zeros(0)
    while not times.size or times[-1] < seconds:
        more = rng.exponential(1 / rate, 64 + int(rate * seconds))
        times = np.concatenate([times, (times[-1] if times.size else 0.0) + np.cumsum(more)])
    return times[times < seconds]


@dataclass
class Asked:
    """One request: when it was due, and when tokens came, in seconds of the loop's clock."""

    due: float
    came: list[float] = field(default_factory=list)
    ended: threading.Event = field(default_factory=threading.Event)


def run_open_loop(
    engine: Engine, requests: Sequence[Request], due: Sequence[float], ramp: float, seconds: float
) -> dict[str, Any]:
    """Submits requests when they are due and measures the time after a ramp; ends what is left.

    Args:
        engine: its thread is started.
        requests: as many as times.
        due: seconds from the begin on, rising.
        ramp: seconds that are not measured.
        seconds: that are.
    """
    engine.start()
    asked: list[Asked] = []
    streams = []
    begun = time.perf_counter()

    def wait_until(moment: float) -> None:
        time.sleep(max(0.0, begun + moment - time.perf_counter()))

    def submit(request: Request, moment: float) -> None:
        one = Asked(moment)

        def note(event: Any) -> None:
            if isinstance(event, TextPiece):
                now = time.perf_counter() - begun
                one.came.extend([now] * len(event.tokens))
            else:
                one.ended.set()

        wait_until(moment)
        asked.append(one)
        streams.append(engine.submit(request, note))

    pairs = list(zip(requests, map(float, due), strict=True))
    first = next((i for i, (_, moment) in enumerate(pairs) if moment >= ramp), len(pairs))
    for request, moment in pairs[:first]:
        submit(request, moment)
    wait_until(ramp)
    with measured(engine) as window:
        for request, moment in pairs[first:]:
            submit(request, moment)
        wait_until(ramp + seconds)
    for stream in streams:
        stream.cancel()
    for one in asked:
        one.ended.wait()
    return figures_of(asked, ramp, ramp + seconds) | window


def figures_of(asked: Sequence[Asked], begin: float, end: float) -> dict[str, Any]:
    """Returns what was seen from `begin` to `end`.

    A request of that time without a token counts with the time that it has waited for one, which
    is less than it would have waited.
    """
    mine = [one for one in asked if begin <= one.due < end]
    firsts = [min((*one.came[:1], end)) - one.due for one in mine]
    gaps = [
        after - before
        for one in asked
        for before, after in itertools.pairwise(one.came)
        if begin <= after < end
    ]
    tokens = sum(begin <= moment < end for one in asked for moment in one.came)
    return {
        "requests": len(mine),
        "without_a_token": sum(not one.came or one.came[0] >= end for one in mine),
        "tokens_per_second": tokens / (end - begin),
        **_quantiles("first_token", firsts),
        **_quantiles("between_tokens", gaps),
    }


def _quantiles(name: str, values: Sequence[float]) -> dict[str, float | None]:
    found = np.quantile(values, (0.5, 0.99)).tolist() if values else (None, None)
    return dict(zip((f"{name}_p50", f"{name}_p99"), found, strict=True))


@contextlib.contextmanager
def measured(engine: Engine) -> Iterator[dict[str, Any]]:
    """Gives a dict that has what the engine did meanwhile, when the time is over.

    `device_waits` is the share of samples, a thousand a second, at which all that was launched was
    done while requests were open; gaps between the kernels of a launch are not seen. `host_waits`
    is the share of the time in which the host waited for the device.
    """
    found: dict[str, Any] = {}
    before, begun = engine.figures(), time.perf_counter()
    with watched(engine) as samples:
        yield found
    after, seconds = engine.figures(), time.perf_counter() - begun
    found["seconds"] = seconds
    found["steps"] = after.steps - before.steps
    found["preemptions"] = after.preemptions - before.preemptions
    found["running_at_the_end"] = after.num_running
    found["waiting_at_the_end"] = after.num_waiting
    found["device_waits"] = samples.count(True) / max(1, len(samples))
    found["host_waits"] = (after.waited_seconds - before.waited_seconds) / seconds


@contextlib.contextmanager
def watched(engine: Engine) -> Iterator[list[bool]]:
    """Gives a list of samples, taken by a thread: whether the device had nothing to do."""
    runner, loop = engine._runner, engine._loop
    read, choose = runner.read, runner.choose
    newest: list[Callable[[], bool]] = [lambda: True]
    samples: list[bool] = []
    over = threading.Event()

    def noted_read(steps: Any, prompt_logprobs: Container[Any] = ()) -> Reading:
        reading = read(steps, prompt_logprobs)
        row = reading.row
        newest[0] = lambda: row.done() and _is_ready(row.result().logits_MW)
        return reading

    def noted_choose(*given: Any) -> Future[Chosen]:
        chosen = choose(*given)
        newest[0] = lambda: chosen.done() and _is_ready(chosen.result().tokens_M)
        return chosen

    def watch() -> None:
        while not over.wait(SAMPLE_SECONDS):
            if loop.num_open:
                samples.append(newest[0]())

    runner.read = noted_read  # type: ignore[method-assign]
    runner.choose = noted_choose  # type: ignore[method-assign, assignment]
    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield samples
    finally:
        over.set()
        thread.join()
        runner.read, runner.choose = read, choose  # type: ignore[method-assign]


def _is_ready(array: Any) -> bool:
    """Whether an array has been computed; asks, and waits for nothing.

    One that has been deleted has an array made of it, which is to be asked then.
    """
    return not array.is_deleted() and bool(array.is_ready())
