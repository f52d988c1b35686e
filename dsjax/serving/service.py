"""What all routes share: the engine, the limits, and who is being answered."""

from __future__ import annotations

import asyncio
import random
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from dsjax.config import ServeConfig
from dsjax.data.generation_defaults import GenerationDefaults
from dsjax.engine import Engine, EngineError, Generation, Request
from dsjax.serving.conversations import Conversations
from dsjax.serving.errors import RequestError, bad_field, refused
from dsjax.serving.texts import Handover, Texts
from dsjax.serving.usage import Record

T = TypeVar("T")

# Prompts are made of text beside the event loop, by so many threads.
_THREADS = 4
_SHORT = 1000


class Service:
    """An engine, as the routes use it.

    Attributes:
        engine: the engine.
        config: the server's limits.
        defaults: how text is made where a client does not say.
        max_length: tokens of prompt and text together.
        created: when the server started, in seconds since 1970.
        conversations: makes prompts of messages.
        is_draining: whether the server is about to end.
        num_open: texts that are made or wait.
        held_bytes: of the bodies of requests under way.
        long_bodies: held while a long body is parsed.
    """

    def __init__(self, engine: Engine, config: ServeConfig, defaults: GenerationDefaults) -> None:
        self.engine = engine
        self.tokenizer = engine.tokenizer
        self.config = config
        self.defaults = defaults
        self.max_length = engine.max_length
        self.created = int(time.time())
        self.conversations = Conversations(
            engine.tokenizer, engine.vocab_size, end_ids=engine.end_ids
        )
        self.is_draining = False
        self.num_open = 0
        self.held_bytes = 0
        self.long_bodies = asyncio.Lock()
        self._open: set[Texts] = set()
        self._threads = ThreadPoolExecutor(_THREADS, "prompt")
        self._handover: Handover | None = None
        longest = max(len(engine.tokenizer.bytes_of(i)) for i in range(engine.tokenizer.vocab_size))
        self._most_bytes = self.max_length * max(1, longest)

    def start(self) -> None:
        """Begins to take events of the engine, on the running event loop."""
        self._handover = Handover(asyncio.get_running_loop())
        self.engine.after_turn = self._handover.flush
        self.engine.start()

    def stop(self) -> None:
        """Ends all texts."""
        self.is_draining = True
        self.end_all("the server is shutting down")
        self._threads.shutdown(wait=False, cancel_futures=True)
        self.engine.after_turn = None

    def end_all(self, reason: str) -> None:
        """Ends all texts under way with an error."""
        for texts in list(self._open):
            texts.fail(RequestError(503, reason))

    async def beside(self, function: Callable[..., T], *arguments: Any) -> T:
        """Runs what takes long in a thread; a ValueError is a refusal."""
        loop = asyncio.get_running_loop()
        try:
            return await loop.run_in_executor(self._threads, function, *arguments)
        except ValueError as error:
            raise refused(error) from None

    def check_model(self, name: str | None) -> str:
        """Returns the name that stands in the answer; refuses one that is not served."""
        names = self.config.model_names
        if name is None:
            return names[0]
        if name not in names:
            raise RequestError(
                404, f"the model {name!r} is not served", param="model", code="model_not_found"
            )
        return name

    def check_size(self, param: str, text: str) -> None:
        """Refuses a text that is too long, whatever its tokens are."""
        if len(text) > self._most_bytes:
            raise too_long(param, f"{len(text)} characters", self.max_length)

    def check_messages(self, messages: Sequence[Mapping[str, Any]]) -> None:
        """Refuses messages whose texts are too long together, before they are rendered."""
        size = 0
        for index, message in enumerate(messages):
            content = message.get("content")
            # What is no text is refused where the messages are read.
            parts = content if isinstance(content, list) else [{"text": content}]
            texts = (part.get("text") for part in parts if isinstance(part, dict))
            size += sum(len(text) for text in texts if isinstance(text, str))
            if size > self._most_bytes:
                field = f"messages[{index}].content"
                raise too_long(field, f"{size} characters or more", self.max_length)

    def ids_of(self, spellings: Sequence[str]) -> tuple[int, ...] | None:
        """Returns the ids of special tokens; None where one is missing."""
        wanted = {spelling.encode(): spelling for spelling in spellings}
        found = {
            wanted[data]: token
            for token in range(self.tokenizer.vocab_size)
            if (data := self.tokenizer.bytes_of(token)) in wanted
        }
        return tuple(found[one] for one in spellings) if len(found) == len(wanted) else None

    def seed(self, seed: int | None) -> int:
        """Returns the seed of the draws; another one each time where none is given."""
        return random.getrandbits(32) if seed is None else seed % 2**32

    def check_room(self, param: str, num_prompt: int, max_tokens: int) -> None:
        """Refuses what the context has no room for."""
        if num_prompt + max_tokens > self.max_length:
            asked = f"{num_prompt} tokens and {max_tokens} to be generated"
            raise too_long(param, asked, self.max_length)

    @asynccontextmanager
    async def run(self, requests: Sequence[Request]) -> AsyncIterator[Texts]:
        """Gives requests to the engine; what is still under way at the end is cancelled.

        Raises:
            RequestError: the server is full or about to end, or a request can never run.
        """
        self._admit(len(requests))
        texts = Texts(len(requests), self._end_one)
        self._open.add(texts)
        handover = self._handover
        assert handover is not None
        try:
            try:
                # What an engine does with a prompt before it queues it takes time for each token.
                if len(requests) > 1 or len(requests[0].prompt) > _SHORT:
                    loop = asyncio.get_running_loop()
                    await loop.run_in_executor(
                        self._threads, texts.submit, self.engine, handover, requests
                    )
                else:
                    texts.submit(self.engine, handover, requests)
            except ValueError as error:
                raise refused(error) from None
            except EngineError as error:
                raise RequestError(503, str(error)) from None
            yield texts
        finally:
            texts.cancel()
            self._open.discard(texts)

    def _end_one(self) -> None:
        self.num_open -= 1

    def _admit(self, count: int) -> None:
        if self.is_draining:
            raise RequestError(503, "the server is shutting down", headers={"Connection": "close"})
        if count > self.config.max_open:
            raise bad_field("n", f"{count} texts are more than the server takes at once")
        if self.num_open + count > self.config.max_open:
            raise self._full(f"{self.num_open} texts are made or wait already")
        self.num_open += count

    def hold(self, num_bytes: int, record: Record) -> None:
        """Counts bytes of a body until its request has been answered.

        Raises:
            RequestError: there is no room for more.
        """
        if num_bytes == 0:
            return
        if self.held_bytes + num_bytes > self.config.max_held_body_bytes:
            raise self._full(f"the server holds {self.held_bytes} bytes of requests already")

        def release() -> None:
            self.held_bytes -= record.held_bytes

        if not record.held_bytes:
            record.on_end.append(release)
        self.held_bytes += num_bytes
        record.held_bytes += num_bytes

    def _full(self, reason: str) -> RequestError:
        wait = max(1, round(self.config.retry_seconds))
        return RequestError(
            429,
            f"{reason}: try again later",
            code="server_full",
            headers={"Retry-After": str(wait)},
        )


def too_long(param: str, what: str, max_length: int) -> RequestError:
    """Returns the refusal of what the context has no room for."""
    return bad_field(
        param,
        f"the model's context has room for {max_length} tokens; the request has {what}",
        code="context_length_exceeded",
    )


def failure_of(generation: Generation) -> RequestError | None:
    """Returns what went wrong with a text, or None."""
    if generation.finish == "error":
        return RequestError(500, generation.error or "the text could not be made")
    if generation.finish == "deadline":
        return RequestError(504, "the text took too long and was ended", code="timeout")
    if generation.finish == "cancelled":
        return RequestError(503, "the text was cancelled")
    return None
