"""A conversation that goes on in this process: what was said, and the next answer as it comes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from dsjax.data.generation_defaults import GenerationDefaults
from dsjax.engine import Engine, Generation, Request, Stream
from dsjax.families.answer_parts import Answer, Delta
from dsjax.families.answers import AnswerParser
from dsjax.inference.sampling import Sampling
from dsjax.serving.conversations import Conversations

Message = dict[str, Any]


@dataclass(frozen=True)
class Speed:
    """What an answer took.

    Attributes:
        num_prompt: tokens of the conversation before it.
        num_shared: of these, how many the engine had read before.
        num_tokens: of the answer.
        first_seconds: from the question to the first token.
        seconds: from the question to the last.
    """

    num_prompt: int
    num_shared: int
    num_tokens: int
    first_seconds: float
    seconds: float

    @property
    def tokens_per_second(self) -> float | None:
        """Of the tokens after the first; None where there are too few to say."""
        after = self.seconds - self.first_seconds
        return (self.num_tokens - 1) / after if self.num_tokens > 1 and after > 0 else None


class Reply:
    """An answer under way: iterate it once, for its parts as they become certain.

    Attributes:
        generation: what the engine made; None until the end.
    """

    def __init__(self, stream: Stream, parser: AnswerParser, num_prompt: int) -> None:
        self.generation: Generation | None = None
        self._stream = stream
        self._parser = parser
        self._num_prompt = num_prompt
        self._begun = time.monotonic()
        self._first = self._last = self._begun

    def __iter__(self) -> Iterator[Delta]:
        is_first = True
        for piece in self._stream:
            self._last = time.monotonic()
            if is_first:
                self._first, is_first = self._last, False
            yield from self._parser.feed(piece.text)
        yield from self._parser.finish()
        self.generation = self._stream.result()

    def cancel(self) -> None:
        """Ends the answer at the next step; what there is stays. A signal handler may call it."""
        self._stream.cancel()

    @property
    def answer(self) -> Answer:
        """All that became certain so far."""
        return self._parser.answer

    @property
    def speed(self) -> Speed:
        """What the answer took; once it has ended."""
        made = self.generation
        assert made is not None
        return Speed(
            self._num_prompt,
            made.num_shared,
            len(made.tokens),
            self._first - self._begun,
            self._last - self._begun,
        )


class Dialogue:
    """A conversation with a model, and the engine that answers it.

    The engine remembers what it has read: of a conversation that goes on it reads what is new.

    Attributes:
        system: the system message, or "" for none.
        messages: what was said, without the system message.
        max_length: tokens that the whole conversation has room for.
    """

    def __init__(
        self,
        engine: Engine,
        defaults: GenerationDefaults | None = None,
        system: str = "",
        **sampling: Any,
    ) -> None:
        """Begins a conversation.

        Args:
            engine: answers; stays its caller's.
            defaults: how text is made where `sampling` does not say.
            system: the system message, or "" for none.
            **sampling: fields of `Sampling`; without `max_tokens`, an answer may fill the context.

        Raises:
            ValueError: the tokenizer has no chat template.
        """
        if engine.tokenizer.chat_template is None:
            spec = engine.tokenizer.spec
            raise ValueError(f"{spec}: has no chat template, so there is no conversation with it")
        self.system = system
        self.messages: list[Message] = []
        self.max_length = engine.max_length
        self._engine = engine
        self._defaults = defaults or GenerationDefaults()
        self._sampling = sampling
        self._conversations = Conversations(engine.tokenizer, engine.vocab_size, engine.end_ids)
        self._num_retries = 0

    def ask(self, text: str) -> Reply:
        """Says something; the answer is part of the conversation after `keep`.

        Raises:
            ValueError: there is no room for it, or the template refuses it.
        """
        messages = [*self.messages, {"role": "user", "content": text}]
        reply = self._answer(messages, 0)
        self.messages, self._num_retries = messages, 0
        return reply

    def retry(self) -> Reply:
        """Asks for another answer to what was said last; it is drawn with other noise.

        Raises:
            ValueError: nothing was said.
        """
        asked = [*self.messages]
        while asked and asked[-1]["role"] != "user":
            asked.pop()
        if not asked:
            raise ValueError("nothing was asked yet")
        reply = self._answer(asked, self._num_retries + 1)
        self.messages, self._num_retries = asked, self._num_retries + 1
        return reply

    def keep(self, reply: Reply) -> None:
        """Makes an answer that has ended, or was stopped, part of the conversation."""
        answer = reply.answer
        message = {"role": "assistant", "content": answer.content or ""}
        if answer.reasoning_content:
            message["reasoning_content"] = answer.reasoning_content
        self.messages.append(message)

    def take_back(self) -> None:
        """Forgets what was said last where no answer was kept."""
        if self.messages and self.messages[-1]["role"] == "user":
            self.messages.pop()

    def reset(self) -> None:
        """Forgets all but the system message."""
        self.messages, self._num_retries = [], 0

    def whole(self) -> list[Message]:
        """Returns the conversation with its system message, as OpenAI's API has it."""
        return self._with_system(self.messages)

    def _with_system(self, messages: list[Message]) -> list[Message]:
        return ([{"role": "system", "content": self.system}] if self.system else []) + messages

    def _answer(self, messages: list[Message], sample: int) -> Reply:
        ready = self._conversations.prepare(self._with_system(messages))
        num_prompt = len(ready.prompt)
        room = self.max_length - num_prompt
        if room < 1:
            raise ValueError(
                f"the conversation has {num_prompt} tokens, and there is room for {self.max_length}"
            )
        fields = self._defaults.sampling_fields() | self._sampling
        if "max_tokens" not in fields:
            fields["max_tokens"] = self._defaults.max_tokens_after(num_prompt) or room
        sampling = Sampling(**fields)
        sampling = replace(
            sampling,
            max_tokens=min(room, sampling.max_tokens),
            show_tokens=(*sampling.show_tokens, *ready.show_tokens),
        )
        request = Request(ready.prompt, sampling, sample)
        return Reply(self._engine.submit(request), ready.parser(), num_prompt)
