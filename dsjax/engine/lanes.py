"""Devices that have pages of their own, each with its own queue, and their steps side by side."""

from __future__ import annotations

from collections.abc import Sequence as Listing

from dsjax.engine.scheduler import Scheduler
from dsjax.engine.state import Sequence, Step


class Lanes:
    """Schedulers that share the device's steps: each has sequences, slots and pages of its own.

    One lane is the usual engine. With more, a sequence stays in the lane that it is given to when
    it arrives, as its latents cannot be read elsewhere.

    Attributes:
        schedulers: of each lane.
    """

    def __init__(self, schedulers: Listing[Scheduler]) -> None:
        self.schedulers = tuple(schedulers)
        self._load = [0] * len(self.schedulers)
        self._turn = 0

    @property
    def num_unfinished(self) -> int:
        """Sequences that wait or run."""
        return sum(lane.num_unfinished for lane in self.schedulers)

    def refusal(self, num_prompt: int, max_tokens: int) -> str | None:
        """Returns why a sequence can never run, or None."""
        return self.schedulers[0].refusal(num_prompt, max_tokens)

    def add(self, sequence: Sequence) -> None:
        """Gives a sequence to the lane that has least to do, what it holds of it already apart."""

        def work(index: int) -> int:
            return self._load[index] - self.schedulers[index].num_shareable(sequence)

        # Lanes that are level take turns.
        count = len(self.schedulers)
        order = [(self._turn + index) % count for index in range(count)]
        sequence.lane = min(order, key=work)
        self._turn += 1
        self._load[sequence.lane] += _tokens(sequence)
        self.schedulers[sequence.lane].add(sequence)

    def next_steps(self) -> list[Step] | None:
        """Decides the next step of every lane; None where nothing can run.

        All have one shape of chunk: that of the first that has prompts to read, and lanes take
        turns to be the first.
        """
        count, chunk = len(self.schedulers), None
        steps: list[Step | None] = [None] * count
        self._turn += 1
        for offset in range(count):
            index = (self._turn + offset) % count
            step = steps[index] = self.schedulers[index].next_step(chunk)
            if step is not None:
                chunk = chunk or step.chunk
        if all(step is None for step in steps):
            return None
        return [step or Step([], [], None, [], [], []) for step in steps]

    def read(self, sequence: Sequence, token: int) -> None:
        """Makes the oldest pending token of a sequence known."""
        self.schedulers[sequence.lane].read(sequence, token)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, running or waiting; its pages and its slot are free."""
        if not sequence.is_finished:
            self._load[sequence.lane] -= _tokens(sequence)
        self.schedulers[sequence.lane].finish(sequence)

    def forget_all(self) -> None:
        """Forgets what pages hold, as after a change of weights."""
        for lane in self.schedulers:
            lane.pages.forget_all()


def _tokens(sequence: Sequence) -> int:
    return sequence.num_prompt + sequence.max_tokens
