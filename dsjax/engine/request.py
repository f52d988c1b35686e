"""What is asked of the engine, and what comes back."""

from __future__ import annotations

import asyncio
import queue
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, NamedTuple, Protocol

import numpy as np

from dsjax.inference.sampling import Sampling

Finish = Literal["stop", "length", "error", "cancelled", "deadline"]


class TokenMask(Protocol):
    """Says which tokens may come next, as a grammar does."""

    def allowed(self) -> np.ndarray | None:
        """Returns uint32 bits of the tokens allowed now, the lowest first; None allows all."""

    def advance(self, token: int) -> None:
        """Takes the token that was chosen."""


class MaskBatch(Protocol):
    """Computes masks of many requests at once, as a grammar library does with its own threads.

    A `TokenMask` that has one names it in its attribute `batch`.
    """

    def compute(self, masks: Sequence[TokenMask]) -> None:
        """Readies what `allowed` of each returns next; raises for none of them alone."""


def compute_masks(masks: Iterable[TokenMask]) -> None:
    """Readies the masks of a step, those of one `MaskBatch` together."""
    batches: dict[MaskBatch, list[TokenMask]] = {}
    for mask in masks:
        batch: MaskBatch | None = getattr(mask, "batch", None)
        if batch is not None:
            batches.setdefault(batch, []).append(mask)
    for batch, of_batch in batches.items():
        batch.compute(of_batch)


@dataclass(frozen=True)
class Request:
    """One text to be made.

    Attributes:
        prompt: token ids, BOS included.
        sampling: how it is made.
        sample: its number among several of one prompt and seed, which get other noise.
        priority: the lower, the sooner; those that wait long move up. One takes the place of less
            urgent ones that run where there is no other; these go on later.
        deadline_seconds: it is ended so long after it was submitted; None lets it run.
        mask: which tokens may come; of this request alone, as it has a state.
    """

    prompt: tuple[int, ...]
    sampling: Sampling = field(default_factory=Sampling)
    sample: int = 0
    priority: int = 0
    deadline_seconds: float | None = None
    mask: TokenMask | None = None


@dataclass(frozen=True)
class TokenLogProb:
    """A token's log-probability, and those of the best tokens in its place, the best first."""

    token: int
    logprob: float
    best: tuple[tuple[int, float], ...] = ()


@dataclass(frozen=True)
class Generation:
    """What one prompt gave.

    Attributes:
        text: the generated text, without end token and stop string.
        tokens: the generated ids, the end token included.
        finish: "stop" at an end token or stop string, "length", "cancelled", "deadline", or
            "error" where the logits were NaN or infinite or the device failed.
        error: what went wrong.
        logprobs: of each token, where asked for.
        prompt_logprobs: of each token of the prompt after the first, where asked for.
        num_shared: tokens of the prompt that the pool held already.
    """

    text: str
    tokens: tuple[int, ...]
    finish: Finish
    error: str | None = None
    logprobs: tuple[TokenLogProb, ...] | None = None
    prompt_logprobs: tuple[TokenLogProb, ...] | None = None
    num_shared: int = field(default=0, compare=False)


class TextPiece(NamedTuple):
    """What one more token made certain.

    Attributes:
        text: may be empty, where a character or a possible stop string is not complete.
        tokens: ids since the piece before.
        logprobs: of these, where asked for.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogProb, ...] = ()


Event = TextPiece | Generation


class Stream:
    """A request that is under way: its pieces as they come, and what it gave.

    Iterate it once, by `for` or by `async for`; `result` waits for the end.
    """

    def __init__(self, cancel: Callable[[], None]) -> None:
        self._cancel = cancel
        self._events: queue.SimpleQueue[Event] = queue.SimpleQueue()
        self._generation: Generation | None = None
        self._wake: Callable[[], None] | None = None

    def cancel(self) -> None:
        """Ends the request at the next step; what it has is its result."""
        self._cancel()

    def put(self, event: Event) -> None:
        """Adds an event, from the engine's thread."""
        self._events.put(event)
        wake = self._wake
        if wake is not None:
            wake()

    def __iter__(self) -> Iterator[TextPiece]:
        while (event := self._next()) is not None:
            yield event

    async def __aiter__(self) -> AsyncIterator[TextPiece]:
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()

        def wake() -> None:
            loop.call_soon_threadsafe(arrived.set)

        self._wake = wake
        try:
            while self._generation is None:
                arrived.clear()
                while not self._events.empty():
                    event = self._next()
                    if event is None:
                        return
                    yield event
                await arrived.wait()
        finally:
            self._wake = None

    def result(self, timeout: float | None = None) -> Generation:
        """Waits for the end.

        Raises:
            TimeoutError: it did not come in `timeout` seconds.
        """
        try:
            while self._next(timeout) is not None:
                pass
        except queue.Empty:
            raise TimeoutError(f"no result after {timeout} seconds") from None
        assert self._generation is not None
        return self._generation

    def _next(self, timeout: float | None = None) -> TextPiece | None:
        if self._generation is not None:
            return None
        event = self._events.get(timeout=timeout)
        if isinstance(event, Generation):
            self._generation = event
            return None
        return event


def samples(request: Request, count: int) -> list[Request]:
    """Returns requests for several texts of one prompt."""
    return [replace(request, sample=request.sample + index) for index in range(count)]


def fault_of_prompt(prompt: Sequence[int], vocab_size: int) -> str | None:
    """Returns what is wrong with a prompt's ids, or None."""
    if len(prompt) == 0:
        return "is empty"
    for token in prompt:
        if not 0 <= token < vocab_size:
            return f"token {token} is outside model.vocab_size={vocab_size}"
    return None
