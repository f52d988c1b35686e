"""`POST /v1/chat/completions`."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any

from dsjax.engine import Generation, Request
from dsjax.serving.answer_models import (
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Function,
    Message,
    ToolCall,
)
from dsjax.serving.errors import bad_field
from dsjax.serving.event_stream import event, to_json
from dsjax.serving.request_models import ChatCompletionRequest
from dsjax.serving.sampling_fields import sampling_of
from dsjax.serving.service import Service, failure_of, too_long
from dsjax.serving.texts import Texts
from dsjax.serving.token_texts import chat_logprobs
from dsjax.serving.usage import Record, usage_of


@dataclass(frozen=True)
class Asked:
    """A checked request.

    Attributes:
        requests: the engine's.
        prepared: makes the parsers of the answers.
        names: what stands in every answer, but for its kind.
    """

    body: ChatCompletionRequest
    requests: list[Request]
    prepared: Any
    names: dict[str, Any]


def check(service: Service, body: ChatCompletionRequest, created: int) -> Asked:
    """Makes the engine's requests of a client's; renders the template and builds grammars.

    Raises:
        RequestError: a field cannot be done.
        ValueError: the same; its line begins with the field.
    """
    model = service.check_model(body.model)
    if body.stream_options is not None and not body.stream:
        raise bad_field("stream_options", "needs stream")
    if body.top_logprobs is not None and not body.logprobs:
        raise bad_field("top_logprobs", "needs logprobs")
    n = body.n or 1
    if n > service.config.max_n:
        raise bad_field("n", f"{n} is more than {service.config.max_n} texts")
    service.check_messages(body.messages)
    prepared = service.conversations.prepare(
        body.messages,
        tools=body.tools,
        tool_choice=body.tool_choice,
        parallel_tool_calls=body.parallel_tool_calls is not False,
        response_format=body.response_format,
        regex=body.structured_outputs.regex if body.structured_outputs else None,
        template_arguments=body.chat_template_kwargs,
    )
    prompt = tuple(prepared.prompt)
    shown = {"show_tokens": tuple(prepared.show_tokens)} if prepared.show_tokens else {}
    sampling = sampling_of(
        service,
        body,
        _max_tokens(service, body, len(prompt)),
        (body.top_logprobs or 0) if body.logprobs else None,
        **shown,
    )
    requests = [
        Request(
            prompt,
            sampling,
            sample,
            body.priority or 0,
            service.config.request_seconds,
            prepared.mask(),
        )
        for sample in range(n)
    ]
    if (reason := service.engine.refusal(requests[0])) is not None:
        name, _, rest = reason.partition(":")
        raise bad_field(name if rest and name.isidentifier() else "messages", reason)
    names = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": created, "model": model}
    return Asked(body, requests, prepared, names)


def _max_tokens(service: Service, body: ChatCompletionRequest, num_prompt: int) -> int:
    given = body.max_completion_tokens or body.max_tokens
    if given is not None:
        service.check_room("messages", num_prompt, given)
        return given
    room = service.max_length - num_prompt
    if room < 1:
        raise too_long("messages", f"{num_prompt} tokens", service.max_length)
    usual = service.defaults.max_tokens_after(num_prompt)
    return room if usual is None else min(room, usual)


async def whole(service: Service, asked: Asked, record: Record) -> bytes:
    """Returns the answer when all texts have ended, as JSON."""
    async with service.run(asked.requests) as texts:
        generations = await texts.all()
    for generation in generations:
        if (failure := failure_of(generation)) is not None:
            raise failure
    record.take(asked.requests, generations, len(generations))
    return await service.beside(_whole, service, asked, generations)


def _whole(service: Service, asked: Asked, generations: Sequence[Generation]) -> bytes:
    choices = []
    for index, generation in enumerate(generations):
        parser = asked.prepared.parser()
        parser.feed(generation.text)
        parser.finish()
        answer = parser.answer
        calls = [
            ToolCall(id=call.id, function=Function(name=call.name, arguments=call.arguments))
            for call in answer.tool_calls
        ]
        message = Message(
            content=answer.content,
            reasoning_content=answer.reasoning_content,
            tool_calls=calls or None,
        )
        choices.append(
            ChatChoice(
                index=index,
                message=message,
                logprobs=_logprobs(service, asked, generation.logprobs),
                finish_reason=parser.finish_reason(generation.finish),
            )
        )
    usage = usage_of(asked.requests, generations, len(generations))
    answer = ChatCompletion(**asked.names, choices=choices, usage=usage)
    return answer.model_dump_json(exclude_unset=False).encode()


def _logprobs(service: Service, asked: Asked, logprobs: Any) -> ChatLogprobs | None:
    if not asked.body.logprobs or logprobs is None:
        return None
    return chat_logprobs(service.tokenizer, logprobs, asked.body.top_logprobs or 0)


async def streamed(
    service: Service, asked: Asked, texts: Texts, record: Record
) -> AsyncIterator[bytes]:
    """Gives the answer's events."""
    body = asked.body
    names = {**asked.names, "object": "chat.completion.chunk"}
    with_usage = body.stream_options is not None and body.stream_options.include_usage
    head = "data: " + to_json(names)[:-1] + ', "choices": [{"index": '
    tail = ', "usage": null}\n\n' if with_usage else "}\n\n"

    def chunk(index: int, delta: str, logprobs: ChatLogprobs | None, finish: str | None) -> bytes:
        said = "null" if logprobs is None else logprobs.model_dump_json()
        finished = "null" if finish is None else f'"{finish}"'
        return (
            f'{head}{index}, "delta": {delta}, "logprobs": {said}, '
            f'"finish_reason": {finished}}}]{tail}'
        ).encode()

    parsers = [asked.prepared.parser() for _ in asked.requests]
    role = to_json({"role": "assistant", "content": "", "refusal": None})
    yield b"".join(chunk(index, role, None, None) for index in range(len(parsers)))
    generations: list[Generation | None] = [None] * len(parsers)
    async for events in texts.events():
        data = []
        for index, one in events:
            parser = parsers[index]
            if isinstance(one, Generation):
                if (failure := failure_of(one)) is not None:
                    raise failure
                generations[index] = one
                data += [chunk(index, _delta(d), None, None) for d in parser.finish()]
                data.append(chunk(index, "{}", None, parser.finish_reason(one.finish)))
                continue
            # Log-probabilities go with the first piece of what their tokens made certain.
            logprobs = _logprobs(service, asked, one.logprobs) if one.logprobs else None
            deltas = [_delta(delta) for delta in parser.feed(one.text)]
            if logprobs is not None and not deltas:
                deltas = ['{"content": ""}']
            for delta in deltas:
                data.append(chunk(index, delta, logprobs, None))
                logprobs = None
        if data:
            yield b"".join(data)
    done = [one for one in generations if one is not None]
    record.take(asked.requests, done, len(done))
    if with_usage:
        usage = usage_of(asked.requests, done, len(done)).model_dump()
        yield event({**names, "choices": [], "usage": usage})


def _delta(delta: Any) -> str:
    """Returns a delta's JSON."""
    if delta.content is not None:
        return '{"content": ' + to_json(delta.content) + "}"
    if delta.reasoning_content is not None:
        said = to_json(delta.reasoning_content)
        return '{"reasoning_content": ' + said + "}"
    calls = []
    for call in delta.tool_calls:
        function = {"arguments": call.arguments}
        said_call: dict[str, Any] = {"index": call.index, "function": function}
        if call.id is not None:
            said_call |= {"id": call.id, "type": "function"}
        if call.name is not None:
            function["name"] = call.name
        calls.append(said_call)
    return to_json({"tool_calls": calls})
