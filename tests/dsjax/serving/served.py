"""A server over a small engine, listening on loopback, as tests want it."""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from dsjax.config import ServeConfig
from dsjax.data.chat import ChatTemplate
from dsjax.data.generation_defaults import GenerationDefaults
from dsjax.engine import Engine
from dsjax.serving.server import Server, bind, make_server
from tests.dsjax.engine.small_engine import TOKENIZER, an_engine

TEMPLATE = (
    "{% for m in messages %}{{ m['role'][0] }}:{{ m['content'] }}\n{% endfor %}"
    "{% if add_generation_prompt %}a:{% endif %}"
)


class Served:
    """A server that runs in a thread.

    Attributes:
        url: its address.
        port: of it.
        engine: answers.
        server: the server.
    """

    def __init__(self, port: int, engine: Engine, server: Server) -> None:
        self.url = f"http://127.0.0.1:{port}"
        self.port = port
        self.engine = engine
        self.server = server

    def wait_until_idle(self, seconds: float = 60.0) -> None:
        """Waits until no page is held and no text is open."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            figures = self.engine.figures()
            held = figures.pages_held, figures.num_running, figures.num_waiting
            if held == (0, 0, 0) and self.server.service.num_open == 0:
                return
            time.sleep(0.01)
        raise AssertionError(f"not idle: {self.engine.figures()} {self.server.service.num_open}")


@contextlib.contextmanager
def serving(
    engine: Engine,
    keys: tuple[str, ...] = (),
    defaults: GenerationDefaults | None = None,
    **limits: Any,
) -> Iterator[Served]:
    """Runs a server over an engine."""
    config = replace(ServeConfig(port=0, model_names=("small", "other")), **limits)
    listening = bind(config)
    server = make_server(engine, config, defaults, keys)
    thread = threading.Thread(target=server.run, args=([listening],), name="server")
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive()
            time.sleep(0.005)
        yield Served(listening.getsockname()[1], engine, server)
    finally:
        server.should_exit = True
        thread.join(30)
        listening.close()


@contextlib.contextmanager
def a_server(keys: tuple[str, ...] = (), **limits: Any) -> Iterator[Served]:
    """Runs a server over the small engine of the engine's tests."""
    with an_engine() as engine:
        # A tokenizer of its own, as the shared one has no template.
        engine.tokenizer = type(TOKENIZER)()
        engine.tokenizer.chat_template = ChatTemplate(TEMPLATE, "", "")
        with serving(engine, keys, **limits) as served:
            yield served
