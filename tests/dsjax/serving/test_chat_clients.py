"""The `openai` package's chats with tools and constrained answers, against a server that runs.

The weights are random and the tokenizer is DeepSeek's. A bias on the mark that begins calls is what
makes such a model call where it is free to, and one on the mark that ends thoughts what makes it
end them: of itself it meets either once in 100,000 tokens. V2.5's chat format is asked for all, the
other families' for what differs in them.
"""

import asyncio
import contextlib
import functools
import json
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import jsonschema
import openai
import pydantic
import pytest

from dsjax.data.tokenizer import Tokenizer
from dsjax.engine import Engine
from dsjax.families.chat_format import CALLS_BEGIN, END_OF_THINKING
from tests.dsjax.engine.small_engine import CONFIG, MODEL_CONFIG
from tests.dsjax.serving.chat_tokenizers import chat_tokenizer, write_marked
from tests.dsjax.serving.served import Served, serving
from tests.small_models import random_model

pytestmark = pytest.mark.slow

USER: list[Any] = [{"role": "user", "content": "What is the weather in Ulm?"}]


class Weather(pydantic.BaseModel, extra="forbid"):
    """The weather of a place."""

    city: Literal["Ulm", "北京"]
    days: Literal[1, 2, 3]


class Now(pydantic.BaseModel, extra="forbid"):
    """The time."""

    zone: Literal["UTC"] | None


PLAIN_TOOLS: list[Any] = [
    {
        "type": "function",
        "function": {"name": name, "parameters": model.model_json_schema()},
    }
    for name, model in (("Weather", Weather), ("Now", Now))
]
STRICT_TOOLS: list[Any] = [openai.pydantic_function_tool(one) for one in (Weather, Now)]
MODELS: dict[str, type[pydantic.BaseModel]] = {"Weather": Weather, "Now": Now}
NAMED = {"type": "function", "function": {"name": "Now"}}
OTHER_FAMILIES = ("V2", "V3", "R1", "V3.1")


@functools.cache
def the_model() -> Any:
    return random_model(replace(MODEL_CONFIG, vocab_size=102_400, max_length=1024))


@contextlib.contextmanager
def a_chat_server(tokenizer: Tokenizer, **limits: Any) -> Iterator[Served]:
    """Runs a server over random weights of the real architecture and a real tokenizer."""
    sizes = replace(
        CONFIG,
        max_batch=2,  # an answer whole and streamed, at once
        batch_sizes=(2,),
        chunks=((1, 128),),
        page_size=16,
        num_pages=256,
        max_length=1024,
    )
    with (
        Engine(the_model(), tokenizer, sizes) as engine,
        serving(engine, **limits) as served,
    ):
        yield served


Chat = tuple[Tokenizer, Served, openai.OpenAI]


@contextlib.contextmanager
def a_chat(family: str, folder: Path) -> Iterator[Chat]:
    """Runs a server for a family's tokenizer and template, and a client of it."""
    write_marked(folder)
    tokenizer = chat_tokenizer(family, folder)
    with (
        a_chat_server(tokenizer) as served,
        openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as client,
    ):
        yield tokenizer, served, client
        served.wait_until_idle()


@pytest.fixture(scope="module")
def chat(tmp_path_factory) -> Iterator[Chat]:
    with a_chat("V2.5", tmp_path_factory.mktemp("marked")) as made:
        yield made


def bias(tokenizer: Tokenizer, *marks: str) -> dict[str, int]:
    ids = tokenizer.marker_ids
    return {str(ids[mark]): 100 for mark in marks if mark in ids}


def joined(events) -> tuple[dict[str, Any], str]:
    """What a client makes of a stream: a message, and why it ended."""
    message: dict[str, Any] = {"content": None, "reasoning_content": None, "tool_calls": None}
    finish = ""
    for event in events:
        for choice in event.choices:
            delta = choice.delta.model_dump(exclude_unset=True)
            for name in ("content", "reasoning_content"):
                if delta.get(name):
                    message[name] = (message[name] or "") + delta[name]
            for call in delta.get("tool_calls") or ():
                calls = message["tool_calls"] = message["tool_calls"] or []
                if call["index"] == len(calls):
                    assert call["type"] == "function"
                    calls.append({"name": call["function"]["name"], "arguments": ""})
                assert call["index"] == len(calls) - 1
                calls[-1]["arguments"] += call["function"]["arguments"]
            finish = choice.finish_reason or finish
    return message, finish


def plain(message) -> dict[str, Any]:
    given = message.model_dump()
    calls = given["tool_calls"] and [call["function"] for call in given["tool_calls"]]
    calls = calls and [{name: call[name] for name in ("name", "arguments")} for call in calls]
    names = ("content", "reasoning_content")
    return {name: given.get(name) or None for name in names} | {"tool_calls": calls}


def ask(client: openai.OpenAI, **fields: Any):
    """Asks twice at once, whole and streamed: the same, field for field."""
    asked: dict[str, Any] = {"model": "small", "messages": USER, "seed": 5, "max_tokens": 200}
    create: Any = client.chat.completions.create
    with ThreadPoolExecutor(1) as beside:
        waited = beside.submit(create, **asked | fields)
        message, finish = joined(create(**asked | fields, stream=True))
        choice = waited.result().choices[0]
    assert message == plain(choice.message)
    assert finish == choice.finish_reason
    return choice


@pytest.mark.parametrize("choice", ["required", NAMED], ids=["required", "named"])
@pytest.mark.parametrize("parallel", [True, False])
def test_forced_calls(chat, choice, parallel):
    tokenizer, _, client = chat
    given = ask(
        client,
        tools=PLAIN_TOOLS,
        tool_choice=choice,
        parallel_tool_calls=parallel,
        logit_bias=bias(tokenizer, END_OF_THINKING),
    )
    calls = given.message.tool_calls
    assert not given.message.content
    assert len(calls) == 1 or (parallel and choice == "required")
    assert len({call.id for call in calls}) == len(calls)
    assert given.finish_reason == ("tool_calls" if choice == "required" else "stop")
    for call in calls:
        model = MODELS[call.function.name]
        model.model_validate_json(call.function.arguments)
        assert choice == "required" or model is Now
    # The answer and what came of it are told to the model in its next turn.
    results = [{"role": "tool", "tool_call_id": call.id, "content": "rain"} for call in calls]
    answer = {"role": "assistant", "content": None, "tool_calls": [c.model_dump() for c in calls]}
    after = client.chat.completions.create(
        model="small", messages=[*USER, answer, *results], tools=PLAIN_TOOLS, max_tokens=2
    )
    assert after.usage.completion_tokens == 2


def test_calls_that_the_model_chooses(chat):
    tokenizer, _, client = chat
    marks = bias(tokenizer, CALLS_BEGIN)
    assert marks
    given = ask(client, tools=STRICT_TOOLS, logit_bias=marks, max_tokens=100)
    for call in given.message.tool_calls:
        model = MODELS[call.function.name]
        model.model_validate_json(call.function.arguments)
    assert given.finish_reason == "tool_calls"
    none = ask(client, tools=STRICT_TOOLS, tool_choice="none", logit_bias=marks, max_tokens=8)
    assert none.message.tool_calls is None


def check_calls(calls: Any) -> None:
    for call in calls:
        MODELS[call.function.name].model_validate_json(call.function.arguments)
    assert len({call.id for call in calls}) == len(calls) > 0


@pytest.mark.parametrize("family", OTHER_FAMILIES)
def test_other_families(family, tmp_path):
    with a_chat(family, tmp_path) as (tokenizer, _, client):
        end = bias(tokenizer, END_OF_THINKING)
        # Greedy, as a draw from so many tokens takes long here; one call, as these begin no end.
        forced: dict[str, Any] = {"tools": PLAIN_TOOLS, "logit_bias": end, "temperature": 0}
        one: dict[str, Any] = forced | {"parallel_tool_calls": False}
        given = ask(client, **one, tool_choice="required")
        check_calls(given.message.tool_calls)
        assert given.finish_reason == "tool_calls"
        named = ask(client, **one, tool_choice=NAMED)
        assert [call.function.name for call in named.message.tool_calls] == ["Now"]
        check_calls(named.message.tool_calls)
        if family == "V3.1":  # the one whose calls have a form of their own: several of them
            several = ask(client, **forced | {"temperature": 1}, tool_choice="required")
            check_calls(several.message.tool_calls)
        # What is parsed from a schema, while it is streamed.
        with client.chat.completions.stream(
            model="small",
            messages=USER,
            temperature=0,
            max_tokens=200,
            logit_bias=end,
            response_format=Weather,
        ) as stream:
            parsed = stream.get_final_completion().choices[0].message
        assert isinstance(parsed.parsed, Weather)
        check_free_calls(family, tokenizer, client)


def check_free_calls(family: str, tokenizer: Tokenizer, client: openai.OpenAI) -> None:
    marks = bias(tokenizer, CALLS_BEGIN, END_OF_THINKING)
    chosen: dict[str, Any] = {"tools": STRICT_TOOLS, "logit_bias": marks, "temperature": 0}
    if family == "V2":  # its marks are text, which no bias brings about
        given = ask(client, **chosen | {"max_tokens": 8})
        assert given.message.content
        assert given.message.tool_calls is None
        return
    given = ask(client, **chosen, parallel_tool_calls=False)
    check_calls(given.message.tool_calls)
    assert given.finish_reason == "tool_calls"
    # Free to end its thoughts, R1 goes on with them until it is cut: they are no content.
    if family == "R1":
        cut = ask(client, **chosen | {"logit_bias": bias(tokenizer, CALLS_BEGIN), "max_tokens": 8})
        assert cut.finish_reason == "length"
        assert cut.message.reasoning_content
        assert not cut.message.content
        assert cut.message.tool_calls is None


def test_json_of_a_schema_and_of_any_form(chat):
    tokenizer, _, client = chat
    stop_thinking = bias(tokenizer, END_OF_THINKING)
    schema = Weather.model_json_schema()
    form = {"type": "json_schema", "json_schema": {"name": "weather", "schema": schema}}
    given = ask(client, response_format=form, logit_bias=stop_thinking)
    jsonschema.validate(json.loads(given.message.content), schema)
    assert given.finish_reason == "stop"
    cut = ask(
        client,
        response_format={"type": "json_object"},
        logit_bias=stop_thinking,
        max_tokens=12,
    )
    assert cut.message.content.startswith("{")
    if cut.finish_reason == "stop":
        assert isinstance(json.loads(cut.message.content), dict)


def test_parsed_answers_whole_and_streamed(chat):
    tokenizer, _, client = chat
    asked: dict[str, Any] = {
        "model": "small",
        "messages": USER,
        "seed": 3,
        "max_tokens": 200,
        "logit_bias": bias(tokenizer, END_OF_THINKING),
    }
    parsed = client.chat.completions.parse(**asked, response_format=Weather).choices[0].message
    assert isinstance(parsed.parsed, Weather)
    with client.chat.completions.stream(**asked, response_format=Weather) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.parsed
    forced = asked | {"tools": STRICT_TOOLS, "tool_choice": "required"}
    forced["parallel_tool_calls"] = False  # of itself it calls on and on, which takes long
    whole = client.chat.completions.parse(**forced).choices[0].message.tool_calls
    with client.chat.completions.stream(**forced) as stream:
        streamed = stream.get_final_completion().choices[0].message.tool_calls
    for one, other in zip(whole, streamed, strict=True):
        assert isinstance(one.function.parsed_arguments, Weather | Now)
        assert one.function.parsed_arguments == other.function.parsed_arguments


def test_async_clients_with_tools_at_once(chat):
    tokenizer, served, _ = chat

    async def ask_one(client: Any, seed: int) -> list[str]:
        stream = await client.chat.completions.create(
            model="small",
            messages=USER,
            tools=PLAIN_TOOLS,
            tool_choice="required",
            parallel_tool_calls=False,
            seed=seed,
            max_tokens=200,
            logit_bias=bias(tokenizer, END_OF_THINKING),
            stream=True,
        )
        message, _ = joined([event async for event in stream])
        return [call["name"] for call in message["tool_calls"]]

    async def all_of_them() -> list[list[str]]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask_one(client, seed) for seed in range(4)))

    found = asyncio.run(all_of_them())
    assert all(found)
    assert {name for names in found for name in names} <= {"Weather", "Now"}


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": PLAIN_TOOLS, "tool_choice": "sometimes"}, "tool_choice"),
        ({"tools": [PLAIN_TOOLS[0]] * 2}, "tools[1].function.name"),
        ({"response_format": {"type": "yaml"}}, "response_format.type"),
        (
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "n", "schema": {"type": "frog"}},
                }
            },
            "response_format.json_schema.schema",
        ),
        ({"structured_outputs": {"regex": "("}}, "regex"),
        ({"structured_outputs": {"choice": ["a"]}}, "choice"),
        ({"messages": [{"role": "frog", "content": ""}]}, "messages[0].role"),
    ],
)
def test_a_refusal_names_the_field(chat, fields, param):
    client = chat[-1]
    for stream in (False, True):
        with pytest.raises(openai.BadRequestError) as caught:
            client.chat.completions.create(
                model="small", messages=USER, stream=stream, max_tokens=4, extra_body=fields
            )
        assert caught.value.param == param, caught.value.message
