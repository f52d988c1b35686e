"""Speed of the server beside its engine's own, under the same load, on random weights and tokens.

    python scripts/benchmark_server.py configs/models/deepseek_v2_lite.py

The engine answers `--rounds` times `--connections` requests in the process, always as many at once
as there are connections. Then a server over the same engine answers the same requests to processes
of clients (one httpx reads some ten thousand events a second): a connection each, all streamed.
Prints one JSON line a measurement: "start" (compiling), "engine", "server" (tokens a second, p50
and p99 between the events that a client sees, lag of the event loop) and "share" (the server's
tokens a second over the engine's).
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import itertools
import json
import multiprocessing
import socket
import threading
import time
from collections.abc import Sequence
from typing import Any

import httpx
import numpy as np
from arguments import axis, one_line_errors, positive
from benchmark_engine import NumberTokenizer, report
from random_models import random_model

from dsjax.config import EngineConfig, ServeConfig
from dsjax.engine import Engine, Request, TextPiece
from dsjax.inference.sampling import Sampling
from dsjax.serving.server import Server, bind, make_server, shared_interpreter

TICK_SECONDS = 0.005


def main() -> None:
    """Measures what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--connections", type=positive, default=256)
    parser.add_argument("--rounds", type=positive, default=2, help="requests of each connection")
    parser.add_argument("--prompt", type=positive, default=1024, help="tokens of each prompt")
    parser.add_argument("--tokens", type=positive, default=512, help="tokens of each text")
    parser.add_argument("--chunk", type=positive, default=2048, help="prompt tokens a step")
    parser.add_argument("--clients", type=positive, default=4, help="processes of clients")
    parser.add_argument("--passes", type=positive, default=1, help="of both; the last counts")
    parser.add_argument(
        "--mesh", type=axis, nargs="+", default=(), metavar="AXIS=N", help="of a host's GPUs"
    )
    arguments = parser.parse_args()
    model = random_model(arguments.config, arguments.overrides, arguments.mesh)
    config = model.config
    sizes = EngineConfig(
        max_batch=arguments.connections,
        max_length=arguments.prompt + arguments.tokens,
        chunk_tokens=arguments.chunk,
        prompt_logprobs=False,
    )
    rng = np.random.default_rng(0)
    count = arguments.connections * arguments.rounds

    def prompts() -> list[list[int]]:
        # Others each time: what the pool holds of prompts is not read again.
        return rng.integers(0, config.vocab_size, (count, arguments.prompt)).tolist()

    begun = time.perf_counter()
    with Engine(model, NumberTokenizer(config.vocab_size), sizes) as engine, shared_interpreter():
        report("start", {"seconds": time.perf_counter() - begun})
        about = {"connections": arguments.connections, "prompt": arguments.prompt}
        for _ in range(arguments.passes):
            own = by_engine(engine, prompts(), arguments.tokens, arguments.connections)
            report("engine", about | own | {"figures": dataclasses.asdict(engine.figures())})
            served = by_server(
                engine, prompts(), arguments.tokens, arguments.connections, arguments.clients
            )
            report("server", about | served)
    report("share", {"share": served["tokens_per_second"] / own["tokens_per_second"]})


def by_engine(
    engine: Engine, prompts: Sequence[list[int]], tokens: int, connections: int
) -> dict[str, float]:
    """Answers in the process, by one thread a connection, as a client of the server would ask."""
    sampling = Sampling(max_tokens=tokens, ignore_eos=True)
    engine.start()
    gaps: list[float] = []
    totals = [0] * connections

    def ask(index: int) -> None:
        for prompt in prompts[index::connections]:
            ended = threading.Event()
            times: list[float] = []

            def note(event: Any, ended: Any = ended, times: list[float] = times) -> None:
                # On the engine's thread: what an event costs here is what a thread's wake-up costs.
                if isinstance(event, TextPiece):
                    times.append(time.perf_counter())
                    totals[index] += len(event.tokens)
                else:
                    ended.set()

            engine.submit(Request(tuple(prompt), sampling), note)
            ended.wait()
            gaps.extend(b - a for a, b in itertools.pairwise(times))

    begun = time.perf_counter()
    threads = [threading.Thread(target=ask, args=(index,)) for index in range(connections)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - begun
    return {"seconds": seconds, "tokens_per_second": sum(totals) / seconds} | quantiles(gaps)


def by_server(
    engine: Engine, prompts: Sequence[list[int]], tokens: int, connections: int, clients: int
) -> dict[str, float]:
    """Answers over HTTP, to clients in processes of their own."""
    limits = ServeConfig(port=0, max_open=2 * connections, max_connections=2 * connections)
    listening = bind(limits)
    server = make_server(engine, limits)
    lags: list[float] = []

    def run() -> None:
        # The event loop that `dsjax serve` runs on.
        asyncio.run(serve(server, listening, lags), loop_factory=server.config.get_loop_factory())

    thread = threading.Thread(target=run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = listening.getsockname()[1]
    with contextlib.closing(listening):
        spawn = multiprocessing.get_context("spawn")
        mine = [range(first, connections, clients) for first in range(min(clients, connections))]
        shares = [[prompts[index::connections] for index in indices] for indices in mine]
        with spawn.Pool(len(shares)) as processes:
            asked = [(port, share, tokens) for share in shares]
            found = summed(processes.starmap(run_clients, asked, chunksize=1))
        server.should_exit = True
        thread.join()
    lag = {
        "loop_lag_p999_ms": 1e3 * float(np.quantile(lags, 0.999)),
        "loop_lag_worst_ms": 1e3 * max(lags),
    }
    return found | lag


async def serve(server: Server, listening: socket.socket, lags: list[float]) -> None:
    """Serves until told to end, and notes how late the event loop runs what is due."""

    async def watch() -> None:
        while True:
            due = time.perf_counter() + TICK_SECONDS
            await asyncio.sleep(TICK_SECONDS)
            lags.append(max(0.0, time.perf_counter() - due))

    watcher = asyncio.create_task(watch())
    await server.serve([listening])
    watcher.cancel()


def summed(found: Sequence[tuple[float, float, int, list[float]]]) -> dict[str, float]:
    """Returns the speed of all clients from the first one's begin to the last one's end."""
    begun, ended, totals, gaps = zip(*found, strict=True)
    seconds = max(ended) - min(begun)
    every = [gap for some in gaps for gap in some]
    return {"seconds": seconds, "tokens_per_second": sum(totals) / seconds} | quantiles(every)


def run_clients(
    port: int, prompts: Sequence[Sequence[list[int]]], tokens: int
) -> tuple[float, float, int, list[float]]:
    """Asks over a connection for each list of prompts, one after another, in its own process.

    Returns:
        When it began and ended (seconds of the clock that all processes share), the tokens that it
        got, and the seconds between its events.
    """
    return asyncio.run(_clients(port, prompts, tokens))


async def _clients(
    port: int, prompts: Sequence[Sequence[list[int]]], tokens: int
) -> tuple[float, float, int, list[float]]:
    gaps: list[float] = []
    total = 0
    limits = httpx.Limits(max_connections=len(prompts))
    options: dict[str, Any] = {
        "max_tokens": tokens,
        "ignore_eos": True,
        "temperature": 0,
        "stream": True,
    }
    options["stream_options"] = {"include_usage": True}

    async def ask(client: httpx.AsyncClient, mine: Sequence[list[int]]) -> None:
        nonlocal total
        for prompt in mine:
            times: list[float] = []
            last = b""
            content = json.dumps(options | {"prompt": prompt})
            headers = {"Content-Type": "application/json"}
            url = f"http://127.0.0.1:{port}/v1/completions"
            async with client.stream("POST", url, content=content, headers=headers) as answer:
                if answer.status_code != 200:
                    raise RuntimeError((await answer.aread()).decode())
                async for data in answer.aiter_raw():
                    times.append(time.perf_counter())
                    last = (last + data)[-4096:]
            lines = [line for line in last.split(b"\n\n") if line]
            if lines[-1] != b"data: [DONE]":
                raise RuntimeError(f"a stream ended too soon: {lines[-1]!r}")
            total += json.loads(lines[-2].removeprefix(b"data: "))["usage"]["completion_tokens"]
            gaps.extend(b - a for a, b in itertools.pairwise(times))

    async with httpx.AsyncClient(limits=limits, timeout=None) as client:
        begun = time.monotonic()
        await asyncio.gather(*(ask(client, mine) for mine in prompts))
        return begun, time.monotonic(), total, gaps


def quantiles(gaps: Sequence[float]) -> dict[str, float]:
    """Returns the times between events, in milliseconds."""
    p50, p99 = np.quantile(gaps, (0.5, 0.99)) if gaps else (float("nan"),) * 2
    return {"between_p50_ms": 1e3 * float(p50), "between_p99_ms": 1e3 * float(p99)}


if __name__ == "__main__":
    with one_line_errors():
        main()
