"""What runs next: who is admitted, who decodes, whose prompt is read on, who has to wait.

No device, no clock and no text in here: a state, and functions of it. The host calls `next_step`
while the device still computes the step before, so the newest token of a sequence may exist on the
device alone; it counts, but is not known.
"""

from __future__ import annotations

import bisect
from collections.abc import Sequence as Listing

from dsjax.engine.pages import ROOT, Pages
from dsjax.engine.state import ChunkShape, Limits, Piece, Sequence, Step

# A step takes about as long as this many tokens more than it has, as weights are read for any.
_STEP_COST = 256
# Waiting sequences that are looked at for one that fits.
_LOOK_AHEAD = 32


class Scheduler:
    """The queue, those that run, and their pages."""

    def __init__(self, limits: Limits, pages: Pages, first_slot: int = 0) -> None:
        """Starts with nothing to do.

        Args:
            limits: sizes to keep to.
            pages: the pages that there are.
            first_slot: its slots are `max_batch` from this one on.
        """
        self.limits = limits
        self.pages = pages
        self.waiting: list[Sequence] = []  # by rank
        self.running: list[Sequence] = []  # by rank
        self.num_preemptions = 0
        self._slots = range(first_slot, first_slot + limits.max_batch)
        self._free_slots = list(reversed(self._slots))
        self._started: list[Sequence] = []
        self._num_arrived = 0
        self._step = 0

    @property
    def num_unfinished(self) -> int:
        """Sequences that wait or run."""
        return len(self.waiting) + len(self.running)

    def refusal(self, num_prompt: int, max_tokens: int) -> str | None:
        """Returns why a sequence can never run, or None."""
        length = num_prompt + max_tokens
        if length > self.limits.max_length:
            return (
                f"{num_prompt} tokens of prompt and max_tokens={max_tokens} exceed "
                f"max_length={self.limits.max_length}"
            )
        needed = self._pages_for(length)
        if needed > self.pages.num_pages:
            return (
                f"{num_prompt} tokens of prompt and max_tokens={max_tokens} need {needed} pages, "
                f"num_pages={self.pages.num_pages}"
            )
        return None

    def add(self, sequence: Sequence) -> None:
        """Puts a sequence into the queue."""
        left = sequence.max_tokens - (len(sequence.tokens) - sequence.num_prompt)
        assert self.refusal(len(sequence.tokens), left) is None
        # Who waits moves up against all who come later, all alike: so ranks never change.
        urgency = sequence.priority * self.limits.ageing + self._step
        sequence.rank = (urgency, self._num_arrived)
        self._num_arrived += 1
        self._enqueue(sequence)

    def num_shareable(self, sequence: Sequence) -> int:
        """Returns the tokens of a waiting sequence's beginning that pages hold already."""
        return len(self._shared_pages(sequence)[0]) * self.pages.page_size

    def next_step(self, chunk: ChunkShape | None = None) -> Step | None:
        """Decides the next step and takes it as begun; None where nothing can run.

        After None, tokens that are pending have to be read first, if there are any.

        Args:
            chunk: the room for pieces of prompts; None chooses it.
        """
        self._step += 1
        decoding = self._growing()
        self._admit()
        chunk, pieces = self._choose_pieces(bool(decoding), chunk)
        # Growing may have cost a sequence its pages after it was chosen.
        decoding = [sequence for sequence in decoding if sequence.slot is not None]
        if not decoding and not pieces:
            return None
        return self._begin(decoding, pieces, chunk)

    def read(self, sequence: Sequence, token: int) -> None:
        """Makes the oldest pending token of a sequence known."""
        assert sequence.num_pending > 0
        sequence.num_pending -= 1
        sequence.tokens.append(token)
        if sequence.slot is not None:
            self._remember(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Ends a sequence, running or waiting; its pages and its slot are free."""
        if sequence.is_finished:
            return
        sequence.is_finished = True
        if sequence.slot is not None:
            self._stop(sequence)
        else:
            self.waiting.remove(sequence)

    # Running sequences

    def _growing(self) -> list[Sequence]:
        """Returns the sequences that decode, each with a page for its newest token."""
        grown = []
        for sequence in list(self.running):
            if sequence.slot is None or not sequence.decodes or not sequence.wants_more:
                continue
            while not self._grow(sequence, sequence.num_cached + 1):
                victim = self._last_running()
                if victim is None or victim.rank < sequence.rank:
                    break
                self._preempt(victim)
                if victim is sequence:
                    break
            else:
                grown.append(sequence)
        return grown

    def _last_running(self) -> Sequence | None:
        """Returns the last in rank of those that have more to do."""
        return next((s for s in reversed(self.running) if s.wants_more), None)

    def _grow(self, sequence: Sequence, length: int) -> bool:
        """Gives a sequence pages for its first `length` tokens; False where there are too few."""
        while len(sequence.pages) * self.pages.page_size < length:
            page = self.pages.take()
            if page is None:
                return False
            sequence.pages.append(page)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Takes a sequence's pages away; it goes on later, from its tokens."""
        self._stop(sequence)
        sequence.num_preemptions += 1
        self.num_preemptions += 1
        self._enqueue(sequence)

    def _stop(self, sequence: Sequence) -> None:
        assert sequence.slot is not None
        self.running.remove(sequence)
        if sequence in self._started:
            self._started.remove(sequence)
        self._free_slots.append(sequence.slot)
        self.pages.release(sequence.pages)
        sequence.pages = []
        sequence.slot = None
        sequence.on_device = False
        sequence.num_cached = sequence.num_remembered = sequence.num_tabled = 0
        sequence.prefix = ROOT

    # The queue

    def _enqueue(self, sequence: Sequence) -> None:
        sequence.waiting_since = self._step
        bisect.insort(self.waiting, sequence, key=lambda s: s.rank)

    def _admit(self) -> None:
        """Lets waiting sequences run, in rank, as far as there are slots and pages.

        One that does not fit lets later ones past for a while, then holds them all back until
        enough pages are free. So nothing waits for ever, short or long. The first may take the
        place of less urgent ones.
        """
        self._make_room()
        if not self.waiting or not self._free_slots:
            return
        owed = self._owed(self.running)
        index = 0
        while index < min(len(self.waiting), _LOOK_AHEAD) and self._free_slots:
            sequence = self.waiting[index]
            if sequence.num_pending > 0:  # it was preempted, and its newest token is not known yet
                index += 1
                continue
            found, prefix = self._shared_pages(sequence)
            if self.running and self._num_missing(sequence, found, owed) > 0:
                if self._step - sequence.waiting_since > self.limits.patience:
                    return
                index += 1
                continue
            del self.waiting[index]
            self._start(sequence, found, prefix)
            owed += self._pages_for(sequence.length + 1) - len(found)

    def _make_room(self) -> None:
        """Preempts less urgent sequences, the last first, if the first in the queue runs then.

        Nothing is taken of one that came so early that it ranks before the first.
        """
        first = next((s for s in self.waiting[:_LOOK_AHEAD] if s.num_pending == 0), None)
        if first is None:
            return
        yielding: list[Sequence] = []
        kept: list[Sequence] = []
        for s in self.running:
            yields = s.priority > first.priority and s.rank > first.rank and s.wants_more
            (yielding if yields else kept).append(s)
        if not yielding:
            return
        found, _ = self._shared_pages(first)
        held = {page for s in yielding for page in s.pages}
        gained = sum(self.pages.holders(page) == 1 for page in held.difference(found))
        if kept and self._num_missing(first, found, self._owed(kept)) > gained:
            return
        while yielding and not (
            self._free_slots and self._num_missing(first, found, self._owed(self.running)) <= 0
        ):
            self._preempt(yielding.pop())

    def _owed(self, running: Listing[Sequence]) -> int:
        """Returns the pages that these still need, for the tokens they have and one more each."""
        return sum(self._pages_for(s.length + 1) - len(s.pages) for s in running)

    def _num_missing(self, sequence: Sequence, found: Listing[int], owed: int) -> int:
        """Returns how many pages too few there are for a sequence that shares those found."""
        idle = sum(self.pages.holders(page) == 0 for page in found)
        needed = self._pages_for(sequence.length + 1) - len(found)
        return needed + idle + owed - self.pages.num_available

    def _shared_pages(self, sequence: Sequence) -> tuple[list[int], int]:
        """Returns the pages that hold a sequence's beginning, and the prefix that they end.

        One token at least is left to be read, as the next one is chosen from it.
        """
        size, prefix = self.pages.page_size, sequence.prefix
        found: list[int] = []
        if not sequence.shares:
            return found, prefix
        for start in range(sequence.num_cached, len(sequence.tokens) - size, size):
            page = self.pages.find(prefix, sequence.tokens[start : start + size])
            if page is None:
                break
            found.append(page)
            prefix = self.pages.prefix_of(page)
        return found, prefix

    def _share(self, sequence: Sequence, found: Listing[int], prefix: int) -> None:
        """Lets a sequence go on after pages that hold what it would read next."""
        for page in found:
            self.pages.hold(page)
        sequence.pages += found
        sequence.prefix = prefix
        sequence.num_remembered += len(found)
        sequence.num_cached += len(found) * self.pages.page_size
        sequence.num_shared += len(found) * self.pages.page_size

    def _start(self, sequence: Sequence, found: Listing[int], prefix: int) -> None:
        sequence.slot = self._free_slots.pop()
        bisect.insort(self.running, sequence, key=lambda s: s.rank)
        self._started.append(sequence)
        self._share(sequence, found, prefix)

    # Pieces of prompts

    def _choose_pieces(
        self, others_run: bool, chunk: ChunkShape | None
    ) -> tuple[ChunkShape | None, list[Piece]]:
        """Chooses whose prompts are read on, and how far."""
        reading = [s for s in self.running if not s.decodes and s.wants_more]
        while reading:
            for sequence in reading:
                # Another sequence may have read the same meanwhile.
                on_border = sequence.num_cached == len(sequence.pages) * self.pages.page_size
                if on_border and sequence.num_remembered == len(sequence.pages):
                    self._share(sequence, *self._shared_pages(sequence))
            ready = self._without_repeats(reading)
            left = [s.length - s.num_cached for s in ready]
            shape = chunk or self._best_chunk(left)
            pieces = []
            for sequence, count in zip(ready[: shape.num_sequences], left, strict=False):
                count = min(count, shape.num_tokens)
                if self._grow(sequence, sequence.num_cached + count):
                    pieces.append(Piece(sequence, sequence.num_cached, count))
            if pieces:
                return shape, pieces
            if others_run or len(self.running) == 1:
                break
            # Nothing moves: the last gives its pages to the others.
            victim = self._last_running()
            assert victim is not None
            self._preempt(victim)
            reading = [sequence for sequence in reading if sequence is not victim]
        return None, []

    def _without_repeats(self, reading: Listing[Sequence]) -> list[Sequence]:
        """Leaves out who would read the same page as one before it, which it can share later."""
        size = self.pages.page_size
        ready, keys = [], set()
        for sequence in reading:
            start = sequence.num_cached
            ends = len(sequence.tokens) - start <= size
            if sequence.shares and self.pages.remembers and start % size == 0 and not ends:
                key = (sequence.prefix, tuple(sequence.tokens[start : start + size]))
                if key in keys:
                    continue
                keys.add(key)
            ready.append(sequence)
        return ready

    def _best_chunk(self, left: Listing[int]) -> ChunkShape:
        """Returns the shape that reads most tokens for its cost."""

        def worth(shape: ChunkShape) -> float:
            taken = sum(min(count, shape.num_tokens) for count in left[: shape.num_sequences])
            return taken / (shape.row_tokens + _STEP_COST)

        return max(self.limits.chunks, key=worth)

    # What a step changes

    def _begin(
        self, decoding: list[Sequence], pieces: list[Piece], chunk: ChunkShape | None
    ) -> Step:
        samples = list(decoding)
        for sequence in decoding:
            sequence.num_cached += 1
        for piece in pieces:
            sequence = piece.sequence
            sequence.num_cached += piece.num_tokens
            if sequence.num_cached == sequence.length:
                samples.append(sequence)
        new_pages: list[tuple[int, int, int]] = []
        for sequence in decoding + [piece.sequence for piece in pieces]:
            if sequence.num_tabled < len(sequence.pages):
                assert sequence.slot is not None
                for column in range(sequence.num_tabled, len(sequence.pages)):
                    new_pages.append((sequence.slot, column, sequence.pages[column]))
                sequence.num_tabled = len(sequence.pages)
            self._remember(sequence)
        for sequence in samples:
            sequence.num_pending += 1
            sequence.on_device = True
        started, self._started = self._started, []
        return Step(decoding, pieces, chunk, new_pages, samples, started)

    def _remember(self, sequence: Sequence) -> None:
        """Lets pages be found that are full, or will be after the steps under way."""
        size = self.pages.page_size
        full = min(sequence.num_cached, len(sequence.tokens)) // size
        while sequence.num_remembered < full:
            index = sequence.num_remembered
            tokens = sequence.tokens[index * size : (index + 1) * size]
            sequence.prefix = self.pages.remember(sequence.pages[index], sequence.prefix, tokens)
            sequence.num_remembered += 1

    def _pages_for(self, length: int) -> int:
        return -(-length // self.pages.page_size)

    def check(self) -> None:
        """Asserts what always holds: pages are conserved, slots are held once."""
        self.pages.check()
        slots = [s.slot for s in self.running if s.slot is not None]
        assert len(slots) == len(self.running)
        assert sorted(slots + self._free_slots) == list(self._slots)
        held: dict[int, int] = {}
        for sequence in self.running:
            for page in sequence.pages:
                held[page] = held.get(page, 0) + 1
            assert sequence.num_cached <= len(sequence.pages) * self.pages.page_size
        for page in range(self.pages.num_pages):
            assert self.pages.holders(page) == held.get(page, 0)
        assert all(not s.pages and s.slot is None for s in self.waiting)
        for listed in (self.waiting, self.running):
            assert [s.rank for s in listed] == sorted(s.rank for s in listed)
