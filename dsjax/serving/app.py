"""The routes: OpenAI's API over an engine, as an ASGI application."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from typing import Any

from fastapi import FastAPI, Request
from fastapi.middleware.cors import CORSMiddleware
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response
from starlette.types import ASGIApp

from dsjax.config import ServeConfig
from dsjax.data.generation_defaults import GenerationDefaults
from dsjax.engine import Engine
from dsjax.serving import answer_models as answers
from dsjax.serving import bodies, chat, completions
from dsjax.serving.errors import RequestError, bad_field
from dsjax.serving.event_stream import EventStream, unless_gone
from dsjax.serving.gate import Gate, Keys
from dsjax.serving.metrics import CONTENT_TYPE, Metrics
from dsjax.serving.page import add_page
from dsjax.serving.request_models import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from dsjax.serving.service import Service
from dsjax.serving.token_texts import spelled

_BODIES = (CompletionRequest, ChatCompletionRequest, TokenizeRequest, DetokenizeRequest)
_STREAMED = (answers.Completion, answers.ChatCompletionChunk)
_REFERENCE = "#/components/schemas/{model}"
_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"description": "A field cannot be done."},
    401: {"description": "No API key."},
    404: {"description": "No such model."},
    408: {"description": "The body did not come in time."},
    413: {"description": "The body is too large."},
    415: {"description": "The body is not JSON."},
    429: {"description": "The server is full; Retry-After says when to ask again."},
    500: {"description": "The text could not be made."},
    503: {"description": "The server is about to end."},
    504: {"description": "The text took too long."},
}


def make_app(
    engine: Engine,
    config: ServeConfig,
    defaults: GenerationDefaults | None = None,
    keys: Iterable[str] = (),
) -> tuple[ASGIApp, Service]:
    """Returns the application, and what its routes share.

    Args:
        engine: answers all requests; the application starts its thread and does not close it.
        config: limits and names.
        defaults: how text is made where a client does not say.
        keys: API keys; without one, everybody may ask.
    """
    service = Service(engine, config, defaults or GenerationDefaults())
    metrics = Metrics(service)

    @contextlib.asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        service.start()
        watcher = asyncio.create_task(metrics.watch_loop())
        try:
            yield
        finally:
            watcher.cancel()
            service.stop()

    app = FastAPI(
        title="dsjax",
        version="1",
        description="A DeepSeek-V2 model behind OpenAI's API.",
        lifespan=lifespan,
        docs_url=None,  # their pages take scripts from elsewhere
        redoc_url=None,
    )
    _add_errors(app)
    _add_texts(app, service)
    _add_tokens(app, service)
    _add_operations(app, service, metrics)
    add_page(app)
    _describe_bodies(app)
    if config.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(config.allowed_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id"],
        )
    return Gate(app, Keys(keys), config.log_prompts, metrics.request), service


def _responses(*more: int) -> dict[int | str, dict[str, Any]]:
    return {status: {**_REFUSALS[status], "model": answers.ErrorAnswer} for status in (401, *more)}


_POST = (400, 404, 408, 413, 415, 429, 500, 503, 504)


def _body(model: type) -> dict[str, Any]:
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}


def _streams(model: type) -> dict[int | str, dict[str, Any]]:
    """Describes a route that answers as JSON or as events."""
    schema = {"$ref": _REFERENCE.format(model=model.__name__)}
    said = f"With `stream`: events `data: ` and {model.__name__} as JSON, then `data: [DONE]`."
    events = {"schema": {"type": "string"}, "x-event": schema}
    return {200: {"description": said, "content": {"text/event-stream": events}}}


def _add_texts(app: FastAPI, service: Service) -> None:
    async def answer(request: Request, asked: Any, route: Any, stream: bool) -> Response:
        record = request.state.record
        if not stream:
            data = await unless_gone(request, route.whole(service, asked, record))
            return Response(data, media_type="application/json")
        # Entered here, so that what the engine refuses is an answer with its own status.
        stack = contextlib.AsyncExitStack()
        texts = await stack.enter_async_context(service.run(asked.requests))

        def end(how: str) -> None:
            if how != "done":
                record.finish = [how]

        events = route.streamed(service, asked, texts, record)
        return EventStream(events, service.config.stall_seconds, end, stack)

    @app.post(
        "/v1/completions",
        response_model=answers.Completion,
        responses=_responses(*_POST) | _streams(answers.Completion),
        openapi_extra=_body(CompletionRequest),
    )
    async def create_completion(request: Request) -> Response:
        """Continues texts or token ids."""
        body = await bodies.read(request, service, CompletionRequest)
        asked = await service.beside(completions.check, service, body, int(time.time()))
        return await answer(request, asked, completions, bool(body.stream))

    @app.post(
        "/v1/chat/completions",
        response_model=answers.ChatCompletion,
        responses=_responses(*_POST) | _streams(answers.ChatCompletionChunk),
        openapi_extra=_body(ChatCompletionRequest),
    )
    async def create_chat_completion(request: Request) -> Response:
        """Answers a conversation."""
        body = await bodies.read(request, service, ChatCompletionRequest)
        asked = await service.beside(chat.check, service, body, int(time.time()))
        return await answer(request, asked, chat, bool(body.stream))


def _add_tokens(app: FastAPI, service: Service) -> None:
    tokenizer = service.tokenizer
    refusals = _responses(400, 404, 408, 413, 415, 500, 503)

    def tokens(body: TokenizeRequest) -> bytes:
        service.check_model(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise bad_field("prompt", "either it or messages must be given")
        if body.messages is not None:
            service.check_messages(body.messages)
            prepared = service.conversations.prepare(body.messages, tools=body.tools)
            ids = list(prepared.prompt)
        else:
            assert body.prompt is not None
            service.check_size("prompt", body.prompt)
            encode = tokenizer.encode_prompt if body.add_special_tokens else tokenizer.encode
            ids = encode(body.prompt)
        found = answers.Tokens(count=len(ids), max_model_len=service.max_length, tokens=ids)
        if body.return_token_strs:
            found.token_strs = [spelled(tokenizer, token) for token in ids]
        return found.model_dump_json().encode()

    def text(body: DetokenizeRequest) -> bytes:
        service.check_model(body.model)
        return answers.Text(prompt=tokenizer.decode(body.tokens)).model_dump_json().encode()

    @app.post(
        "/tokenize",
        response_model=answers.Tokens,
        responses=refusals,
        openapi_extra=_body(TokenizeRequest),
    )
    async def tokenize(request: Request) -> Response:
        """Returns the token ids of a text or a conversation."""
        body = await bodies.read(request, service, TokenizeRequest)
        return Response(await service.beside(tokens, body), media_type="application/json")

    @app.post(
        "/detokenize",
        response_model=answers.Text,
        responses=refusals,
        openapi_extra=_body(DetokenizeRequest),
    )
    async def detokenize(request: Request) -> Response:
        """Returns the text of token ids."""
        body = await bodies.read(request, service, DetokenizeRequest)
        return Response(await service.beside(text, body), media_type="application/json")


def _add_operations(app: FastAPI, service: Service, metrics: Metrics) -> None:
    def described(name: str) -> answers.Model:
        return answers.Model(id=name, created=service.created, max_model_len=service.max_length)

    @app.get("/v1/models", responses=_responses())
    async def list_models() -> answers.ModelList:
        """Lists the names of the model."""
        return answers.ModelList(data=[described(name) for name in service.config.model_names])

    @app.get("/v1/models/{model:path}", responses=_responses(404))
    async def get_model(model: str) -> answers.Model:
        """Describes the model."""
        return described(service.check_model(model))

    @app.get("/health")
    async def health() -> answers.Status:
        """Says that the process answers."""
        return answers.Status()

    @app.get("/ready", responses={503: {**_REFUSALS[503], "model": answers.ErrorAnswer}})
    async def ready() -> answers.Status:
        """Says that requests are taken: not while the server ends, nor when the engine gave up."""
        if service.is_draining or service.engine.gave_up is not None:
            raise RequestError(503, "the server takes no requests")
        return answers.Status()

    metrics_answer = {"content": {"text/plain": {"schema": {"type": "string"}}}}

    @app.get("/metrics", response_class=Response, responses=_responses() | {200: metrics_answer})
    async def prometheus() -> Response:
        """Gives figures in Prometheus's text format."""
        text = await service.beside(metrics.text)
        return Response(text, headers={"content-type": CONTENT_TYPE})


def _add_errors(app: FastAPI) -> None:
    def as_answer(error: RequestError) -> Response:
        return JSONResponse(error.content(), error.status, error.headers)

    @app.exception_handler(RequestError)
    async def of_request(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestError)
        request.state.record.reason = error.code or error.kind
        return as_answer(error)

    @app.exception_handler(HTTPException)
    async def of_route(_: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        said = RequestError(error.status_code, str(error.detail), headers=error.headers)
        return as_answer(said)

    @app.exception_handler(Exception)
    async def of_ours(_: Request, error: Exception) -> Response:
        # Starlette raises it on, and uvicorn logs it with its traceback.
        return as_answer(RequestError(500, f"the server failed: {type(error).__name__}"))


def _describe_bodies(app: FastAPI) -> None:
    """Adds the models of bodies to the document: routes read them themselves, bounded."""
    made = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            document = made()
            wanted: list[tuple[Any, Any]] = [(model, "validation") for model in _BODIES]
            wanted += [(model, "serialization") for model in _STREAMED]
            _, schemas = models_json_schema(wanted, ref_template=_REFERENCE)
            components = document.setdefault("components", {}).setdefault("schemas", {})
            components |= schemas["$defs"]
        assert app.openapi_schema is not None
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
