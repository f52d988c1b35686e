"""Many requests over one pool: the loop that schedules while the device runs."""

from __future__ import annotations

import atexit
import logging
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from flax import nnx

from dsjax.config import EngineConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.engine.active import Active
from dsjax.engine.figures import Figures
from dsjax.engine.lanes import Lanes
from dsjax.engine.loop import Loop
from dsjax.engine.pages import Pages
from dsjax.engine.request import Event, Generation, Request, Stream, fault_of_prompt
from dsjax.engine.runner import Runner
from dsjax.engine.scheduler import Scheduler
from dsjax.engine.sizes import max_length, num_lanes, num_pages, page_tokens
from dsjax.engine.state import ChunkShape, Limits
from dsjax.model import DeepSeekV2

_LOG = logging.getLogger(__name__)

# Those whose thread runs. They are closed before the process ends, under which no step can run.
_running: weakref.WeakSet[Engine] = weakref.WeakSet()


def _close_all() -> None:
    for engine in list(_running):
        engine.close()


def _close_at_exit(engine: Engine) -> None:
    """Closes it when the process ends, before all else that is registered for then by now.

    What is registered last runs first. JAX keeps the constants of what it traces by
    `weakref.finalize`, which forgets them at exit: a step that is traced then reads what is gone.
    """
    _running.add(engine)
    atexit.unregister(_close_all)
    atexit.register(_close_all)


class EngineError(RuntimeError):
    """The engine has given up or was closed."""


class Engine:
    """Continuous batching over a paged pool of latents.

    A step reads one token of every sequence that decodes, and pieces of prompts beside them. While
    the device reads, the host takes the tokens of the step before, makes text of them and decides
    what comes after; so a sequence that ends is read once too often, and what that gave is thrown
    away.

    Where a mesh has axes that divide a batch (`mesh.BATCH_AXES`), its devices have sequences and
    pages of their own along these, and the experts are spread as the model has them. Where it has
    an axis that divides heads (`tensor`), its devices divide the tokens of every page too.

    `generate` runs in the caller's thread until its requests are done. `submit` starts a thread
    that runs until `close`.
    """

    def __init__(
        self,
        model: DeepSeekV2,
        tokenizer: Tokenizer,
        config: EngineConfig | None = None,
        *,
        end_ids: Iterable[int] | None = None,
    ) -> None:
        """Allocates the pool and, unless told not to, compiles all programs.

        Args:
            model: the model; its weights are shared, not copied.
            tokenizer: makes text of tokens.
            config: sizes.
            end_ids: tokens that end a text; None takes the tokenizer's EOS.

        Raises:
            ValueError: the sizes do not fit the model or the device; says what to lower.
        """
        config = config or EngineConfig()
        length = max_length(model, config)
        known_W = np.zeros(model.config.vocab_size, bool)
        known = tokenizer.known_ids[: known_W.size]
        known_W[: known.size] = known
        self.config = config
        self.tokenizer = tokenizer
        self.vocab_size = model.config.vocab_size
        self.end_ids = frozenset((tokenizer.eos_id,) if end_ids is None else end_ids)
        pages = num_pages(model, config)
        lanes, page_size = num_lanes(model), page_tokens(model, config)
        limits = Limits(
            -(-config.max_batch // lanes),
            min(length, pages * page_size),
            tuple(ChunkShape(*shape) for shape in config.chunk_shapes()),
        )
        self.max_length = limits.max_length  # tokens of a prompt and its text at most
        self._runner = Runner(model, config, limits, pages, known_W)
        self._lanes = Lanes(
            [
                Scheduler(
                    limits,
                    Pages(pages, page_size, remembers=config.share_prefixes),
                    first_slot=lane * limits.max_batch,
                )
                for lane in range(lanes)
            ]
        )
        self._loop = Loop(self._lanes, self._runner)
        # Held by the thread that runs a turn; other threads leave it messages.
        self._turn = threading.Lock()
        self._inbox: deque[Callable[[], None]] = deque()
        self._arrived = threading.Condition()
        self._thread: threading.Thread | None = None
        # Called by the engine's thread after each turn, when the events of all requests are out: a
        # server wakes once for all of them.
        self.after_turn: Callable[[], None] | None = None
        begun = time.monotonic()
        self._runner.reset()
        if config.warm_up:
            self._runner.warm_up()
            _LOG.info("engine: programs ready after %.1f s", time.monotonic() - begun)

    # What callers use

    def generate(
        self,
        requests: Sequence[Request],
        on_event: Callable[[int, Event], None] | None = None,
    ) -> list[Generation]:
        """Answers requests and returns what each gave, in their order.

        Args:
            requests: the requests.
            on_event: called with a request's index and each event of it. An exception that it
                raises ends all of them and is raised here.

        Raises:
            ValueError: a request can never run; names its index.
            EngineError: the engine has given up or was closed.
        """
        for index, request in enumerate(requests):
            if (refusal := self.refusal(request)) is not None:
                raise ValueError(f"prompt {index}: {refusal}")
        if self._thread is not None:
            streams = [self.submit(request) for request in requests]
            return self._drain(streams, on_event)
        found: list[Generation | None] = [None] * len(requests)

        def take(index: int, event: Event) -> None:
            if isinstance(event, Generation):
                found[index] = event
            if on_event is not None:
                on_event(index, event)

        raised: list[BaseException] = []

        def guarded(index: int) -> Callable[[Event], None]:
            def run(event: Event) -> None:
                try:
                    take(index, event)
                except BaseException as error:  # raised below, when the engine is at rest
                    raised.append(error)

            return run

        started = [self._begin(request, guarded(index)) for index, request in enumerate(requests)]
        try:
            while any(one.generation is None for one in started):
                with self._turn:
                    self._run_turn()
                if raised:
                    raise raised[0]
        finally:
            with self._turn:
                self._take_inbox()
                for one in started:
                    self._loop.end(one, "cancelled")
                self._loop.settle()
        return [one for one in found if one is not None]

    def submit(self, request: Request, on_event: Callable[[Event], None] | None = None) -> Stream:
        """Queues a request and returns at once; a thread of the engine answers it.

        Args:
            request: the request.
            on_event: called in the engine's thread with each event, which the stream then does
                not give. It must return at once; what it raises ends the request. See `after_turn`.

        Raises:
            ValueError: the request can never run, with the number that it exceeds.
            EngineError: `max_waiting` requests are open, or the engine has given up or was closed.
        """
        if (refusal := self.refusal(request)) is not None:
            raise ValueError(refusal)
        stream = Stream(lambda: self._leave(lambda: self._loop.end(active, "cancelled")))
        active = self._begin(request, on_event or stream.put)
        self.start()
        return stream

    def refusal(self, request: Request) -> str | None:
        """Returns why a request can never run, or None."""
        if (fault := fault_of_prompt(request.prompt, self.vocab_size)) is not None:
            return fault
        sampling = request.sampling
        for name, ids in (
            ("logit_bias", sampling.logit_bias),
            ("allowed_tokens", sampling.allowed_tokens or ()),
        ):
            if ids and max(ids) >= self.vocab_size:
                return f"{name}: token {max(ids)} is outside model.vocab_size={self.vocab_size}"
        if sampling.prompt_logprobs is not None and not self.config.prompt_logprobs:
            return "prompt_logprobs: the engine was made without them"
        return self._lanes.refusal(len(request.prompt), sampling.max_tokens)

    def update_weights(self, weights: nnx.State | DeepSeekV2) -> None:
        """Goes on with other weights; nothing is compiled, and no prefix is shared across.

        Requests under way go on with what the old weights have read of them.

        Args:
            weights: of the same shapes, types and layout: a model or its state.

        Raises:
            ValueError: names the first that differs.
        """
        state = nnx.state(weights) if isinstance(weights, DeepSeekV2) else weights
        with self._turn:
            self._runner.update_weights(state)
            self._lanes.forget_all()

    def figures(self) -> Figures:
        """Returns what the engine has done and holds now."""
        return self._loop.figures()

    @property
    def gave_up(self) -> BaseException | None:
        """Why no request will be answered any more, or None."""
        return self._loop.gave_up

    def start(self) -> None:
        """Starts the thread that answers requests, where none runs."""
        with self._arrived:
            if self._thread is None:
                self._thread = threading.Thread(target=self._serve, name="engine", daemon=True)
                self._thread.start()
                _close_at_exit(self)

    def close(self) -> None:
        """Ends what is under way and frees the pool."""
        _running.discard(self)
        self._leave(lambda: self._loop.give_up(EngineError("the engine is closed")))
        with self._arrived:
            self._arrived.notify_all()
            thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        with self._turn:
            self._take_inbox()
            self._runner.close()

    def __enter__(self) -> Engine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # Arrivals

    def _begin(self, request: Request, on_event: Callable[[Event], None]) -> Active:
        gave_up = self._loop.gave_up
        if gave_up is not None:
            raise EngineError(str(gave_up)) from gave_up
        num_open = self._loop.num_open + len(self._inbox)
        if num_open >= self.config.max_waiting + self.config.max_batch:
            raise EngineError(f"{num_open} requests are open: try again later")
        active = Active(request, self.tokenizer, self.end_ids, self.vocab_size, on_event)
        self._leave(lambda: self._loop.add(active))
        return active

    def _leave(self, message: Callable[[], None]) -> None:
        with self._arrived:
            self._inbox.append(message)
            self._arrived.notify()

    def _take_inbox(self) -> None:
        while self._inbox:
            self._inbox.popleft()()

    @staticmethod
    def _drain(
        streams: Sequence[Stream], on_event: Callable[[int, Event], None] | None
    ) -> list[Generation]:
        found = []
        try:
            for index, stream in enumerate(streams):
                for piece in stream:
                    if on_event is not None:
                        on_event(index, piece)
                found.append(stream.result())
                if on_event is not None:
                    on_event(index, found[-1])
        finally:
            for stream in streams[len(found) :]:
                stream.cancel()
        return found

    # Turns

    def _run_turn(self) -> None:
        self._take_inbox()
        self._loop.turn()

    def _serve(self) -> None:
        """Runs turns for as long as there is something to do, and waits for more."""
        while True:
            with self._turn:
                self._run_turn()
            if self.after_turn is not None:
                self.after_turn()
            with self._arrived:
                while not self._inbox and self._loop.is_idle and self._loop.gave_up is None:
                    self._arrived.wait(self._loop.seconds_to_deadline())
                if self._loop.gave_up is not None and not self._inbox:
                    return
