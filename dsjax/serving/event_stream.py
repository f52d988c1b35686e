"""Server-sent events, for clients that read slowly, stop reading or go away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from fastapi import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from dsjax.serving.errors import RequestError

_FAREWELL_SECONDS = 0.05
DONE = b"data: [DONE]\n\n"


# Made once: `json.dumps` makes an encoder a call where it is given options.
to_json = json.JSONEncoder(ensure_ascii=False).encode


def event(content: Any) -> bytes:
    """Returns an event of JSON content."""
    return b"data: %b\n\n" % to_json(content).encode()


class EventStream(Response):
    """Sends events as they come; ends with the client, or when it reads nothing for too long."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        stall_seconds: float,
        on_end: Callable[[str], None] | None = None,
        resources: contextlib.AsyncExitStack | None = None,
    ) -> None:
        """Begins a stream.

        Args:
            events: what is sent; closed at the end, however that comes.
            stall_seconds: a client that takes nothing for so long is cut off.
            on_end: called with how it ended: "done", "error", "disconnected" or "stalled".
            resources: left when it has ended.
        """
        super().__init__()
        self.status_code = 200
        del self.headers["content-length"]
        self.headers["content-type"] = "text/event-stream; charset=utf-8"
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"  # of nginx, which else holds events back
        self._events = events
        self._stall_seconds = stall_seconds
        self._on_end = on_end
        self._resources = resources or contextlib.AsyncExitStack()
        self._blocked_at: float | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Sends the whole answer."""
        how = "disconnected"
        extensions = scope.get("extensions", {})
        task = asyncio.ensure_future(self._send_all(send, extensions.get("dsjax.send", send)))
        watchers = [
            asyncio.ensure_future(_gone(receive)),
            asyncio.ensure_future(self._stalled()),
        ]
        try:
            await asyncio.wait({task, *watchers}, return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                how = task.result()
            elif watchers[1].done():
                how = "stalled"
        finally:
            for one in (task, *watchers):
                one.cancel()
            await asyncio.gather(task, *watchers, return_exceptions=True)
            await self._resources.aclose()
            if self._on_end is not None:
                self._on_end(how)
        abort = extensions.get("dsjax.abort")
        if how == "stalled" and abort is not None:
            abort["connection"]()
            await asyncio.sleep(_FAREWELL_SECONDS)  # until the server knows that it is closed

    async def _send_all(self, send: Send, send_part: Send) -> str:
        how = "done"
        time = asyncio.get_running_loop().time
        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        async with contextlib.aclosing(self._events):  # type: ignore[type-var]
            try:
                async for data in self._events:
                    self._blocked_at = time()
                    await send_part({"type": "http.response.body", "body": data, "more_body": True})
                    self._blocked_at = None
            except RequestError as error:
                how = "error"
                data = event(error.content())
                await send({"type": "http.response.body", "body": data, "more_body": True})
        await send({"type": "http.response.body", "body": DONE, "more_body": False})
        return how

    async def _stalled(self) -> None:
        time = asyncio.get_running_loop().time
        while True:
            await asyncio.sleep(self._stall_seconds / 4)
            since = self._blocked_at
            if since is not None and time() - since >= self._stall_seconds:
                return


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


async def unless_gone(request: Request, answer: Awaitable[Any]) -> Any:
    """Waits for an answer while the client is there.

    Raises:
        RequestError: it has gone away; nobody reads that.
    """
    task = asyncio.ensure_future(answer)
    watcher = asyncio.ensure_future(_gone(request.receive))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise RequestError(499, "the client has gone away")
    finally:
        for one in (task, watcher):
            one.cancel()
        await asyncio.gather(task, watcher, return_exceptions=True)
