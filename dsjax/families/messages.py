"""A conversation with tools, as the templates of DeepSeek's models read one.

Released templates differ in what they read: none but V3.1's shows tools, V2's passes over calls and
their results without a word, V2.5's loses the calls of a message that also says something. What one
reads is found out by rendering small conversations, never by a model's name.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from dsjax.families.chat_format import ChatFormat

Message = dict[str, Any]
Render = Callable[[list[Message], list[Any] | None], str]
_ROLES = {"developer": "system", "function": "tool"}
_KNOWN_ROLES = ("system", "user", "assistant", "tool")


@dataclass(frozen=True)
class TemplateReads:
    """What a chat template reads.

    Attributes:
        tools: whether it shows tools.
        calls: which content it wants beside calls: "any", "none", or "never" where it loses them.
        parsed_arguments: whether it wants arguments as an object.
        results: whether it shows what tools gave.
    """

    tools: bool
    calls: Literal["any", "none", "never"]
    parsed_arguments: bool
    results: bool


def template_reads(render: Render) -> TemplateReads:
    """Finds out what a template reads.

    Args:
        render: returns the text of messages and tools, or raises ValueError.
    """

    def shown(message: Message | None, *marks: str, tools: list[Any] | None = None) -> bool:
        messages = [{"role": "user", "content": "u"}, *([message] if message else [])]
        try:
            text = render(messages, tools)
        except ValueError:
            return False
        return all(mark in text for mark in marks)

    def calling(content: str | None, arguments: Any) -> Message:
        function = {"name": "probename", "arguments": arguments}
        calls = [{"id": "call_0", "type": "function", "function": function}]
        return {"role": "assistant", "content": content, "tool_calls": calls}

    tool = {"type": "function", "function": {"name": "probetool", "parameters": {}}}
    text, parsed = '{"p": "probevalue"}', {"p": "probevalue"}
    forms = {"any": "probecontent", "none": None}
    found: Any = "never"
    as_object = False
    for name, content in forms.items():
        marks = ("probename", '"probevalue"', *((content,) if content else ()))
        for arguments in (text, parsed):
            if found == "never" and shown(calling(content, arguments), *marks):
                found, as_object = name, arguments is parsed
    result = {"role": "tool", "content": "proberesult", "tool_call_id": "call_0"}
    return TemplateReads(
        tools=shown(None, "probetool", tools=[tool]),
        calls=found,
        parsed_arguments=as_object,
        results=shown(result, "proberesult"),
    )


def prepare_messages(
    messages: Sequence[Mapping[str, Any]],
    reads: TemplateReads,
    form: ChatFormat,
    system: str | None,
) -> list[Message]:
    """Returns messages as a template reads them.

    Args:
        messages: as OpenAI's API has them.
        reads: what the template reads.
        form: how the model calls.
        system: what the system's text gains.

    Raises:
        ValueError: names the field that cannot be read.
    """
    if isinstance(messages, str) or not isinstance(messages, Sequence) or not messages:
        raise ValueError("messages: must be a list of one message or more")
    plain = _in_order([_message(message, f"messages[{i}]") for i, message in enumerate(messages)])
    found: list[Message] = []
    for message in plain:
        found += _readable(message, reads, form)
    if system is not None:
        if found[0]["role"] == "system":
            text = found[0]["content"].rstrip() or "You are a helpful Assistant."
            found[0] = {**found[0], "content": f"{text}\n\n{system}"}
        else:
            text = f"You are a helpful Assistant.\n\n{system}"
            found.insert(0, {"role": "system", "content": text})
    return found


def _message(message: Any, field: str) -> Message:
    if not isinstance(message, Mapping):
        raise ValueError(f"{field}: must be an object")
    role = message.get("role")
    role = _ROLES.get(role, role) if isinstance(role, str) else role
    if role not in _KNOWN_ROLES:
        raise ValueError(f"{field}.role: {role!r} must be one of {', '.join(_KNOWN_ROLES)}")
    # Clients send what they have got back: fields that are null or empty are none.
    plain = {name: value for name, value in message.items() if value is not None and value != []}
    plain |= {"role": role, "content": _text(message.get("content"), f"{field}.content")}
    calls = plain.get("tool_calls")
    if calls is not None:
        if role != "assistant" or not isinstance(calls, Sequence) or isinstance(calls, str):
            raise ValueError(f"{field}.tool_calls: must be a list, of an assistant's message")
        plain["tool_calls"] = [
            _call(call, f"{field}.tool_calls[{i}]") for i, call in enumerate(calls)
        ]
    elif plain["content"] is None:
        if role not in ("assistant", "tool"):
            raise ValueError(f"{field}.content: is missing")
        plain["content"] = ""
    return plain


def _text(content: Any, field: str) -> str | None:
    if content is None or isinstance(content, str):
        return content
    if not isinstance(content, Sequence):
        raise ValueError(f"{field}: must be a text or a list of parts")
    texts = []
    for index, part in enumerate(content):
        kind = part.get("type") if isinstance(part, Mapping) else None
        text = part.get("text", part.get("refusal")) if isinstance(part, Mapping) else None
        if kind not in ("text", "refusal") or not isinstance(text, str):
            raise ValueError(f"{field}[{index}]: {kind!r}: only parts of text are read")
        texts.append(text)
    return "\n".join(texts)


def _call(call: Any, field: str) -> Message:
    function = call.get("function") if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise ValueError(f"{field}.function.name: is missing")
    arguments = function.get("arguments")
    if not isinstance(arguments, str):
        arguments = json.dumps({} if arguments is None else arguments, ensure_ascii=False)
    kept = {"name": function["name"], "arguments": arguments or "{}"}
    return {"id": call.get("id"), "type": "function", "function": kept}


def _in_order(messages: list[Message]) -> list[Message]:
    """Puts the results of calls in the order of the calls, the only link that a template shows."""
    found: list[Message] = []
    order: dict[Any, int] = {}
    results: list[Message] = []
    for message in [*messages, {"role": ""}]:
        if message["role"] == "tool":
            results.append(message)
            continue
        results.sort(key=lambda one: order.get(one.get("tool_call_id"), len(order)))
        found += results
        results = []
        order = {call["id"]: i for i, call in enumerate(message.get("tool_calls", ()))}
        found.append(message)
    return found[:-1]


def _readable(message: Message, reads: TemplateReads, form: ChatFormat) -> list[Message]:
    """Returns a message as one or two that lose nothing in the template."""
    if message["role"] == "tool" and not reads.results:
        return [{"role": "user", "content": f"Function result:\n{message['content']}"}]
    calls = message.get("tool_calls")
    if not calls:
        return [message]
    content = message["content"]
    if reads.calls == "never":
        pairs = [(c["function"]["name"], c["function"]["arguments"]) for c in calls]
        text = (content or "") + form.write_calls(pairs)
        return [{"role": "assistant", "content": text}]
    if reads.parsed_arguments:
        calls = [{**c, "function": _parsed(c["function"])} for c in calls]
    if reads.calls == "any":
        return [{**message, "content": content or None, "tool_calls": calls}]
    said = [{"role": "assistant", "content": content}] if content else []
    return [*said, {**message, "content": None, "tool_calls": calls}]


def _parsed(function: Message) -> Message:
    try:
        return {**function, "arguments": json.loads(function["arguments"])}
    except ValueError:
        return function


def tools_text(functions: Sequence[Mapping[str, Any]], form: ChatFormat) -> str:
    """Returns what tells a model of its functions, as DeepSeek published it with V2.5.

    A model whose vocabulary has no marks was not tuned on calls; it is also told how to write one.
    """
    parts = ["## Tools\n\n### Function\n\nYou have the following functions available:"]
    for function in functions:
        text = json.dumps(function, ensure_ascii=False, indent=4)
        parts.append(f"- `{function['name']}`:\n```json\n{text}\n```")
    if not form.marks_are_tokens:
        example = form.write_calls([("NAME", "ARGUMENTS")])
        parts.append(f"To call functions, write nothing after\n{example}")
    return "\n\n".join(parts)


def response_text(schema: Any | None) -> str:
    """Returns what tells a model to answer in JSON, and by which schema."""
    text = "## Response Format\n\nReply with JSON object ONLY."
    if schema is None:
        return text
    return f"{text}\n\n```json\n{json.dumps(schema, ensure_ascii=False)}\n```"
