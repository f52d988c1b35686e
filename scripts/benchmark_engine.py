"""Speed of the engine as it serves, on random weights and tokens.

    python scripts/benchmark_engine.py configs/models/deepseek_v2_lite.py --requests 1000
    python scripts/benchmark_engine.py deepseek_v2_lite --parts load --open-loop 0.5 0.8 0.95

With `--mesh expert=2` the experts are spread over two devices, and each has sequences and pages of
its own; with --beside-one-card one device of them is measured first, with its share of the batch
and of the requests. Prints one JSON line a measurement, as it is made. Texts have their full
length: end tokens are read on. The parts, in turn:

"capacity": tokens of cache in the memory that the weights leave, and of per-head keys and values in
the same bytes, both really allocated. "start": compiling. "single": one request. "prefix": the time
to the first token behind each shared `--prefix`: cold, with it in the pool, and of the suffix
alone, medians. "load": --requests at once, --batch of them running.

"open loop", for each share of the load's rate (or of --rate): requests come as a Poisson process,
of log-normal lengths, and are measured for --seconds after --ramp; what is left is cancelled. Their
rate is the share of the output tokens a second over the mean of the texts' lengths.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import math
import statistics
import time
from typing import Any

import jax
import numpy as np
from arguments import axis, command_line, num_bytes, one_line_errors, positive, real
from cache_capacity import cache_capacity
from open_loop import Lengths, arrivals, measured, run_open_loop
from random_models import random_model

from dsjax.config import EngineConfig
from dsjax.data.tokenizer import ByteTokenizer
from dsjax.engine import Engine, Request, TextPiece
from dsjax.inference.sampling import Sampling

PARTS = ("capacity", "single", "prefix", "load")
SUFFIX = 32


class NumberTokenizer(ByteTokenizer):
    """As many ids as the model has; those past the bytes are spelled by their number."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self._token_bytes += [f"<{i}>".encode() for i in range(len(self._token_bytes), vocab_size)]
        self.known_ids = np.ones(vocab_size, np.bool_)


def main() -> None:
    """Measures what the command line asks for."""
    parser = command_line(__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parts = ["single", "prefix", "load"]
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=parts, help="in turn")
    parser.add_argument("--batch", type=positive, default=256, help="requests that run at once")
    parser.add_argument("--requests", type=positive, default=1000)
    parser.add_argument("--prompt", type=positive, default=1024, help="tokens of each prompt")
    parser.add_argument("--tokens", type=positive, default=1024, help="tokens of each text")
    parser.add_argument("--chunk", type=positive, default=2048, help="prompt tokens a step")
    parser.add_argument("--prefix", type=positive, nargs="+", default=[4000])
    parser.add_argument("--repeats", type=positive, default=3, help="of each prefix")
    parser.add_argument("--temperature", type=real, default=0.0)
    parser.add_argument("--open-loop", type=real, nargs="+", default=[], metavar="SHARE")
    parser.add_argument("--rate", type=real, help="output tokens/s that shares are of")
    parser.add_argument("--seconds", type=real, default=40.0, help="measured at each rate")
    parser.add_argument("--ramp", type=real, default=20.0, help="seconds before them")
    parser.add_argument("--median", type=positive, default=600, help="tokens, in and out")
    parser.add_argument("--sigma", type=real, default=1.0, help="of the logarithm of lengths")
    parser.add_argument("--longest", type=positive, default=4096, help="tokens, in and out")
    parser.add_argument("--device-memory", type=num_bytes, help="of which capacity is taken")
    parser.add_argument(
        "--mesh", type=axis, nargs="+", default=(), metavar="AXIS=N", help="of a host's GPUs"
    )
    parser.add_argument("--beside-one-card", action="store_true", help="of a mesh")
    arguments = parser.parse_args()
    if arguments.beside_one_card and not arguments.mesh:
        parser.error("--beside-one-card: needs --mesh")
    if arguments.open_loop and arguments.rate is None and "load" not in arguments.parts:
        parser.error("--open-loop: needs --rate, or the part load to measure one")
    if arguments.open_loop and min(arguments.open_loop) == 0:
        parser.error("--open-loop: a share must be above 0")
    one = None
    if arguments.beside_one_card:
        count = math.prod(int(text.partition("=")[2]) for text in arguments.mesh)
        shares = {
            "mesh": (),
            "batch": max(1, arguments.batch // count),
            "requests": max(1, arguments.requests // count),
        }
        one = measure(argparse.Namespace(**(vars(arguments) | shares)))
        gc.collect()
    found = measure(arguments)
    if one is not None:
        ratios = {name: found[name] / one[name] for name in found if name in one}
        report("of one card", ratios)


def measure(arguments: argparse.Namespace) -> dict[str, float]:
    """Measures one model; returns tokens a second of the load and tokens of cache, if measured."""
    model = random_model(arguments.config, arguments.overrides, arguments.mesh)
    config = model.config
    tokenizer = NumberTokenizer(config.vocab_size)
    longest = [2048 + 256]
    longest += [arguments.prompt + arguments.tokens] * ("load" in arguments.parts)
    longest += [size + 64 for size in arguments.prefix if "prefix" in arguments.parts]
    longest += [2 * arguments.longest] * bool(arguments.open_loop)
    sizes = EngineConfig(
        max_batch=arguments.batch,
        max_length=min(config.max_length, max(longest)),
        chunk_tokens=arguments.chunk,
        prompt_logprobs=False,
    )
    about = {"mesh": list(arguments.mesh)}
    found: dict[str, float] = {}
    if "capacity" in arguments.parts:
        capacity = cache_capacity(model, tokenizer, sizes, arguments.device_memory)
        found["cache_tokens"] = capacity["cache_tokens"]
        report("capacity", about | capacity)
    if arguments.parts == ["capacity"]:
        return found
    begun = time.perf_counter()
    with Engine(model, tokenizer, sizes) as engine:
        started = {"seconds": time.perf_counter() - begun, "num_pages": engine.figures().num_pages}
        report("start", about | started)
        draw = Draw(config.vocab_size, arguments.temperature)
        time_of(engine, draw.request(64, 4))
        keep_what_is_there()
        if "single" in arguments.parts:
            single = min(2048, config.max_length - 256)
            between = min(time_of(engine, draw.request(single, 256))[1] for _ in range(2))
            report("single", about | {"prompt": single, "tokens_per_second": 1 / between})
        if "prefix" in arguments.parts:
            for size in arguments.prefix:
                report("prefix", about | behind_prefix(engine, draw, size, arguments.repeats))
        if "load" in arguments.parts:
            figures = closed_loop(engine, draw, arguments)
            found["tokens_per_second"] = figures["tokens_per_second"]
            report("load", about | figures)
        rate = arguments.rate or found.get("tokens_per_second", 0.0)
        for share in arguments.open_loop:
            report("open loop", about | at_share(engine, draw, arguments, rate, share))
    return found


class Draw:
    """Requests of random tokens: each begins otherwise."""

    def __init__(self, vocab_size: int, temperature: float = 0.0) -> None:
        self._vocab_size, self._temperature = vocab_size, temperature
        self.rng = np.random.default_rng(0)

    def prompt(self, size: int) -> tuple[int, ...]:
        """Returns a prompt."""
        return tuple(self.rng.integers(0, self._vocab_size, size).tolist())

    def request(self, prompt: int | tuple[int, ...], tokens: int) -> Request:
        """Returns a request with a prompt, or one of so many tokens."""
        sampling = Sampling(
            max_tokens=tokens, ignore_eos=True, temperature=self._temperature, top_p=0.95
        )
        given = self.prompt(prompt) if isinstance(prompt, int) else prompt
        return Request(given, sampling)


def time_of(engine: Engine, request: Request) -> tuple[float, float]:
    """Returns the seconds to the first token, and between the tokens after it."""
    times = [time.perf_counter()]

    def note(_: int, event: Any) -> None:
        if isinstance(event, TextPiece) and event.tokens:
            times.append(time.perf_counter())

    engine.generate([request], note)
    return times[1] - times[0], (times[-1] - times[1]) / max(1, len(times) - 2)


def behind_prefix(engine: Engine, draw: Draw, size: int, repeats: int) -> dict[str, Any]:
    """Returns times to the first token behind a prefix of so many tokens: medians."""
    times: dict[str, list[float]] = {"cold": [], "shared": [], "suffix": []}
    for _ in range(repeats):
        shared = draw.prompt(size)
        prompts = {
            "cold": (*shared, *draw.prompt(SUFFIX)),
            "shared": (*shared, *draw.prompt(SUFFIX)),
            "suffix": draw.prompt(SUFFIX),
        }
        for name, prompt in prompts.items():
            times[name].append(time_of(engine, draw.request(prompt, 2))[0])
    medians = {name: statistics.median(some) for name, some in times.items()}
    ratios = {
        "shared_of_suffix": medians["shared"] / medians["suffix"],
        "cold_over_shared": medians["cold"] / medians["shared"],
    }
    return {"prefix": size, "suffix_tokens": SUFFIX, "repeats": repeats} | medians | ratios


def closed_loop(engine: Engine, draw: Draw, arguments: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of many requests at once."""
    count, prompt, tokens = arguments.requests, arguments.prompt, arguments.tokens
    requests = [draw.request(prompt, tokens) for _ in range(count)]
    with measured(engine) as meanwhile:
        found = engine.generate(requests)
    made = sum(len(one.tokens) for one in found)
    stats = jax.devices()[0].memory_stats() or {}
    return {
        "requests": count,
        "prompt": prompt,
        "tokens": tokens,
        "batch": arguments.batch,
        "tokens_per_second": made / meanwhile["seconds"],
        **meanwhile,
        "peak_bytes": stats.get("peak_bytes_in_use", 0),
        "figures": dataclasses.asdict(engine.figures()),
    }


def at_share(
    engine: Engine, draw: Draw, arguments: argparse.Namespace, rate: float, share: float
) -> dict[str, Any]:
    """Returns the figures of an open loop that asks for a share of a rate of output tokens."""
    longest = min(arguments.longest, engine.max_length // 2)
    lengths = Lengths(arguments.median, arguments.sigma, longest)
    mean = float(lengths.draw(np.random.default_rng(1), 100_000).mean())
    a_second = share * rate / mean
    due = arrivals(draw.rng, a_second, arguments.ramp + arguments.seconds)
    pairs = zip(lengths.draw(draw.rng, due.size), lengths.draw(draw.rng, due.size), strict=True)
    requests = [draw.request(int(prompt), int(tokens)) for prompt, tokens in pairs]
    about = {
        "share": share,
        "of_tokens_per_second": rate,
        "lengths": str(lengths),
        "mean_length": mean,
        "requests_per_second": a_second,
        "ramp": arguments.ramp,
    }
    found = run_open_loop(engine, requests, due.tolist(), arguments.ramp, arguments.seconds)
    return about | found


def keep_what_is_there() -> None:
    """Lets no collection of garbage look through what is there by now, as `dsjax serve` does.

    What JAX keeps of traced programs is so much that a collection takes 0.2 s: as long as twenty
    steps, and it comes when it will.
    """
    gc.collect()
    gc.freeze()


def report(name: str, figures: dict[str, Any]) -> None:
    """Prints a measurement with the chip that it was made on."""
    about = {"measurement": name, "chip": jax.devices()[0].device_kind}
    print(json.dumps(about | figures), flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
