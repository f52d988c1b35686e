"""Ends a process that stands still, or whose run has lost another one, and says where it stood."""

from __future__ import annotations

import collections
import contextlib
import faulthandler
import os
import statistics
import threading
import time
import traceback
from collections.abc import Callable, Iterator

import jax

from dsjax.config import WatchConfig
from dsjax.processes.heartbeat import Heartbeat

# sysexits' EX_TEMPFAIL: start the same command again, and it goes on.
EXIT_CODE = 75
_SECONDS_BETWEEN_LOOKS = 0.5


class Watch:
    """Watches what a run waits for, while it is entered.

    The main thread says what it begins, and how long that may take. A second thread looks twice a
    second whether that is over, and whether every process of the run is alive. Time in which the
    whole process stood still, stopped or frozen, does not count.

    Attributes:
        config: the limits.
        heartbeat: signs of life of the run's processes.
    """

    def __init__(self, config: WatchConfig, end: Callable[[str], None] | None = None):
        """Prepares to watch.

        Args:
            config: the limits.
            end: called with what went wrong; None prints it and every thread's stack, and ends the
                process with code 75.
        """
        self.heartbeat = Heartbeat()
        self.config = config
        self._end = end or self._end_process
        self._steps: collections.deque[float] = collections.deque(maxlen=50)
        self._began_step: float | None = None
        self._what, self._until = "the start", time.monotonic() + config.start_seconds
        self._limit = config.start_seconds
        self._failed = False
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, name="watch", daemon=True)

    def step(self, number: int) -> None:
        """Says that a step begins, which is compiled already."""
        now = time.monotonic()
        if self._began_step is not None:
            self._steps.append(now - self._began_step)
        self._began_step = now
        self._begin(f"step {number}", self.step_limit)

    @property
    def step_limit(self) -> float:
        """Seconds that a step may take now."""
        median = statistics.median(self._steps) if self._steps else 0.0
        return max(self.config.step_seconds, self.config.step_factor * median)

    @contextlib.contextmanager
    def waiting(self, what: str, seconds: float) -> Iterator[None]:
        """Says that something begins which is no step, and takes so long at most."""
        before, limit = self._what, self._limit
        self._began_step = None  # what a step's time would be is not known now
        self._begin(what, seconds)
        yield
        self._begin(before, limit)

    def __enter__(self) -> Watch:
        if not faulthandler.is_enabled():
            faulthandler.enable(file=2)  # where XLA itself aborts, the stacks are printed, too
        self.heartbeat.start()
        self._thread.start()
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if error is not None and self.heartbeat.is_heard:
            if isinstance(error, jax.errors.JaxRuntimeError):  # what another one's end looks like
                traceback.print_exception(error)
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            self._failed = True
            self.heartbeat.tell(state="failed", message=first_line)
            # JAX waits at the exit for the others, who may never come: go on looking.
            self._begin(f"the end, after: {first_line}", self.config.peer_seconds + 4)
            return
        self.heartbeat.stop("done")
        self._stopped.set()
        self._thread.join()

    def _begin(self, what: str, seconds: float) -> None:
        self._what, self._limit = what, seconds
        self._until = time.monotonic() + seconds

    def _look(self) -> None:
        last = time.monotonic()
        while not self._stopped.wait(_SECONDS_BETWEEN_LOOKS):
            now = time.monotonic()
            stood_still = now - last - _SECONDS_BETWEEN_LOOKS
            last = now
            if stood_still > 2:
                self._until += stood_still
                self.heartbeat.shift(stood_still)
            if self._failed and self.heartbeat.all_ended():
                return  # all are ending, and will meet at the exit
            lost = self.heartbeat.lost(self.config.peer_seconds, now)
            if not lost and not self._failed:
                lost = self.heartbeat.failed()
            if lost:
                self.heartbeat.publish(lost)
                self._end(f"{lost}; this process was at {self._what}")
                return
            if now > self._until:
                self._end(f"{self._what} took more than {self._limit:g} s")
                return

    def _end_process(self, message: str) -> None:
        name = f"process {self.heartbeat.index} ({self.heartbeat.host})"
        text = f"error: {name}: {message}; run again to go on from the last checkpoint\n"
        os.write(2, text.encode())
        faulthandler.dump_traceback(file=2)
        os._exit(EXIT_CODE)
