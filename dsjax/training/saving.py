"""When a run saves, so that neither a slow nor a failing storage holds up its steps for long.

A save begins with a copy of the state to the host's memory, for which the steps wait. What follows
is written while they go on. Where that is not over when the next save is due, they wait for it up
to `checkpoint.max_stall_seconds`; then the new save is put off until the old one is complete. Where
a save failed, the state is saved again as it is by then.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from dsjax.config import CheckpointConfig
from dsjax.processes import Watch
from dsjax.training.checkpoints import RunCheckpoints, optimizer_to_dict
from dsjax.training.folder import gather_json
from dsjax.training.step import TrainState

Say = Callable[[str], None]


class Saver:
    """Decides when to save, the same on every process, and counts what it costs."""

    def __init__(
        self,
        checkpoints: RunCheckpoints,
        config: CheckpointConfig,
        polled_every: int,
        watch: Watch,
        say: Say,
    ):
        """Prepares to save.

        Args:
            checkpoints: where to.
            config: when to.
            polled_every: steps after which the processes ask each other how the last save ended.
            watch: is told what the steps wait for.
            say: takes a line for the user.
        """
        self._checkpoints, self._config, self._watch = checkpoints, config, watch
        self._polled_every, self._say = polled_every, say
        self._wanted = self._was_put_off = False
        self._unconfirmed: tuple[int, float] | None = None  # a step, and when its save began
        self._failures, self._not_before = 0, 0.0
        self._figures: dict[str, Any] = {}

    def is_due(self, step: int) -> bool:
        """Tells whether to save after this step; every process asks at every step.

        Raises:
            RuntimeError: more than `checkpoint.retries` saves in a row have failed.
        """
        self._wanted |= step % self._config.every == 0
        unconfirmed = self._unconfirmed is not None
        if self._wanted or (unconfirmed and step % self._polled_every == 0):
            if self._wanted and not self._was_put_off:
                self._wait_for_a_while(step)
            is_free = self._look()
            if self._wanted and self._unconfirmed is not None and not self._was_put_off:
                self._was_put_off = True
                self._say(f"step {step}: the save before is not complete; this one is put off")
            return self._wanted and is_free
        return False

    def save(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Begins a save; the steps may go on, and change the state, once this returns.

        Raises:
            RuntimeError: more than `checkpoint.retries` saves in a row have failed.
        """
        began, fault = time.monotonic(), ""
        with self._watch.waiting(f"saving step {step}", self._watch.config.save_seconds):
            try:
                optimizer = optimizer_to_dict(state)
                self._checkpoints.save(step, state.params, optimizer, data_state)
            except RuntimeError as error:
                fault = str(error)
        self._count_stall(began)
        self._wanted = self._was_put_off = False
        self._unconfirmed = (step, began)
        self._judge(_faults(fault))

    def finish(self, step: int, state: TrainState, data_state: dict[str, Any]) -> None:
        """Saves the last step, waiting for what is under way, and returns once it is complete.

        Raises:
            RuntimeError: more than `checkpoint.retries` saves in a row have failed.
        """
        limit = self._watch.config.save_seconds
        while True:
            with self._watch.waiting("the end of the last save", limit):
                self._end(_faults(self._fault()))
            if self._checkpoints.latest == step:
                return
            with self._watch.waiting("storage that failed", limit):
                time.sleep(max(0.0, self._not_before - time.monotonic()))
            gather_json({})  # all begin together
            self.save(step, state, data_state)

    def take_figures(self) -> dict[str, Any]:
        """Returns the figures since the last call: seconds that steps waited, seconds to the end.

        `save_stall_seconds` is of every save begun since; `save_seconds` of the last one that is
        complete, from its beginning, to within the steps between two looks.
        """
        figures, self._figures = self._figures, {}
        return figures

    def _wait_for_a_while(self, step: int) -> None:
        """Lets the steps wait for the save before, as long as they may."""
        began = time.monotonic()
        with self._watch.waiting(f"the save before step {step}'s", self._watch.config.save_seconds):
            while self._checkpoints.is_saving:
                if time.monotonic() - began > self._config.max_stall_seconds:
                    break
                time.sleep(0.005)
        self._count_stall(began)

    def _count_stall(self, began: float) -> None:
        stall = self._figures.get("save_stall_seconds", 0.0) + time.monotonic() - began
        self._figures["save_stall_seconds"] = round(stall, 4)

    def _look(self) -> bool:
        """Asks all processes about the last save; returns whether another may begin now."""
        busy = self._checkpoints.is_saving
        fault = "" if busy else self._fault()
        early = time.monotonic() < self._not_before
        said = gather_json({"busy": busy, "early": early, "fault": fault})
        faults = [one["fault"] for one in said if one["fault"]]
        is_busy = any(one["busy"] for one in said)
        if faults or not is_busy:
            self._end(faults)
        return not (faults or is_busy or any(one["early"] for one in said))

    def _fault(self) -> str:
        """Waits for the last save, and returns what went wrong with it; "" for nothing."""
        try:
            self._checkpoints.wait()
        except RuntimeError as error:
            return str(error)
        return ""

    def _end(self, faults: list[str]) -> None:
        """Notes how the last save ended."""
        if not faults and self._unconfirmed is not None:
            self._figures["save_seconds"] = round(time.monotonic() - self._unconfirmed[1], 4)
            self._failures = 0
        self._unconfirmed = None
        self._judge(faults)

    def _judge(self, faults: list[str]) -> None:
        """Wants a save that failed again, or gives up."""
        if not faults:
            return
        self._unconfirmed = None
        self._failures += 1
        if self._failures > self._config.retries:
            tries = f" ({self._failures} times in a row)" if self._failures > 1 else ""
            raise RuntimeError(f"{faults[0]}{tries}")
        delay = self._config.retry_seconds * 2 ** (self._failures - 1)
        self._not_before = time.monotonic() + delay
        self._wanted = True
        self._say(
            f"{faults[0]}; trying again in {delay:g} s, "
            f"retry {self._failures} of {self._config.retries}"
        )
        self._checkpoints.reopen()  # removes what the failed save left


def _faults(fault: str) -> list[str]:
    """Returns what went wrong on any process."""
    return [one["fault"] for one in gather_json({"fault": fault}) if one["fault"]]
