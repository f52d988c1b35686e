"""Keys, limits, clients that misbehave, and the end of a server."""

import asyncio
import contextlib
import json
import socket
import threading
import time
from collections.abc import Iterator

import httpx
import pytest

from dsjax.config import ServeConfig
from dsjax.serving.app import make_app
from tests.dsjax.engine.small_engine import an_engine
from tests.dsjax.serving.served import Served, a_server

ASKED = {"prompt": "Hello", "max_tokens": 4, "temperature": 0}
# It goes on as long as the context has room.
LONG = {"prompt": "Hello", "max_tokens": 110, "ignore_eos": True, "stream": True}


@pytest.fixture(scope="module")
def served() -> Iterator[Served]:
    limits = {"max_body_bytes": 2**20, "max_open": 40, "receive_seconds": 1.0, "max_n": 16}
    with a_server(("secret", "another"), **limits) as server:
        yield server


@pytest.fixture(scope="module")
def client(served: Served) -> Iterator[httpx.Client]:
    key = {"Authorization": "Bearer another"}
    with httpx.Client(base_url=served.url, headers=key, timeout=60) as made:
        yield made


def raw(served: Served, data: bytes) -> bytes:
    """Sends bytes, and returns all that comes until the server closes."""
    with socket.create_connection(("127.0.0.1", served.port), timeout=10) as connection:
        found = b""
        # A server that closes before it has read all resets the connection.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            connection.sendall(data)
        with contextlib.suppress(ConnectionResetError):
            while part := connection.recv(65536):
                found += part
        return found


def head(size: int, path: str = "/v1/completions", more: str = "") -> bytes:
    return (
        f"POST {path} HTTP/1.1\r\nHost: here\r\nAuthorization: Bearer secret\r\n{more}"
        f"Content-Type: application/json\r\nContent-Length: {size}\r\n\r\n"
    ).encode()


def message(content: dict) -> bytes:
    body = json.dumps(content).encode()
    return head(len(body)) + body


def test_keys(served, client):
    with httpx.Client(base_url=served.url) as other:
        for given in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}):
            for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing"):
                answer = other.get(path, headers=given)
                assert answer.status_code == 401
                assert answer.json()["error"]["code"] == "invalid_api_key"
        assert other.get("/health").json() == {"status": "ok"}
        assert other.get("/ready").status_code == 200
    assert client.get("/v1/models").status_code == 200


def test_request_ids_come_back(client):
    assert client.get("/health", headers={"X-Request-Id": "a-1"}).headers["x-request-id"] == "a-1"
    made = client.get("/health", headers={"X-Request-Id": "spaces are none"}).headers
    assert len(made["x-request-id"]) == 32
    assert "access-control-allow-origin" not in client.get("/health").headers


@pytest.mark.parametrize(
    ("body", "status", "code"),
    [
        (b"{", 400, "invalid_json"),
        (b'{"prompt": "\xff"}', 400, "invalid_json"),
        (b'{"prompt": "\\ud800"}', 400, "invalid_json"),
        (b"[" * 100_000, 400, "invalid_json"),
        (b'{"prompt": ' + b"[" * 90_000 + b"]" * 90_000 + b"}", 400, "invalid_json"),
        (b"{}", 400, None),
        (b"[]", 400, None),
        (b'{"prompt": "' + b"a" * 2**21 + b'"}', 413, None),
        (b'{"prompt": "a", "temperature": NaN}', 400, None),
        # Refused at the first fault, of however many.
        (b'{"prompt": [' + b"[1]," * 200_000 + b"[true]]}", 400, None),
        (b'{"prompt": "a", ' + b'"x": 1, ' * 99_999 + b'"y": 1}', 400, "unknown_parameter"),
    ],
)
def test_bad_bodies(client, body, status, code):
    headers = {"Content-Type": "application/json"}
    for content in (body, iter([body[:1000], body[1000:]])):  # with a length, and in chunks
        answer = client.post("/v1/completions", content=content, headers=headers)
        assert answer.status_code == status
        assert answer.json()["error"]["code"] == code


def test_prompts_are_bounded_before_they_are_read(client):
    long = {"role": "user", "content": "a" * 600_000}
    parts = {"role": "user", "content": [{"type": "text", "text": "a" * 300_000}] * 3}
    for path, body in (
        ("/v1/completions", {"prompt": "a" * 900_000}),
        ("/v1/chat/completions", {"messages": [long]}),
        ("/v1/chat/completions", {"messages": [parts]}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "a" * 900}] * 999}),
        ("/tokenize", {"prompt": "a" * 900_000}),
        ("/tokenize", {"messages": [parts]}),
    ):
        answer = client.post(path, json=body)
        assert answer.status_code == 400
        error = answer.json()["error"]
        assert error["code"] == "context_length_exceeded"
        assert error["param"].startswith(("prompt", "messages[")), error


def test_what_many_bodies_may_hold_is_bounded():
    body = message(ASKED | {"prompt": " " * 2**20})
    with a_server(max_body_bytes=2**21, max_held_body_bytes=2**21) as served:
        with contextlib.ExitStack() as held:
            for _ in range(2):  # of each nearly all has come
                one = held.enter_context(socket.create_connection(("127.0.0.1", served.port)))
                one.sendall(body[:-1000])
            end = time.monotonic() + 30
            while served.server.service.held_bytes < 2**21 - 2**17 and time.monotonic() < end:
                time.sleep(0.01)
            refused = httpx.post(
                f"{served.url}/v1/completions",
                content=body.split(b"\r\n\r\n")[1],
                headers={"Content-Type": "application/json"},
                timeout=60,
            )
            assert refused.status_code == 429
            assert int(refused.headers["retry-after"]) >= 1
        end = time.monotonic() + 30
        while served.server.service.held_bytes and time.monotonic() < end:
            time.sleep(0.01)
        assert served.server.service.held_bytes == 0
        assert httpx.post(f"{served.url}/v1/completions", json=ASKED, timeout=60).status_code == 200


def test_a_form_is_no_json(client):
    answer = client.post("/v1/completions", content=b"{}", headers={"Content-Type": "text/plain"})
    assert answer.status_code == 415


def test_heads_are_bounded_in_size_and_time(served):
    many = b"".join(b"X-%d: %s\r\n" % (index, b"a" * 1000) for index in range(200))
    begin = b"GET /health HTTP/1.1\r\nHost: here\r\n"
    for large in (begin + many + b"\r\n", begin + b"X: " + b"a" * 200_000):
        answer = raw(served, large)  # or nothing, where the connection was reset first
        assert not answer or b" 400 " in answer
    began = time.monotonic()
    assert raw(served, begin + b"X: a") == b""  # and no more: closed when its time is over
    assert 0.5 < time.monotonic() - began < 5
    assert b" 408 " in raw(served, head(100) + b"{")


def test_a_body_that_is_too_large_is_refused_as_that_however_it_comes(served):
    chunked = head(0).replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    part = b"180000\r\n" + b"a" * 0x180000 + b"\r\n"  # 1.5 MiB, and never more
    assert b" 413 " in raw(served, chunked + part)
    # Who asks before it sends is not told to.
    began = time.monotonic()
    answer = raw(served, head(2**22, more="Expect: 100-continue\r\n"))
    assert b" 413 " in answer
    assert b" 100 " not in answer
    assert time.monotonic() - began < 0.9


def test_a_full_server_says_when_to_ask_again(served, client):
    with contextlib.ExitStack() as open_ones:
        for _ in range(3):
            asked = LONG | {"n": 13}
            answer = open_ones.enter_context(client.stream("POST", "/v1/completions", json=asked))
            assert answer.status_code == 200
        refused = client.post("/v1/completions", json=ASKED | {"n": 2})
        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
    served.wait_until_idle()
    assert client.post("/v1/completions", json=ASKED).status_code == 200


def test_a_client_that_leaves_frees_its_pages(served, client):
    steps = served.engine.figures().steps
    with client.stream("POST", "/v1/completions", json=LONG) as answer:
        next(answer.iter_bytes())
    served.wait_until_idle()
    with socket.create_connection(("127.0.0.1", served.port)) as connection:
        connection.sendall(message(LONG | {"stream": False}))
        while served.engine.figures().num_running == 0:
            time.sleep(0.001)
    served.wait_until_idle()
    assert served.engine.figures().steps - steps < 200  # 220 tokens were asked for


def test_a_client_that_leaves_frees_its_pages_in_the_next_turn(monkeypatch):
    engine = an_engine()
    monkeypatch.setattr(engine, "start", lambda: None)  # its turns are run here, one by one
    app, service = make_app(engine, ServeConfig())
    body = json.dumps(LONG).encode()
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b""}
    scope |= {"headers": [(b"content-type", b"application/json")], "client": ("127.0.0.1", 1)}

    async def run() -> None:
        service.start()
        gone, parts, asked = asyncio.Event(), 0, False

        async def receive() -> dict:
            nonlocal asked
            if asked:
                await gone.wait()
                return {"type": "http.disconnect"}
            asked = True
            return {"type": "http.request", "body": body}

        async def send(message: dict) -> None:
            nonlocal parts
            parts += message["type"] == "http.response.body"

        task = asyncio.ensure_future(app(scope, receive, send))  # type: ignore[arg-type]
        while parts < 3:
            engine._run_turn()
            assert engine.after_turn is not None
            engine.after_turn()
            await asyncio.sleep(0.001)
        assert engine.figures().pages_held > 0
        gone.set()
        await task
        engine._run_turn()
        assert engine.figures().pages_held == 0

    asyncio.run(run())
    service.stop()
    engine.close()


def test_metrics(client):
    client.post("/v1/completions", json=ASKED)
    text = client.get("/metrics").text
    assert "dsjax_tokens_total" in text
    assert 'dsjax_request_seconds_count{path="/v1/completions",status="200"}' in text
    assert "dsjax_event_loop_lag_seconds_bucket" in text


def test_a_reader_that_stops_is_cut_off():
    with a_server(stall_seconds=0.4) as served:
        # Answers of many log-probabilities fill what the kernel holds for a reader.
        asked = LONG | {"n": 100, "logprobs": 20, "max_tokens": 100}
        with socket.socket() as connection:
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            connection.connect(("127.0.0.1", served.port))
            body = json.dumps(asked).encode()
            connection.sendall(head(len(body)) + body)
            time.sleep(0.2)
            served.wait_until_idle(60)
            connection.settimeout(10)
            found = b""
            with contextlib.suppress(ConnectionResetError):
                while part := connection.recv(65536):
                    found += part
            assert b"[DONE]" not in found


def test_texts_under_way_are_ended_with_the_server():
    found: list[str] = []

    def read(url: str) -> None:
        with httpx.stream("POST", f"{url}/v1/completions", json=LONG, timeout=60) as answer:
            found.append("".join(answer.iter_text()))

    for drain, last in ((60.0, '"finish_reason": "length"'), (0.0, "shutting down")):
        with a_server(drain_seconds=drain) as served:
            thread = threading.Thread(target=read, args=(served.url,))
            thread.start()
            while served.engine.figures().num_running == 0:
                time.sleep(0.001)
            served.server.should_exit = True
            thread.join(60)
            assert last in found[-1]
            assert found[-1].endswith("data: [DONE]\n\n")
