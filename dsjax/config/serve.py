"""How a server listens, and what it takes from its clients."""

from __future__ import annotations

from dataclasses import dataclass

from dsjax.config.fitting import checked
from dsjax.config.model import require, require_not_negative, require_positive


@checked
@dataclass(frozen=True)
class ServeConfig:
    """A server's address, names and limits; times in seconds, sizes in bytes.

    Attributes:
        host: address to listen on; the default takes no connection from other machines.
        port: port to listen on; 0 takes a free one.
        model_names: what the model is called; the first stands in answers, a request may use any.
        allowed_origins: web origins whose pages may call the server (CORS); none by default.
        log_prompts: whether logs hold prompts and texts.
        max_open: texts that are made or wait at once; more are refused with 429.
        max_n: texts that one request may ask for, over all its prompts.
        max_prompts: prompts of one request.
        max_body_bytes: of a request.
        max_held_body_bytes: of all requests under way; what would be more is refused with 429.
        max_head_bytes: of a request's line and headers.
        max_connections: connections at once; more are closed.
        receive_seconds: until a request's head, and then its body, must have come.
        stall_seconds: a client that reads nothing for so long while a text waits is cut off.
        request_seconds: a text is ended so long after it was asked for.
        keep_alive_seconds: a connection without a request is closed after it.
        drain_seconds: texts under way may go on so long after SIGTERM.
        retry_seconds: what `Retry-After` says where the server is full.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    model_names: tuple[str, ...] = ("model",)
    allowed_origins: tuple[str, ...] = ()
    log_prompts: bool = False
    max_open: int = 1024
    max_n: int = 128
    max_prompts: int = 1024
    max_body_bytes: int = 8 * 2**20
    max_held_body_bytes: int = 256 * 2**20
    max_head_bytes: int = 64 * 2**10
    max_connections: int = 4096
    receive_seconds: float = 30.0
    stall_seconds: float = 60.0
    request_seconds: float = 3600.0
    keep_alive_seconds: float = 65.0
    drain_seconds: float = 120.0
    retry_seconds: float = 1.0

    def __post_init__(self) -> None:
        require(bool(self.host), "serve.host", self.host, "must not be empty")
        require(0 <= self.port < 2**16, "serve.port", self.port, "must be in [0, 65536)")
        names = self.model_names
        require(bool(names) and all(names), "serve.model_names", names, "must hold a name")
        counts = ("max_open", "max_n", "max_prompts", "max_connections")
        sizes = ("max_body_bytes", "max_held_body_bytes", "max_head_bytes")
        times = ("receive_seconds", "stall_seconds", "request_seconds", "keep_alive_seconds")
        named = {name: getattr(self, name) for name in counts + sizes + times}
        require_positive("serve", **named)
        require(
            self.max_held_body_bytes >= self.max_body_bytes,
            "serve.max_held_body_bytes",
            self.max_held_body_bytes,
            f"must not be less than max_body_bytes={self.max_body_bytes}",
        )
        require_not_negative(
            "serve", drain_seconds=self.drain_seconds, retry_seconds=self.retry_seconds
        )
