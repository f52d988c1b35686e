"""What every request passes first: its id, its key, and a line of log when it is answered."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import re
import sys
import time
import uuid
from collections.abc import Callable, Iterable
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dsjax.serving.errors import RequestError
from dsjax.serving.usage import Record

LOG = logging.getLogger("dsjax.serving")

# What tells nothing of the model and runs nothing: a balancer asks it, a browser opens it.
OPEN_PATHS = frozenset({"/", "/health", "/ready"})
_QUIET_PATHS = frozenset({"/health", "/ready", "/metrics"})
_REQUEST_ID = re.compile(rb"[\w.:-]{1,128}", re.ASCII)


class Keys:
    """The API keys; without one, everybody may ask."""

    def __init__(self, keys: Iterable[str]) -> None:
        self._digests = [_digest(key.encode()) for key in keys]

    def admit(self, header: bytes | None) -> bool:
        """Whether an `Authorization` header has a key, in a time that does not depend on which."""
        if not self._digests:
            return True
        kind, _, token = (header or b"").partition(b" ")
        given = _digest(token.strip())
        found = False
        for digest in self._digests:
            found |= hmac.compare_digest(digest, given)
        return found and kind.lower() == b"bearer"


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


class Gate:
    """The outermost application."""

    def __init__(
        self,
        app: ASGIApp,
        keys: Keys,
        log_prompts: bool,
        count: Callable[[str, int, float], None],
    ) -> None:
        self._app = app
        self._keys = keys
        self._log_prompts = log_prompts
        self._count = count
        self._entry = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answers a request, or passes it on."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.monotonic()
        # Requests that come at once begin one a turn of the event loop: texts go on between.
        async with self._entry:
            await asyncio.sleep(0)
        headers = dict(scope["headers"])
        given = headers.get(b"x-request-id", b"")
        request_id = given if _REQUEST_ID.fullmatch(given) else uuid.uuid4().hex.encode()
        record = Record()
        scope.setdefault("state", {})["record"] = record
        # For the many parts of a stream: what wraps `send` looks at the beginning of an answer.
        scope.setdefault("extensions", {})["dsjax.send"] = send
        status = 0

        async def send_on(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", ()), (b"x-request-id", request_id)]
            await send(message)

        try:
            if scope["path"] in OPEN_PATHS or self._keys.admit(headers.get(b"authorization")):
                await self._app(scope, receive, send_on)
            else:
                error = RequestError(
                    401,
                    "an API key is needed: send it as Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
                await send_error(error, send_on)
        finally:
            for end in record.on_end:
                end()
            if "route" in scope:  # one of ours: any other path would be one more label
                self._count(scope["route"].path, status, time.monotonic() - began)
            if scope["path"] not in _QUIET_PATHS or status >= 500:
                self._log(scope, request_id, status, time.monotonic() - began, record)

    def _log(
        self, scope: Scope, request_id: bytes, status: int, seconds: float, record: Record
    ) -> None:
        client = scope.get("client")
        line: dict[str, Any] = {
            "event": "request",
            "id": request_id.decode(),
            "client": client[0] if client else None,
            "method": scope["method"],
            "path": scope["path"][:256],
            "status": status,
            "seconds": round(seconds, 4),
        }
        if record.prompt_tokens:
            line |= {"prompt_tokens": record.prompt_tokens, "tokens": record.completion_tokens}
        if record.finish:
            line["finish"] = record.finish if len(record.finish) > 1 else record.finish[0]
        if record.reason:
            line["reason"] = record.reason
        if self._log_prompts:
            line |= {"request": record.request, "texts": record.texts}
        LOG.info("request", extra={"line": line})


async def send_error(error: RequestError, send: Send) -> None:
    """Sends an error as a whole answer."""
    body = json.dumps(error.content(), ensure_ascii=False).encode("utf-8", "replace")
    headers = {"content-type": "application/json", "content-length": str(len(body))}
    pairs = [
        (name.lower().encode(), value.encode()) for name, value in (headers | error.headers).items()
    ]
    await send({"type": "http.response.start", "status": error.status, "headers": pairs})
    await send({"type": "http.response.body", "body": body})


class JsonLines(logging.Formatter):
    """A line of JSON a record."""

    def format(self, record: logging.LogRecord) -> str:
        """Returns the line."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
        }
        more = getattr(record, "line", None)
        line |= {"event": "log", "message": record.getMessage()} if more is None else more
        if record.exc_info:
            line["traceback"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False)


def log_as_json() -> None:
    """Writes what the server, the engine and uvicorn say to stderr as lines of JSON."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("dsjax", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO)
    for name in ("uvicorn.error", "uvicorn.access"):
        logging.getLogger(name).handlers = []
        logging.getLogger(name).propagate = True
