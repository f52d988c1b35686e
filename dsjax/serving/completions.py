"""`POST /v1/completions`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsjax.engine import Generation, Request
from dsjax.serving.answer_models import Completion, CompletionChoice, CompletionLogprobs
from dsjax.serving.errors import bad_field
from dsjax.serving.event_stream import event, to_json
from dsjax.serving.request_models import CompletionRequest
from dsjax.serving.sampling_fields import sampling_of
from dsjax.serving.service import Service, failure_of
from dsjax.serving.texts import Texts
from dsjax.serving.token_texts import completion_logprobs
from dsjax.serving.usage import Record, finish_of, usage_of

_FIM = ("<｜fim▁begin｜>", "<｜fim▁hole｜>", "<｜fim▁end｜>")


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes:
        requests: the engine's, `n` of each prompt.
        echoes: text of each prompt, where it is sent back.
        names: what stands in every answer.
    """

    body: CompletionRequest
    requests: list[Request]
    echoes: list[str]
    names: dict[str, Any]

    @property
    def n(self) -> int:
        """Texts of each prompt."""
        return self.body.n or 1

    @property
    def makes_text(self) -> bool:
        """Whether more than the prompt is wanted."""
        return self.body.max_tokens != 0


def check(service: Service, body: CompletionRequest, created: int) -> Asked:
    """Makes the engine's requests of a client's; takes long for long prompts.

    Raises:
        RequestError: a field cannot be done.
        ValueError: the same; its line begins with the field.
    """
    model = service.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise bad_field("stream_options", "needs stream")
    if body.max_tokens == 0 and not body.echo:
        raise bad_field("max_tokens", "0 needs echo: there would be nothing to send")
    if body.suffix is not None and body.echo:
        raise bad_field("suffix", "cannot be sent with echo")
    prompts = _prompts(body.prompt)
    n = body.n or 1
    if len(prompts) > service.config.max_prompts:
        limit = service.config.max_prompts
        raise bad_field("prompt", f"{len(prompts)} prompts are more than {limit}")
    if len(prompts) * n > service.config.max_n:
        more = f" for {len(prompts)} prompts" if len(prompts) > 1 else ""
        if n > 1:
            raise bad_field("n", f"{n}{more} is more than {service.config.max_n} texts")
        if len(prompts) * n > service.config.max_prompts:
            raise bad_field("prompt", f"{len(prompts)} are more than {service.config.max_prompts}")
    max_tokens = 16 if body.max_tokens is None else body.max_tokens
    of_prompt = body.logprobs if body.echo else None
    sampling = sampling_of(
        service, body, max(1, max_tokens), body.logprobs, prompt_logprobs=of_prompt
    )
    regex = body.structured_outputs.regex if body.structured_outputs else None
    requests, echoes = [], []
    for index, prompt in enumerate(prompts):
        param = "prompt" if len(prompts) == 1 else f"prompt[{index}]"
        ids = _ids(service, param, prompt, body.suffix)
        if max_tokens == 0 and len(ids) == service.max_length:
            # The engine makes a token more, for which there must be room.
            raise bad_field(param, f"must have less than {service.max_length} tokens")
        service.check_room(param, len(ids), max(1, max_tokens))
        echoes.append("")
        if body.echo:
            text = service.tokenizer.decode(ids, skip_special=True)
            echoes[-1] = prompt if isinstance(prompt, str) else text
        for sample in range(n):
            request = Request(
                tuple(ids),
                sampling,
                sample,
                body.priority or 0,
                service.config.request_seconds,
                service.conversations.mask(response_format=body.response_format, regex=regex),
            )
            if (reason := service.engine.refusal(request)) is not None:
                raise bad_field(param if "prompt" in reason else _field_of(reason), reason)
            requests.append(request)
    names = {
        "id": f"cmpl-{uuid.uuid4().hex}",
        "object": "text_completion",
        "created": created,
        "model": model,
    }
    return Asked(body, requests, echoes, names)


def _field_of(reason: str) -> str:
    name, _, rest = reason.partition(":")
    return name if rest and name.isidentifier() else "prompt"


def _prompts(prompt: Any) -> Sequence[str | list[int]]:
    if isinstance(prompt, str) or isinstance(prompt[0], int):
        return [prompt]
    found: Sequence[str | list[int]] = prompt
    return found


def _ids(service: Service, param: str, prompt: str | list[int], suffix: str | None) -> list[int]:
    tokenizer = service.tokenizer
    if suffix is not None:
        if not isinstance(prompt, str):
            raise bad_field("suffix", "needs a prompt of text")
        marks = service.ids_of(_FIM)
        if marks is None:
            raise bad_field("suffix", "this model has no tokens for fill-in-the-middle")
        service.check_size("suffix", suffix)
        service.check_size(param, prompt)
        before = tokenizer.encode(prompt, parse_special=False)
        after = tokenizer.encode(suffix, parse_special=False)
        return [tokenizer.bos_id, marks[0], *before, marks[1], *after, marks[2]]
    if isinstance(prompt, str):
        service.check_size(param, prompt)
        return tokenizer.encode_prompt(prompt)
    return prompt


async def whole(service: Service, asked: Asked, record: Record) -> bytes:
    """Returns the answer when all texts have ended, as JSON."""
    async with service.run(asked.requests) as texts:
        generations = await texts.all()
    for generation in generations:
        if (failure := failure_of(generation)) is not None:
            raise failure
    record.take(asked.requests, generations, asked.n, asked.makes_text)
    return await service.beside(_whole, service, asked, generations)


def _whole(service: Service, asked: Asked, generations: Sequence[Generation]) -> bytes:
    choices = []
    for index, generation in enumerate(generations):
        text = asked.echoes[index // asked.n]
        logprobs = None
        if asked.body.logprobs is not None:
            logprobs = _logprobs_of(service, asked, index, generation)
        choices.append(
            CompletionChoice(
                index=index,
                text=text + generation.text if asked.makes_text else text,
                logprobs=logprobs,
                finish_reason=finish_of(generation) if asked.makes_text else "length",
            )
        )
    usage = usage_of(asked.requests, generations, asked.n, asked.makes_text)
    return Completion(**asked.names, choices=choices, usage=usage).model_dump_json().encode()


def _logprobs_of(
    service: Service, asked: Asked, index: int, generation: Generation
) -> CompletionLogprobs:
    """Returns those of the prompt, where it is sent back, and of the text."""
    found = list(generation.prompt_logprobs or ())
    if asked.makes_text:
        found += generation.logprobs or ()
    first = asked.requests[index].prompt[0] if asked.body.echo else None
    return completion_logprobs(service.tokenizer, first, found, 0, asked.body.logprobs or 0)


async def streamed(
    service: Service, asked: Asked, texts: Texts, record: Record
) -> AsyncIterator[bytes]:
    """Gives the answer's events."""
    body, names = asked.body, asked.names
    heads = {
        index: to_json(names)[:-1] + f', "choices": [{{"index": {index}, '
        for index in range(len(asked.requests))
    }
    offsets = [len(asked.echoes[index // asked.n]) for index in range(len(asked.requests))]
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    tail = ', "usage": null}\n\n' if with_usage else "}\n\n"

    def chunk(index: int, text: str, logprobs: CompletionLogprobs | None, finish: Any) -> bytes:
        said = "null" if logprobs is None else logprobs.model_dump_json()
        finished = "null" if finish is None else f'"{finish}"'
        return (
            f'data: {heads[index]}"text": {to_json(text)}, '
            f'"logprobs": {said}, "finish_reason": {finished}}}]{tail}'
        ).encode()

    begun = [not body.echo] * len(asked.requests)
    generations: list[Generation | None] = [None] * len(asked.requests)
    async for events in texts.events():
        data = []
        for index, one in events:
            if isinstance(one, Generation):
                if (failure := failure_of(one)) is not None:
                    raise failure
                generations[index] = one
            if not begun[index]:
                begun[index] = True
                if body.logprobs is not None and not isinstance(one, Generation):
                    # Those of the prompt come with the end; nothing is sent before.
                    begun[index] = False
                else:
                    data.append(chunk(index, asked.echoes[index // asked.n], None, None))
            if isinstance(one, Generation):
                finish = finish_of(one) if asked.makes_text else "length"
                logprobs, text = None, ""
                if body.echo and body.logprobs is not None:
                    logprobs = _logprobs_of(service, asked, index, one)
                    text = one.text if asked.makes_text else ""
                    text = asked.echoes[index // asked.n] + text
                    data.pop()
                data.append(chunk(index, text, logprobs, finish))
            elif asked.makes_text and begun[index] and (one.text or one.logprobs):
                logprobs = None
                if body.logprobs is not None:
                    logprobs = completion_logprobs(
                        service.tokenizer, None, one.logprobs, offsets[index], body.logprobs
                    )
                offsets[index] += len(one.text)
                data.append(chunk(index, one.text, logprobs, None))
        if data:
            yield b"".join(data)
    done = [one for one in generations if one is not None]
    record.take(asked.requests, done, asked.n, asked.makes_text)
    if with_usage:
        usage = usage_of(asked.requests, done, asked.n, asked.makes_text).model_dump()
        yield event({**names, "choices": [], "usage": usage})
