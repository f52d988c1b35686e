"""Request bodies: bounded in size and time, then checked against their model."""

from __future__ import annotations

import asyncio

from fastapi import Request
from pydantic import BaseModel, ValidationError

from dsjax.serving.errors import RequestError
from dsjax.serving.service import Service

# Longer bodies are parsed beside the event loop.
_SHORT = 16 * 2**10
# Longer ones are parsed one at a time: lists in lists take a hundred times their JSON meanwhile.
_LONG = 2**20


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
    most = service.config.max_body_bytes
    length = request.headers.get("content-length")
    if length is not None and length.isdigit() and int(length) > most:
        raise _too_large(most)
    parts, size = [], 0
    try:
        async with asyncio.timeout(service.config.receive_seconds):
            while True:
                message = await request.receive()
                if message["type"] == "http.disconnect":
                    raise RequestError(499, "the client has gone away")
                part = message.get("body", b"")
                size += len(part)
                if size > most:
                    raise _too_large(most)
                service.hold(len(part), request.state.record)
                parts.append(part)
                if not message.get("more_body", False):
                    return b"".join(parts)
    except TimeoutError:
        raise RequestError(
            408, "the body did not come in time", headers={"Connection": "close"}
        ) from None


def _too_large(most: int) -> RequestError:
    return RequestError(
        413, f"the body is larger than {most} bytes", headers={"Connection": "close"}
    )


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
