"""The `openai` package against a server that runs."""

import asyncio
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from dsjax.engine import Request
from dsjax.inference.sampling import Sampling
from tests.dsjax.engine.small_engine import TOKENIZER
from tests.dsjax.serving.served import Served, a_server

WORDS = [{"role": "user", "content": "Hello"}]


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    with a_server() as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{served.url}/v1", api_key="none", max_retries=0) as made:
        yield made


def greedy(served: Served, prompt: list[int], max_tokens: int) -> str:
    request = Request(tuple(prompt), Sampling(max_tokens=max_tokens))
    return served.engine.submit(request).result(30).text


def test_models(client):
    assert [model.id for model in client.models.list()] == ["small", "other"]
    assert client.models.retrieve("other").id == "other"
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nobody", prompt="a")
    assert caught.value.code == "model_not_found"


def test_completion_is_the_engine_s(client, served):
    expected = greedy(served, [TOKENIZER.bos_id, *b"Hello"], 12)
    given = client.completions.create(
        model="small", prompt="Hello", max_tokens=12, temperature=0, seed=3
    )
    assert given.choices[0].text == expected
    assert given.choices[0].finish_reason == "length"
    assert (given.usage.prompt_tokens, given.usage.completion_tokens) == (6, 12)
    events = list(
        client.completions.create(
            model="small",
            prompt=[[TOKENIZER.bos_id, *b"Hello"]],
            max_tokens=12,
            temperature=0,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert "".join(c.text for event in events for c in event.choices) == expected
    assert events[-1].usage.total_tokens == given.usage.total_tokens == 18
    assert [e.choices[0].finish_reason for e in events if e.choices][-1] == "length"


def test_chat_whole_and_streamed(client, served):
    prompt = TOKENIZER.encode_prompt("u:Hello\na:")
    expected = greedy(served, prompt, 10)
    asked = {"model": "small", "messages": WORDS, "max_completion_tokens": 10, "temperature": 0}
    given = client.chat.completions.create(**asked)
    assert given.choices[0].message.content == expected
    assert given.choices[0].message.role == "assistant"
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    events = list(
        client.chat.completions.create(
            **asked | {"messages": parts}, stream=True, stream_options={"include_usage": True}
        )
    )
    assert events[0].choices[0].delta.role == "assistant"
    text = "".join(c.delta.content or "" for event in events for c in event.choices)
    assert text == expected
    assert events[-1].usage.completion_tokens == 10
    assert all(event.id == events[0].id for event in events)


def test_async_streams_at_once(served):
    async def ask(client: openai.AsyncOpenAI, number: int) -> str:
        stream = await client.completions.create(
            model="small", prompt=f"prompt {number}", max_tokens=9, temperature=0, stream=True
        )
        return "".join([event.choices[0].text async for event in stream])

    async def all_of_them() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{served.url}/v1", api_key="none") as client:
            return await asyncio.gather(*(ask(client, number) for number in range(12)))

    texts = asyncio.run(all_of_them())
    for number, text in enumerate(texts):
        assert text == greedy(served, TOKENIZER.encode_prompt(f"prompt {number}"), 9)
    served.wait_until_idle()


def test_echo_with_logprobs_as_lm_eval_asks(client):
    prompt = [TOKENIZER.bos_id, *b"Hello"]
    asked = {"model": "small", "prompt": prompt, "temperature": 0, "echo": True, "logprobs": 1}
    one = client.completions.create(**asked, max_tokens=1).choices[0]
    none = client.completions.create(**asked, max_tokens=0).choices[0]
    assert one.logprobs.tokens[:6] == none.logprobs.tokens
    assert one.logprobs.token_logprobs[:6] == none.logprobs.token_logprobs
    assert none.logprobs.token_logprobs[0] is None
    assert none.logprobs.tokens[1:] == list("Hello")
    assert none.logprobs.text_offset == [0, 0, 1, 2, 3, 4]
    assert none.text == "Hello"
    for token, top, number in zip(
        none.logprobs.tokens[1:],
        none.logprobs.top_logprobs[1:],
        none.logprobs.token_logprobs[1:],
        strict=True,
    ):
        assert top[token] == number <= max(top.values())
    events = list(client.completions.create(**asked, max_tokens=1, stream=True))
    streamed = events[-1].choices[0]
    assert streamed.logprobs.token_logprobs == one.logprobs.token_logprobs
    assert streamed.text == one.text


def test_chat_logprobs_n_and_seed(client):
    asked = {"model": "small", "messages": WORDS, "max_tokens": 6, "n": 3, "seed": 11}
    one = client.chat.completions.create(**asked, logprobs=True, top_logprobs=2)
    two = client.chat.completions.create(**asked)
    texts = [choice.message.content for choice in one.choices]
    assert texts == [choice.message.content for choice in two.choices]
    assert len(set(texts)) == 3
    for choice in one.choices:
        assert all(len(token.top_logprobs) == 2 for token in choice.logprobs.content)
    made = sum(len(choice.logprobs.content) for choice in one.choices)
    assert one.usage.completion_tokens == made


def test_bias_and_stop(client):
    asked = {"model": "small", "prompt": "Hi", "temperature": 0, "max_tokens": 5}
    given = client.completions.create(**asked, logit_bias={str(ord("x")): 100})
    assert given.choices[0].text == "xxxxx"
    stopped = client.completions.create(**asked, logit_bias={str(ord("x")): 100}, stop=["xxx"])
    assert stopped.choices[0].text == ""
    assert stopped.choices[0].finish_reason == "stop"


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"best_of": 3}, "best_of"),
        ({"suffix": "tail"}, "suffix"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 500}, "prompt"),
        ({"prompt": [9999]}, "prompt"),
        ({"prompt": "a" * 200}, "prompt"),
        ({"logit_bias": {"700": 1}}, "logit_bias"),
        ({"n": 100_000}, "n"),
        ({"temperature": -1}, "temperature"),
        ({"stop": ["ok", ""]}, "stop[1]"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"mirostat": 2}, "mirostat"),
    ],
)
def test_a_refusal_names_the_field(client, fields, param):
    asked = {"max_tokens": 4} | fields
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="small", prompt="Hi", extra_body=asked)
    body: Any = caught.value.body
    assert body["param"] == param
    assert caught.value.type == "invalid_request_error"
    assert param.partition("[")[0] in body["message"]


def test_tokens_there_and_back(client):
    made = client.post("../tokenize", cast_to=object, body={"prompt": "Grüße"})
    assert made["tokens"] == TOKENIZER.encode_prompt("Grüße")
    assert made["count"] == len(made["tokens"])
    back = client.post("../detokenize", cast_to=object, body={"tokens": made["tokens"][1:]})
    assert back["prompt"] == "Grüße"
