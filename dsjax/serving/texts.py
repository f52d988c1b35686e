"""Texts under way, from the engine's thread to the event loop.

The engine makes an event a step and text. Waking the event loop for each would take more time than
the texts do, so a step's events are handed over together, and the loop is woken once. It gives out
a few at a time, and does what else is due between: others do not wait for all texts of a step.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable, Sequence

from dsjax.engine import Engine, Generation, Request, Stream, TextPiece

Event = TextPiece | Generation

_EVENTS_A_TURN = 32


class Handover:
    """Takes events from the engine's thread, and gives them out on the event loop."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[tuple[Texts, int, Event]] = deque()
        self._is_giving = False

    def put(self, texts: Texts, index: int, event: Event) -> None:
        """Adds an event; `flush` hands it over."""
        self._events.append((texts, index, event))

    def flush(self) -> None:
        """Hands over what there is; of any thread."""
        if self._events and not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._begin_giving)

    def _begin_giving(self) -> None:
        if not self._is_giving:
            self._give()

    def _give(self) -> None:
        events = self._events
        try:
            for _ in range(min(_EVENTS_A_TURN, len(events))):
                texts, index, event = events.popleft()
                texts.take(index, event)
        finally:  # whatever one of them raises, the others get theirs
            self._is_giving = bool(events)
            if self._is_giving:
                self._loop.call_soon(self._give)


class Texts:
    """The texts of one HTTP request.

    Attributes:
        generations: what each text gave; None while it goes on.
    """

    def __init__(self, count: int, on_end: Callable[[], None]) -> None:
        self.generations: list[Generation | None] = [None] * count
        self._num_open = count
        self._on_end = on_end
        self._streams: list[Stream | None] = [None] * count
        self._pieces: list[tuple[int, Event]] = []
        self._waiter: asyncio.Future[None] | None = None
        self._failure: Exception | None = None
        self._is_cancelled = False

    def submit(self, engine: Engine, handover: Handover, requests: Sequence[Request]) -> None:
        """Gives requests to the engine; of any thread.

        Raises:
            ValueError: a request can never run.
            EngineError: the engine takes no more.
        """
        num_submitted = 0
        try:
            for index, request in enumerate(requests):
                if self._is_cancelled:
                    break

                def put(event: Event, index: int = index) -> None:
                    handover.put(self, index, event)

                stream = engine.submit(request, put)
                num_submitted += 1
                self._streams[index] = stream
                if self._is_cancelled:  # meanwhile, by another thread
                    stream.cancel()
        finally:
            # Every text ends once, those too that never began.
            for index in range(num_submitted, len(requests)):
                handover.put(self, index, Generation("", (), "cancelled"))
            handover.flush()

    def take(self, index: int, event: Event) -> None:
        """Takes an event, on the event loop."""
        if isinstance(event, Generation):
            self.generations[index] = event
            self._num_open -= 1
            self._on_end()
        self._pieces.append((index, event))
        self._wake()

    def fail(self, error: Exception) -> None:
        """Ends all texts; whoever waits for them gets the error."""
        if self._failure is None:
            self._failure = error
            self.cancel()
            self._wake()

    def cancel(self) -> None:
        """Ends the texts that go on at the next step."""
        self._is_cancelled = True
        for stream, generation in zip(self._streams, self.generations, strict=True):
            if stream is not None and generation is None:
                stream.cancel()

    async def events(self) -> AsyncIterator[list[tuple[int, Event]]]:
        """Gives all that has come since the last time, until all texts have ended.

        Pieces of one text that have come together are one.
        """
        while True:
            if self._failure is not None:
                raise self._failure
            if self._pieces:
                pieces, self._pieces = self._pieces, []
                yield pieces if len(pieces) == 1 else _joined(pieces)
            elif self._num_open == 0:
                return
            else:
                self._waiter = asyncio.get_running_loop().create_future()
                await self._waiter

    async def all(self) -> list[Generation]:
        """Waits for all texts."""
        while self._num_open and self._failure is None:
            self._pieces = []
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        if self._failure is not None:
            raise self._failure
        return [one for one in self.generations if one is not None]

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _joined(pieces: Sequence[tuple[int, Event]]) -> list[tuple[int, Event]]:
    """Returns events in which the pieces of each text are one, before its end."""
    texts: dict[int, list[TextPiece]] = {}
    ends: list[tuple[int, Event]] = []
    for index, event in pieces:
        if isinstance(event, Generation):
            ends.append((index, event))
        else:
            texts.setdefault(index, []).append(event)
    found: list[tuple[int, Event]] = []
    for index, some in texts.items():
        piece = some[0]
        if len(some) > 1:
            piece = TextPiece(
                "".join(one.text for one in some),
                tuple(token for one in some for token in one.tokens),
                tuple(logprob for one in some for logprob in one.logprobs),
            )
        found.append((index, piece))
    return found + ends
