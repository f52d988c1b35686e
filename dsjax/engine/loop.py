"""One turn after the other: schedule, launch, take what came, choose what comes next."""

from __future__ import annotations

import contextlib
import heapq
import logging
import time
from concurrent.futures import Future
from typing import NamedTuple

import jax

from dsjax.engine.active import Active
from dsjax.engine.figures import Figures, Meter
from dsjax.engine.lanes import Lanes
from dsjax.engine.packing import Choice
from dsjax.engine.pending import Chosen, Reading
from dsjax.engine.request import Finish, compute_masks
from dsjax.engine.runner import Runner
from dsjax.engine.state import Sequence, Step
from dsjax.inference.sampler import LogProbs

_LOG = logging.getLogger(__name__)

# Failed steps one after the other, after which the loop gives up.
_MAX_FAILURES = 3


class Loop:
    """The requests under way, and the turns that move them on; of one thread at a time.

    Attributes:
        gave_up: why no turn will run any more, or None.
    """

    def __init__(self, lanes: Lanes, runner: Runner) -> None:
        self.gave_up: BaseException | None = None
        self._lanes = lanes
        self._runner = runner
        self._meter = Meter()
        self._active: dict[Sequence, Active] = {}
        self._under_way: _UnderWay | None = None
        self._num_failures = 0
        self._deadlines: list[tuple[float, int, Active]] = []
        self._num_added = 0

    @property
    def is_idle(self) -> bool:
        """Whether a turn would change nothing."""
        return self._lanes.num_unfinished == 0 and self._under_way is None

    @property
    def num_open(self) -> int:
        """Requests that have not ended."""
        return len(self._active)

    def figures(self) -> Figures:
        """Returns what has been done and is held now."""
        return self._meter.figures(self._lanes)

    def seconds_to_deadline(self) -> float | None:
        """Returns the time to the next deadline, or None without one."""
        return max(0.0, self._deadlines[0][0] - time.monotonic()) if self._deadlines else None

    def add(self, active: Active) -> None:
        """Queues a request."""
        if self.gave_up is not None:
            active.end("error", str(self.gave_up))
            return
        self._active[active.sequence] = active
        self._lanes.add(active.sequence)
        self._num_added += 1
        if active.request.deadline_seconds is not None:
            at = active.arrived + active.request.deadline_seconds
            heapq.heappush(self._deadlines, (at, self._num_added, active))

    def turn(self) -> None:
        """Launches a step and the choice after it, and takes what the one before gave.

        A grammar must know that before it says what may follow; the choice waits for it then.
        """
        self._end_late_ones()
        if self.gave_up is not None:
            return
        try:
            following, steps = None, self._lanes.next_steps()
            if steps is None:
                self._settle_step()
            else:
                reading = self._read(steps)
                first = self._has_masks(steps)
                if first:
                    self._settle_step()
                following = self._choose(steps, reading)
                if not first:
                    self._settle_step()
                reading.row.result()  # raises where it could not be launched
            self._under_way = following
            self._num_failures = 0
        except Exception as error:
            self._fail(error)
        except BaseException:  # Ctrl-C, perhaps before what was begun was launched
            self._abandon("the step was interrupted")
            raise

    def settle(self) -> None:
        """Takes what is left of the last step, so that the engine is at rest."""
        try:
            self._settle_step()
        except Exception as error:
            self._fail(error)

    def _read(self, steps: list[Step]) -> Reading:
        for sequence in (started for step in steps for started in step.started):
            active = self._active[sequence]
            if active.counts_tokens:
                assert sequence.slot is not None
                size = sequence.num_prompt
                prompt, text = sequence.tokens[:size], sequence.tokens[size:]
                self._runner.set_counts(sequence.slot, prompt, text)
        wants = {
            piece.sequence
            for step in steps
            for piece in step.pieces
            if self._active[piece.sequence].request.sampling.prompt_logprobs is not None
        }
        return self._runner.read(steps, wants)

    def _has_masks(self, steps: list[Step]) -> bool:
        """Whether a grammar has a say in what follows a step."""
        samples = (sequence for step in steps for sequence in step.samples)
        return any(self._active[sequence].request.mask is not None for sequence in samples)

    def _choose(self, steps: list[Step], reading: Reading) -> _UnderWay:
        self._meter.step(steps)
        live = [
            (reading.place(lane, index), self._active[sequence])
            for lane, step in enumerate(steps)
            for index, sequence in enumerate(step.samples)
            if sequence in self._active
        ]
        chosen = None
        masks = (one.request.mask for _, one in live if one.generation is None)
        compute_masks(mask for mask in masks if mask is not None)
        choices, live = self._choices(live)
        if live:
            sequences = [one.sequence for _, one in live]
            places = [place for place, _ in live]
            chosen = self._runner.choose(reading, sequences, choices, places)
        return _UnderWay(steps, live, chosen, reading)

    def _choices(
        self, live: list[tuple[int, Active]]
    ) -> tuple[list[Choice], list[tuple[int, Active]]]:
        """Returns how each chooses, without those whose grammar failed, which end."""
        choices, kept = [], []
        for place, active in live:
            try:
                choices.append(active.choice())
            except Exception as error:
                self._end_badly(active, error)
                continue
            kept.append((place, active))
        return choices, kept

    def _settle_step(self) -> None:
        """Waits for the tokens of the step that was launched before, and gives them out."""
        under_way, self._under_way = self._under_way, None
        if under_way is None:
            return
        self._give_prompt_logprobs(under_way.steps, under_way.reading)
        if under_way.chosen is None:
            return
        waited = time.monotonic()
        tokens_M, logprobs = under_way.chosen.result().on_host()
        now = time.monotonic()
        self._meter.waited(now - waited)
        tokens = tokens_M.tolist()
        for place, active in under_way.live:
            if active.generation is not None:
                continue  # it ended while this token was chosen
            token = tokens[place]
            if token < 0:
                self.end(active, "error", "the model's logits are NaN or infinite")
                continue
            self._lanes.read(active.sequence, token)
            self._meter.token(active, now)
            try:
                active.feed(token, logprobs, place)
            except Exception as error:  # of a callback or a grammar: this request's alone
                self._end_badly(active, error)
                continue
            if active.generation is not None:
                self._forget(active)

    def _give_prompt_logprobs(self, steps: list[Step], reading: Reading) -> None:
        logprobs: LogProbs | None = jax.device_get(reading.row.result().prompt_logprobs)
        if logprobs is None:
            return
        for lane, step in enumerate(steps):
            for index, piece in enumerate(step.pieces):
                active = self._active.get(piece.sequence)
                if active is not None:
                    active.feed_prompt(piece, logprobs, reading.prompt_place(lane, index))

    # Ends

    def _end_late_ones(self) -> None:
        now = time.monotonic()
        while self._deadlines and self._deadlines[0][0] <= now:
            self.end(heapq.heappop(self._deadlines)[2], "deadline")

    def end(self, active: Active, finish: Finish, error: str | None = None) -> None:
        """Ends a request from outside."""
        if active.generation is not None:
            return
        try:
            active.end(finish, error)
        except Exception as raised:
            self._end_badly(active, raised)
            return
        self._forget(active)

    def _end_badly(self, active: Active, raised: Exception) -> None:
        """Ends a request whose own code raised, which may do so again."""
        _LOG.warning("engine: a request was ended: %s: %s", type(raised).__name__, raised)
        if active.generation is None:
            with contextlib.suppress(Exception):
                active.end("error", f"{type(raised).__name__}: {raised}")
        self._forget(active)

    def _forget(self, active: Active) -> None:
        if self._active.pop(active.sequence, None) is not None:
            self._lanes.finish(active.sequence)
            self._meter.finished(active)

    def _fail(self, error: Exception) -> None:
        """Ends what was on the device when a step failed; the others go on, or all end loudly."""
        _LOG.error("engine: a step failed: %s: %s", type(error).__name__, error)
        self._num_failures += 1
        self._abandon(f"the device failed: {type(error).__name__}: {error}")
        if self._num_failures >= _MAX_FAILURES:
            self.give_up(error)

    def _abandon(self, text: str) -> None:
        """Ends what has begun, and begins anew with what has not."""
        self._under_way = None
        for sequence, active in list(self._active.items()):
            if sequence.slot is not None or sequence.num_pending > 0:
                self.end(active, "error", text)
        self._lanes.forget_all()
        try:
            self._runner.reset()
        except Exception as again:
            self.give_up(again)

    def give_up(self, error: BaseException) -> None:
        """Ends all requests; there will be no other."""
        if self.gave_up is None:
            self.gave_up = error
        for active in list(self._active.values()):
            self.end(active, "error", str(error))
        self._under_way = None


class _UnderWay(NamedTuple):
    """A step whose tokens the host has not seen."""

    steps: list[Step]
    live: list[tuple[int, Active]]
    chosen: Future[Chosen] | None
    reading: Reading
