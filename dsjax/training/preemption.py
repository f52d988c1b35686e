"""Notice of the end: a SIGTERM that every process acts on at the same step."""

from __future__ import annotations

import signal
from types import FrameType

import jax
from jax.experimental import multihost_utils


class Preemption:
    """Watches for SIGTERM, and SIGINT on one process, while it is entered.

    Several processes agree on the step through JAX's coordination service, which installs its own
    handler; one process has nobody to agree with.
    """

    def __init__(self) -> None:
        self._alone = jax.process_count() == 1
        self._noticed = False
        self._previous: dict[int, object] = {}

    def should_stop(self, step: int) -> bool:
        """Tells whether to save and stop after this step; the same on every process."""
        if self._alone:
            return self._noticed
        return bool(multihost_utils.reached_preemption_sync_point(step))

    def __enter__(self) -> Preemption:
        if self._alone:
            for number in (signal.SIGTERM, signal.SIGINT):
                try:
                    self._previous[number] = signal.signal(number, self._notice)
                except ValueError:  # signals belong to the main thread; a notebook's may be another
                    break
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _notice(self, number: int, frame: FrameType | None) -> None:
        if self._noticed and number == signal.SIGINT:
            raise KeyboardInterrupt  # the second Ctrl-C means now
        self._noticed = True
