"""Request bodies: bounded in size and time, then checked against their model."""

from __future__ import annotations

import asyncio
import contextlib

from fastapi import Request
from pydantic import BaseModel, ValidationError

from dsjax.serving.errors import RequestError
from dsjax.serving.service import Service

# Longer bodies are parsed beside the event loop.
_SHORT = 16 * 2**10
# Longer ones are parsed one at a time: lists in lists take a hundred times their JSON meanwhile.
_LONG = 2**20
_MOST_DISCARDED = 64 * 2**20


async def read[M: BaseModel](request: Request, service: Service, model: type[M]) -> M:
    """Returns a request's body.

    Raises:
        RequestError: it is too large, comes too slowly, is no JSON, or does not fit the model.
    """
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise RequestError(415, "Content-Type must be application/json", param=None)
    data = await _bytes(request, service)
    if service.config.log_prompts:
        request.state.record.request = data.decode("utf-8", "replace")
    if len(data) <= _SHORT:
        return _parsed(data, model)
    if len(data) <= _LONG:
        return await service.beside(_parsed, data, model)
    async with service.long_bodies:
        return await service.beside(_parsed, data, model)


async def _bytes(request: Request, service: Service) -> bytes:
    most, seconds = service.config.max_body_bytes, service.config.receive_seconds
    length = request.headers.get("content-length")
    data = None
    if length is None or not length.isdigit() or int(length) <= most:
        data = await _received(request, service)
    if data is not None:
        return data
    # Who asks before it sends sends nothing, unless it is told to.
    if "expect" not in request.headers:
        await _discard(request, seconds)
    raise RequestError(
        413, f"the body is larger than {most} bytes", headers={"Connection": "close"}
    )


async def _received(request: Request, service: Service) -> bytes | None:
    """Returns what comes, or None as soon as it is too much."""
    parts, size = [], 0
    try:
        async with asyncio.timeout(service.config.receive_seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise RequestError(499, "the client has gone away")
                part = message.get("body", b"")
                size += len(part)
                if size > service.config.max_body_bytes:
                    return None
                service.hold(len(part), request.state.record)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestError(
            408, "the body did not come in time", headers={"Connection": "close"}
        ) from None


async def _discard(request: Request, seconds: float) -> None:
    """Reads on and keeps nothing: a client that still sends loses the answer as it is closed."""
    size = 0
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            while size < _MOST_DISCARDED:
                message = await request.receive()
                if message["type"] == "http.disconnect" or not message.get("more_body", False):
                    return
                size += len(message.get("body", b""))


def _parsed[M: BaseModel](data: bytes, model: type[M]) -> M:
    try:
        return model.model_validate_json(data)
    except ValidationError as error:
        raise _refusal(error) from None


def _refusal(error: ValidationError) -> RequestError:
    """Returns one line for what pydantic found: the fault that says most."""
    faults = error.errors(include_url=False, include_context=False, include_input=False)
    # Of a union there is a fault for each member: the one that reached deepest is what was meant.
    fault = max(faults, key=lambda one: len(one["loc"]))
    unknown = [one for one in faults if one["type"] == "extra_forbidden"]
    if unknown:
        name = str(unknown[0]["loc"][-1])[:200]
        return RequestError(
            400,
            f"Unrecognized request argument supplied: {name}",
            param=name,
            code="unknown_parameter",
        )
    if fault["type"] == "json_invalid":
        reason = fault["msg"].removeprefix("Invalid JSON: ")
        return RequestError(400, f"the body is not JSON: {reason}", code="invalid_json")
    param = _place(fault["loc"])
    said = fault["msg"].removeprefix("Value error, ").removeprefix("Input ")
    said = said[:1].lower() + said[1:]
    if not param:
        return RequestError(400, f"the body {said}")
    return RequestError(400, f"{param}: {said}", param=param)


def _place(location: tuple[int | str, ...]) -> str:
    """Returns a field's path, without what pydantic says of a union's members."""
    place = ""
    for part in location:
        if isinstance(part, int):
            place += f"[{part}]"
        elif (part.isidentifier() and part not in _MEMBERS) or not place:
            place += f".{part}" if place else part
    return place[:200]


_MEMBERS = {"str", "int", "float", "bool", "none"}
