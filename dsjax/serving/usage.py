"""What a request came to: its tokens, why it ended."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from dsjax.engine import Generation, Request
from dsjax.serving.answer_models import Finish, PromptDetails, Usage


def usage_of(
    requests: Sequence[Request], generations: Sequence[Generation], n: int, makes_text: bool = True
) -> Usage:
    """Returns the tokens of a request's prompts, each counted once, and of its texts."""
    prompt = sum(len(request.prompt) for request in requests[::n])
    made = sum(len(generation.tokens) for generation in generations) if makes_text else 0
    shared = sum(generation.num_shared for generation in generations[::n])
    return Usage(
        prompt_tokens=prompt,
        completion_tokens=made,
        total_tokens=prompt + made,
        prompt_tokens_details=PromptDetails(cached_tokens=shared),
    )


def finish_of(generation: Generation) -> Finish:
    """Returns why a text ended that did not fail."""
    return "stop" if generation.finish == "stop" else "length"


@dataclass
class Record:
    """What the log says of a request, and nothing of its texts unless asked.

    Attributes:
        held_bytes: of its body, counted by the server.
        on_end: called when the request has been answered, or its client has gone.
    """

    prompt_tokens: int = 0
    completion_tokens: int = 0
    finish: list[str] = field(default_factory=list)
    texts: list[str] = field(default_factory=list)
    reason: str | None = None
    request: str | None = None
    held_bytes: int = 0
    on_end: list[Callable[[], None]] = field(default_factory=list)

    def take(
        self,
        requests: Sequence[Request],
        generations: Sequence[Generation],
        n: int,
        makes_text: bool = True,
    ) -> None:
        """Takes what a request has come to."""
        usage = usage_of(requests, generations, n, makes_text)
        self.prompt_tokens = usage.prompt_tokens
        self.completion_tokens = usage.completion_tokens
        self.finish = [generation.finish for generation in generations]
        self.texts = [generation.text for generation in generations]
