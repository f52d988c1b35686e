"""The server's process: connections, their limits, and an end that lets texts finish."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import logging
import socket
import sys
from collections.abc import Iterable, Iterator
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from dsjax.config import ServeConfig
from dsjax.data.generation_defaults import GenerationDefaults
from dsjax.engine import Engine
from dsjax.serving.app import make_app
from dsjax.serving.service import Service

_LOG = logging.getLogger("dsjax.serving")

# Neither the engine's thread nor the event loop may hold the interpreter for longer.
_SWITCH_SECONDS = 0.0002
# What is left for answers to be sent when the texts have been ended.
_FAREWELL_SECONDS = 5.0


def _protocol(config: ServeConfig) -> type[HttpToolsProtocol]:
    """Returns a protocol that bounds heads, and the time until they have come."""

    class Bounded(HttpToolsProtocol):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            self._head_bytes = 0
            self._reads_head = True
            self._late: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > config.max_connections:
                transport.abort()
                return
            self._late = self.loop.call_later(config.receive_seconds, self._close_late)

        def connection_lost(self, exc: Exception | None) -> None:
            super().connection_lost(exc)
            if self._late is not None:
                self._late.cancel()

        def _close_late(self) -> None:
            if self._reads_head and not self.transport.is_closing():
                self.transport.close()

        def data_received(self, data: bytes) -> None:
            if self.parser is None:
                return
            if self._reads_head:
                self._head_bytes += len(data)
                if self._late is None:  # the head of a later request of this connection
                    self._late = self.loop.call_later(config.receive_seconds, self._close_late)
            super().data_received(data)
            too_large = self._reads_head and self._head_bytes > config.max_head_bytes
            if too_large and not self.transport.is_closing():
                self.send_400_response(f"The head is larger than {config.max_head_bytes} bytes")

        def on_headers_complete(self) -> None:
            self._reads_head = False
            if self._late is not None:
                self._late.cancel()
                self._late = None
            # An answer that nobody reads is ended with its connection.
            abort: dict[object, object] = {"connection": self.transport.abort}
            self.scope["extensions"] = {"dsjax.abort": abort}
            super().on_headers_complete()

        def on_header(self, name: bytes, value: bytes) -> None:
            self._size += len(name) + len(value)
            if self._size > config.max_head_bytes:
                raise ValueError("the head is too large")
            super().on_header(name, value)

        def on_message_begin(self) -> None:
            self._size = 0
            super().on_message_begin()

        def on_message_complete(self) -> None:
            super().on_message_complete()
            self._reads_head, self._head_bytes = True, 0

    return Bounded


class Server(uvicorn.Server):
    """Ends in two steps: texts may finish for a time, then they are ended with an error."""

    def __init__(self, config: uvicorn.Config, service: Service, drain_seconds: float) -> None:
        super().__init__(config)
        self.service = service
        self._drain_seconds = drain_seconds

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Begins the end; a second SIGINT does not wait for texts."""
        super().handle_exit(sig, frame)
        # uvicorn raises the signal again at the end, which ends the process by it: a server that
        # was told to end and has drained is a command that is done, with its engine closed.
        self._captured_signals.clear()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Takes no more connections and requests, and waits for those there are."""
        self.service.is_draining = True
        _LOG.info("ending: %d texts are under way", self.service.num_open)
        loop = asyncio.get_running_loop()
        late = loop.call_later(
            self._drain_seconds, self.service.end_all, "the server is shutting down"
        )
        try:
            await super().shutdown(sockets)
        finally:
            late.cancel()


def make_server(
    engine: Engine,
    config: ServeConfig,
    defaults: GenerationDefaults | None = None,
    keys: Iterable[str] = (),
) -> Server:
    """Returns a server that does not listen yet.

    Args:
        engine: answers all requests; is not closed.
        config: address, names and limits.
        defaults: how text is made where a client does not say.
        keys: API keys; without one, everybody may ask.
    """
    app, service = make_app(engine, config, defaults, keys)
    settings = uvicorn.Config(
        app,
        host=config.host,
        port=config.port,
        http=_protocol(config),
        loop="asyncio",  # lets the engine's thread run while it sends; uvloop does not
        ws="none",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
        timeout_keep_alive=round(config.keep_alive_seconds),
        timeout_graceful_shutdown=round(config.drain_seconds + _FAREWELL_SECONDS),
        backlog=min(config.max_connections, 2048),
    )
    return Server(settings, service, config.drain_seconds)


def serve(
    engine: Engine,
    config: ServeConfig,
    defaults: GenerationDefaults | None = None,
    keys: Iterable[str] = (),
) -> None:
    """Serves until SIGTERM or SIGINT, then lets the texts under way finish; see `make_server`.

    Raises:
        OSError: the address is taken, or is none of this machine.
    """
    # Bound here, so that a taken port is one line of the command.
    listening = bind(config)
    with contextlib.closing(listening), shared_interpreter():
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        _LOG.info("serving %s at http://%s:%d/v1", config.model_names[0], shown, port)
        make_server(engine, config, defaults, keys).run([listening])


@contextlib.contextmanager
def shared_interpreter() -> Iterator[None]:
    """Lets the engine's thread and the event loop share the interpreter, as a server needs it."""
    before = sys.getswitchinterval()
    sys.setswitchinterval(_SWITCH_SECONDS)
    # What is there at the start stays: to look through it for garbage holds all threads for 0.1 s
    # and more, again and again.
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
        sys.setswitchinterval(before)


def bind(config: ServeConfig) -> socket.socket:
    """Returns a socket at the server's address.

    Raises:
        OSError: the address is taken, or is none of this machine.
    """
    family = socket.AF_INET6 if ":" in config.host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((config.host, config.port))
    except OSError as error:
        listening.close()
        reason = error.strerror or str(error)
        raise OSError(f"serve.host={config.host!r} port={config.port}: {reason}") from None
    return listening
