"""Requests drawn from the OpenAPI document: the server never fails and answers as it says."""

import json
from typing import Any

import httpx
import jsonschema
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    negative_data_rejection,
    response_headers_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from tests.dsjax.serving.served import a_server

CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_headers_conformance,
    response_schema_conformance,
]
METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
FEW = settings(
    max_examples=15,
    deadline=None,
    derandomize=True,
    database=None,
    phases=[Phase.explicit, Phase.generate],
    suppress_health_check=list(HealthCheck),
)
WORDS: dict[str, Any] = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 2}
# What is drawn seldom fits a route: each that takes a body is sent some that do.
SOUND: dict[str, list[dict[str, Any]]] = {
    "/v1/completions": [
        {"prompt": "Hi", "max_tokens": 2, "logprobs": 2, "echo": True},
        {
            "prompt": "Hi",
            "max_tokens": 2,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    ],
    "/v1/chat/completions": [
        WORDS | {"logprobs": True, "top_logprobs": 2, "n": 2},
        WORDS | {"stream": True, "logprobs": True},
    ],
    "/tokenize": [{"prompt": "Hi", "return_token_strs": True}, {"messages": WORDS["messages"]}],
    "/detokenize": [{"tokens": [72, 105]}],
}


@pytest.fixture(scope="module")
def served():
    # What a drawn request may ask for at most is little, so that it is soon answered.
    with a_server(request_seconds=200.0, max_n=4) as server:
        yield server
        server.wait_until_idle()


@pytest.fixture(scope="module")
def document(served):
    return httpx.get(f"{served.url}/openapi.json").json()


def operations(document):
    return {
        (method.upper(), path)
        for path, item in document["paths"].items()
        for method in item
        if method in METHODS
    }


def test_answers_are_as_the_document_says(document, served):
    schema: Any = schemathesis.openapi.from_dict(document)
    schema.config.update(base_url=served.url)
    sent: dict[tuple[str, str], list[int]] = {}
    for found in schema.get_all_operations():
        operation = found.ok()  # raises for one that the document describes badly

        @given(case=operation.as_strategy(generation_mode=GenerationMode.POSITIVE))
        @FEW
        def check(case):
            answer = case.call_and_validate(checks=CHECKS, timeout=300)
            sent.setdefault((case.method.upper(), case.operation.path), []).append(
                answer.status_code
            )

        check()
        if operation.body:

            @given(case=operation.as_strategy(generation_mode=GenerationMode.NEGATIVE))
            @FEW
            def check_bad(case):
                case.call_and_validate(checks=[*CHECKS, negative_data_rejection], timeout=300)

            check_bad()
    assert set(sent) == operations(document)
    # What takes no input succeeds; so it is not the refusals alone that were held against it.
    for (method, path), statuses in sent.items():
        if method == "GET" and "{" not in path:
            assert set(statuses) == {200}, path


def test_sound_requests_are_answered_as_the_document_says(document, served):
    takes = {path for method, path in operations(document) if method == "POST"}
    assert takes == set(SOUND)
    for path, bodies in SOUND.items():
        described = document["paths"][path]["post"]
        model = described["requestBody"]["content"]["application/json"]["schema"]
        answers = described["responses"]["200"]["content"]
        for body in bodies:
            validate(body, model, document)
            answer = httpx.post(served.url + path, json=body, timeout=300)
            assert answer.status_code == 200, answer.text
            if not body.get("stream"):
                validate(answer.json(), answers["application/json"]["schema"], document)
                continue
            *events, done = answer.text.strip().split("\n\n")
            assert done == "data: [DONE]"
            assert len(events) > 1
            for event in events:
                content = json.loads(event.removeprefix("data: "))
                validate(content, answers["text/event-stream"]["x-event"], document)


def validate(value, schema, document):
    whole = schema | {"components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def test_every_route_is_in_the_document(document, served):
    known = {path for _, path in operations(document)}
    app = served.server.config.app
    while not hasattr(app, "routes"):
        app = app._app
    routes = {route.path for route in app.routes}
    # The page and the document itself are no operations of the API.
    assert routes - {path.replace("{model}", "{model:path}") for path in known} <= {
        "/",
        "/openapi.json",
    }
