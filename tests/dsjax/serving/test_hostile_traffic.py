"""A thousand requests in flight, most of them bad, against a server's process; then its ends."""

import asyncio
import collections
import contextlib
import json
import os
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

pytestmark = pytest.mark.slow

REPOSITORY = Path(__file__).resolve().parents[3]
LIMITS = {
    "max_open": 400,
    "receive_seconds": 8.0,
    "stall_seconds": 3.0,
    "drain_seconds": 60.0,
    "max_held_body_bytes": 64 * 2**20,
}
MANY = 1000
# One long body while it is parsed, those held at once, and what the rest costs: 0.7 to 1.0 GB were
# seen; it was 3.6 where all faults of a body were kept.
MOST_MEMORY = 1536 * 2**20
KEY = "Authorization: Bearer secret\r\n"
ASKED: dict[str, Any] = {"prompt": "Hello", "max_tokens": 6, "temperature": 0, "ignore_eos": True}
EXPLODES = "(((a{1,30}){1,30}){1,30}){1,30}"


class Process:
    """A server's process, started and waited for."""

    def __init__(self, port: int, log: Path) -> None:
        self.port = port
        self.url = f"http://127.0.0.1:{port}"
        begun = time.monotonic()
        limits = [f"{name}={value}" for name, value in LIMITS.items()]
        with log.open("ab") as written:
            self.process = psutil.Popen(
                [sys.executable, "-m", "tests.dsjax.serving.small_server", str(port), *limits],
                cwd=REPOSITORY,
                env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
                stdout=written,
                stderr=subprocess.STDOUT,
            )
        while True:
            assert self.process.poll() is None, log.read_text("utf-8")[-3000:]
            assert time.monotonic() - begun < 300
            with contextlib.suppress(httpx.TransportError):
                if httpx.get(f"{self.url}/ready").status_code == 200:
                    break
            time.sleep(0.1)
        self.seconds = time.monotonic() - begun

    def figure(self, name: str) -> float:
        """Returns one of /metrics."""
        answer = httpx.get(
            f"{self.url}/metrics", headers={"Authorization": "Bearer secret"}, timeout=60
        )
        found = re.search(rf"^{name} (\S+)$", answer.text, re.MULTILINE)
        assert found, answer.text
        return float(found[1])

    def wait_until_idle(self, seconds: float) -> None:
        """Waits until no text is open and no page is held."""
        names = ("dsjax_open", "dsjax_running", "dsjax_waiting", "dsjax_pages_held")
        end = time.monotonic() + seconds
        while any(found := {name: self.figure(name) for name in names}.values()):
            assert time.monotonic() < end, found
            time.sleep(0.1)


def a_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def message(body: bytes | dict, path: str = "/v1/completions", head: str = KEY) -> bytes:
    data = body if isinstance(body, bytes) else json.dumps(body).encode()
    return (
        f"POST {path} HTTP/1.1\r\nHost: here\r\n{head}Connection: close\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(data)}\r\n\r\n"
    ).encode() + data


def chat(**more: Any) -> bytes:
    asked = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 6} | more
    return message(asked, "/v1/chat/completions")


def in_chunks(data: bytes) -> bytes:
    head = message(b"").replace(b"Content-Length: 0", b"Transfer-Encoding: chunked")
    return head + b"%x\r\n%b\r\n0\r\n\r\n" % (len(data), data)


# What is sent, the statuses that may come back, and what the client does: it reads all, goes away
# after the first bytes, goes away at once (with a reset), or never reads.
FULL = 429
KINDS: dict[str, tuple[bytes, set[int], str]] = {
    "completion": (message(ASKED), {200, FULL}, "read"),
    "stream": (message(ASKED | {"stream": True}), {200, FULL}, "read"),
    "chat": (chat(), {200, FULL}, "read"),
    "chat stream": (chat(stream=True, n=2), {200, FULL}, "read"),
    "leaves a stream": (message(ASKED | {"stream": True, "max_tokens": 100}), set(), "leave"),
    "leaves an answer": (message(ASKED | {"max_tokens": 100}), set(), "reset"),
    "leaves a body": (message(b" " * 1000)[:-500], set(), "reset"),
    "never reads": (
        message(ASKED | {"stream": True, "max_tokens": 60, "n": 8, "logprobs": 20}),
        set(),
        "idle",
    ),
    "long prompt": (message(ASKED | {"prompt": "a" * 500}), {400}, "read"),
    "longer prompt": (message(ASKED | {"prompt": "a" * 2_000_000}), {400, FULL}, "read"),
    "too many tokens": (message(ASKED | {"max_tokens": 10**6}), {400}, "read"),
    "no JSON": (message(b'{"prompt": "a", '), {400}, "read"),
    "no UTF-8": (message(b'{"prompt": "\xff\xfe"}'), {400}, "read"),
    "half a character": (message(b'{"prompt": "\\ud800"}'), {400}, "read"),
    "10 MB": (message(b'{"prompt": "' + b"a" * 10_000_000 + b'"}'), {413, 0}, "read"),
    "10 MB in a chunk": (in_chunks(b'{"prompt": "' + b"a" * 10_000_000), {413, FULL, 0}, "read"),
    "7 MB of lists": (
        message(b'{"prompt": [' + b"[1]," * 1_750_000 + b"[1]]}"),
        {400, FULL},
        "read",
    ),
    "deep": (message(b'{"prompt": ' + b"[" * 100_000), {400}, "read"),
    "deep schema": (
        message(b'{"prompt": "a", "response_format": ' + b'{"a":' * 150 + b"1" + b"}" * 151),
        {400},
        "read",
    ),
    "regex": (
        message(ASKED | {"structured_outputs": {"regex": EXPLODES}}),
        {200, 400, FULL},
        "read",
    ),
    "another regex": (
        chat(structured_outputs={"regex": "(a|a|aa)*" * 60 + "b"}),
        {200, 400, FULL},
        "read",
    ),
    "wrong key": (message(ASKED, head="Authorization: Bearer guess\r\n"), {401}, "read"),
    "no key": (message(ASKED, head=""), {401}, "read"),
    "flood of headers": (
        message(ASKED, head=KEY + "".join(f"X-{i}: {'a' * 900}\r\n" for i in range(300))),
        {400, 0},
        "read",
    ),
    "long header": (b"GET /health HTTP/1.1\r\nX: " + b"a" * 500_000, {400, 0}, "read"),
    "no end of the head": (b"POST /v1/completions HTTP/1.1\r\nHost: ", {0, 400}, "read"),
    "no HTTP": (
        b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" * 5 + b"\r\n\r\n",
        {400, 0},
        "read",
    ),
    "no path": (message(ASKED, "/v1/" + "a" * 5000), {404}, "read"),
}
# A few of what costs the clients' process much.
FEW = {"never reads": 12, "10 MB": 12, "10 MB in a chunk": 12, "7 MB of lists": 6}
FEW |= {"longer prompt": 12, "regex": 12, "another regex": 12}


async def one(port: int, kind: str, delay: float) -> tuple[str, int, bytes]:
    """Sends one request as its kind wants; returns the status, 0 for none, and what came."""
    data, _, does = KINDS[kind]
    await asyncio.sleep(delay)
    made = socket.socket()
    if does == "idle":
        made.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    if does == "reset":
        made.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    made.setblocking(False)
    await asyncio.get_running_loop().sock_connect(made, ("127.0.0.1", port))
    reader, writer = await asyncio.open_connection(sock=made, limit=1024)
    found = b""
    try:
        writer.write(data)
        # A server that refuses a body before it has come may reset the connection.
        with contextlib.suppress(ConnectionError):
            if does != "idle":
                await writer.drain()
            if does == "read":
                found = await reader.read()
                while part := await reader.read(2**16):
                    found += part
            elif does == "leave":
                found = await reader.read(300)
            else:
                await asyncio.sleep(0.2 if does == "reset" else 1.5 * LIMITS["stall_seconds"])
    finally:
        writer.transport.abort()
        if does != "reset":
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()
    status = int(found[9:12]) if found.startswith(b"HTTP/1.1 ") else 0
    return kind, status, found


async def flood(port: int, kinds: list[str], spread: float) -> list[tuple[str, int, bytes]]:
    """Sends requests, all of them begun within so many seconds."""
    rng = random.Random(1)
    waits = [rng.uniform(0, spread) for _ in kinds]
    async with asyncio.timeout(240):
        return await asyncio.gather(
            *(one(port, kind, wait) for kind, wait in zip(kinds, waits, strict=True))
        )


def a_thousand() -> list[str]:
    rng = random.Random(0)
    kinds = [kind for kind, count in FEW.items() for _ in range(count)]
    rest = [kind for kind in KINDS if kind not in FEW]
    kinds += rest  # each is there
    kinds += rng.choices(rest, k=MANY - len(kinds))
    rng.shuffle(kinds)
    return kinds


def check(results: list[tuple[str, int, bytes]]) -> collections.Counter:
    """Holds each answer against its kind: one of its statuses, with all of it or a reason."""
    for kind, status, found in results:
        _, statuses, does = KINDS[kind]
        if does != "read":
            continue
        assert status in statuses, (kind, status, found[:600])
        head, _, body = found.partition(b"\r\n\r\n")
        if status == 200 and "stream" in kind:
            assert b"data: [DONE]" in body, (kind, body[-300:])
            assert b'"finish_reason": "length"' in body, (kind, body[-300:])
        elif status == 200:
            assert json.loads(body)["choices"][0]["finish_reason"], (kind, found)
        elif status and body[:1] == b"{":
            assert json.loads(body)["error"]["message"], (kind, found)
        if status == FULL:
            assert b"retry-after: " in head.lower()
    return collections.Counter((kind, status) for kind, status, _ in results)


@pytest.fixture
def servers(tmp_path: Path) -> Iterator[list[Process]]:
    """Servers that a test starts; ended with it."""
    started: list[Process] = []
    yield started
    for server in started:
        with contextlib.suppress(psutil.NoSuchProcess):
            server.process.kill()
            server.process.wait(30)


def test_a_thousand_hostile_requests_and_three_ends(servers, tmp_path):
    port, log = a_port(), tmp_path / "log"
    server = Process(port, log)
    servers.append(server)
    first = httpx.post(
        f"{server.url}/v1/completions",
        json=ASKED,
        headers={"Authorization": "Bearer secret"},
        timeout=60,
    ).json()["choices"]
    before = server.process.memory_info().rss
    peak = before

    async def watched() -> list[tuple[str, int, bytes]]:
        nonlocal peak
        flooding = asyncio.ensure_future(flood(port, a_thousand(), 2.0))
        while not flooding.done():
            peak = max(peak, server.process.memory_info().rss)
            await asyncio.sleep(0.05)
        return await flooding

    found = check(asyncio.run(watched()))
    assert server.process.poll() is None
    served = sum(count for (_, status), count in found.items() if status == 200)
    assert served >= 50, found
    server.wait_until_idle(60)
    assert peak - before < MOST_MEMORY, (before, peak)
    again = httpx.post(
        f"{server.url}/v1/completions",
        json=ASKED,
        headers={"Authorization": "Bearer secret"},
        timeout=60,
    ).json()["choices"]
    assert again == first
    text = log.read_text("utf-8")
    assert "Traceback" not in text, text[text.index("Traceback") - 500 :][:4000]

    # SIGTERM in the middle: what was accepted is answered, the rest refused or not let in.
    async def ended() -> list[Any]:
        asking = [
            asyncio.ensure_future(one(port, kind, 0.0))
            for kind in ["stream", "completion", "chat stream", "leaves a stream"] * 40
        ]
        while not any(task.done() for task in asking):
            await asyncio.sleep(0.005)
        server.process.send_signal(signal.SIGTERM)
        return await asyncio.gather(*asking, return_exceptions=True)

    answered: collections.Counter[Any] = collections.Counter()
    for result in asyncio.run(ended()):
        if isinstance(result, ConnectionError):
            answered["no connection"] += 1  # it came after the port was closed
            continue
        assert not isinstance(result, BaseException), result
        kind, status, content = result
        if KINDS[kind][2] != "read":
            continue
        answered[status] += 1
        assert status in {200, 429, 503, 0}, content
        if status == 200:
            check([result])
    assert answered[200] > 0, answered
    assert server.process.wait(90) == 0, log.read_text("utf-8")[-3000:]

    # Killed in the middle, it is there again as soon as a start takes.
    second = Process(port, log)
    servers.append(second)

    async def killed() -> None:
        asking = [asyncio.ensure_future(one(port, "chat stream", 0.0)) for _ in range(50)]
        await asyncio.sleep(0.3)
        second.process.kill()
        await asyncio.gather(*asking, return_exceptions=True)

    asyncio.run(killed())
    second.process.wait(30)
    third = Process(port, log)
    servers.append(third)
    assert third.seconds < 3 * second.seconds + 5, (server.seconds, second.seconds, third.seconds)
    assert third.figure("dsjax_pages_held") == 0
