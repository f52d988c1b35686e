"""Decoding with routed experts in the host's memory, beside the link they come over; one process.

    python scripts/benchmark_host_experts.py deepseek_v2_lite --device-memory 4GiB
    python scripts/benchmark_host_experts.py deepseek_v2 --device-memory 16GiB --skew 0.5
    python scripts/benchmark_host_experts.py deepseek_v2 num_layers=30 --device-memory 16GiB

Random weights of a model's shape, quantised: what is not a routed expert on the device, the experts
in pinned host memory, made there layer by layer (one random expert of a layer, shifted for each).
Prints a JSON line as each figure is had:

    link      plain copies of pinned arrays to the device, several sizes; by CUDA's own calls too
    experts   the experts made: bytes, seconds
    engine    programs compiled, experts that the device keeps
    prefill   the time to the first token of a prompt of `--prompt` tokens, the second of two
    decode    tokens a second of one sequence whose tokens are drawn at random; hits of the device's
              cache; bytes of what was missed, over the link's best rate: the bound, and how near.
              One line for each number of guesses of the router before (`--guesses`)
    memory    the device's peak so far

Random tokens are routed at random. `--skew S` makes some experts of each layer more wanted: their
columns of the router are scaled from 1 to 1 + S. What that comes to is printed with each `decode`:
the share of all choices that the most wanted quarter of each layer's experts had.

XLA's pool of pinned memory is set to what the experts need, where
`XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB` does not say it.
"""

from __future__ import annotations

import argparse
import ctypes
import dataclasses
import json
import os
import threading
import time
from collections import Counter
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from arguments import command_line, not_negative, num_bytes, one_line_errors, positive, real
from benchmark_engine import NumberTokenizer
from flax import nnx
from jax.sharding import SingleDeviceSharding
from random_models import random_state

from dsjax.config import RECIPES, EngineConfig, ModelConfig
from dsjax.config.load import load_model_and_runtime
from dsjax.engine import Engine, Request, TextPiece
from dsjax.engine.host_reader import HostReader
from dsjax.inference.sampling import Sampling
from dsjax.kernels import Kernels, choose_kernels
from dsjax.layers.moe import MoE
from dsjax.layers.moe.packed import ExpertLayout
from dsjax.model import DeepSeekV2, abstract_model
from dsjax.weights.host_experts import HostExperts, is_routed, no_experts, pinned, set_host_experts

_POOL_LIMIT = "XLA_PJRT_GPU_HOST_MEMORY_LIMIT_GB"
_COPIED = 2 << 30  # bytes that a measurement of the link copies at least


def main() -> None:
    """Measures what the command line asks for."""
    parser = command_line(__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--device-memory", type=num_bytes, default="16GiB")
    parser.add_argument("--quantize", default="int4", choices=tuple(RECIPES))
    parser.add_argument("--skew", type=real, nargs="+", default=[0.0], help="each in turn")
    parser.add_argument("--guesses", type=not_negative, nargs="+", default=[0, 2, 64])
    parser.add_argument("--prompt", type=positive, default=2048)
    parser.add_argument("--tokens", type=positive, default=64, help="timed, a quarter more not")
    parser.add_argument("--copied", type=num_bytes, default=_COPIED, help="to measure the link")
    arguments = parser.parse_args()
    config, runtime = load_model_and_runtime(arguments.config, arguments.overrides)
    recipe = RECIPES[arguments.quantize]
    runtime = dataclasses.replace(runtime, param_dtype=runtime.dtype, quantisation=recipe)
    # Before jax meets a device: shapes are all that is needed to say what the pool must hold.
    needed = num_expert_bytes(config, runtime)
    os.environ.setdefault(_POOL_LIMIT, str(-(-needed // 2**30) + 3))
    # Else XLA takes three quarters of the device at once, and nobody sees what is needed of it.
    os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    device = jax.devices()[0]
    if device.platform == "gpu":
        _CARD.start()
    report("device", {"kind": device.device_kind, _POOL_LIMIT: os.environ[_POOL_LIMIT]})
    layer = measure_link(device, arguments.copied)
    model = random_model(config, runtime, device, arguments.device_memory)
    router = model.moe_layers.feed_forward.router.gate.weight  # type: ignore[union-attr]
    plain = router[...]
    for skew in arguments.skew:
        scales = 1 + skew * np.arange(plain.shape[-1]) / plain.shape[-1]
        router[...] = (plain * scales).astype(plain.dtype)
        measure_engine(model, arguments, skew, layer)


def num_expert_bytes(config: ModelConfig, runtime: Any) -> int:
    """Returns the bytes of all routed experts as the host keeps them; no device is asked."""
    layout = expert_layout(config, runtime, Kernels())
    return layout.num_bytes * layout.num_experts * config.num_moe_layers


def expert_layout(config: ModelConfig, runtime: Any, kernels: Any) -> ExpertLayout:
    """Returns what an expert's bytes mean."""
    graphdef, abstract = abstract_model(config, runtime, None, kernels)
    layers = nnx.merge(graphdef, abstract).moe_layers
    if layers is None:
        raise SystemExit("config: a model with routed experts is needed")
    assert isinstance(layers.feed_forward, MoE)
    return ExpertLayout.of(layers.feed_forward)


def measure_link(device: jax.Device, copied: int) -> float:
    """Returns bytes a second of the fastest plain copies from pinned memory to the device."""
    there = SingleDeviceSharding(device)
    best = 0.0
    for size in (1 << 20, 4 << 20, 12 << 20, 64 << 20, 256 << 20):
        size = min(size, max(copied // 8, 1))
        source = [pinned(np.full(size, i, np.uint8), device) for i in range(4)]
        jax.block_until_ready(jax.device_put(source, there))
        rounds = max(1, copied // size // 4)
        began = time.perf_counter()
        waiting: list[Any] = []
        for _ in range(rounds):
            waiting.append(jax.device_put(source, there))
            if len(waiting) > 2:  # what was copied is let go, the link always has more to do
                jax.block_until_ready(waiting.pop(0))
        jax.block_until_ready(waiting)
        seconds = time.perf_counter() - began
        rate = 4 * rounds * size / seconds
        best = max(best, rate)
        one = time.perf_counter()
        jax.block_until_ready(jax.device_put(source[0], there))
        alone = {"us_one_waited_for": (time.perf_counter() - one) * 1e6}
        report("link", {"MB": size / 1e6, "GB/s": rate / 1e9, **alone})
    if device.platform == "gpu":
        best = max(best, measure_cuda(copied))
    return best


def measure_cuda(copied: int) -> float:
    """Measures the same by CUDA's own calls; 0 and a line that says why, where there are none."""
    size = min(64 << 20, copied)
    try:
        cuda = ctypes.CDLL(_cuda_runtime())
    except OSError as error:
        report("link by CUDA", {"missing": str(error)})
        return 0.0
    host, there = ctypes.c_void_p(), ctypes.c_void_p()
    failed = cuda.cudaMallocHost(ctypes.byref(host), ctypes.c_size_t(size))
    failed = failed or cuda.cudaMalloc(ctypes.byref(there), ctypes.c_size_t(size))
    if failed:
        report("link by CUDA", {"missing": f"no memory: CUDA error {failed}"})
        return 0.0
    rounds = max(2, copied // size)
    for _ in range(2):  # the first round warms up
        began = time.perf_counter()
        for _ in range(rounds):
            cuda.cudaMemcpyAsync(there, host, ctypes.c_size_t(size), 1, None)
        failed = cuda.cudaDeviceSynchronize()
        seconds = time.perf_counter() - began
    cuda.cudaFreeHost(host)
    cuda.cudaFree(there)
    rate = 0.0 if failed else rounds * size / seconds
    report("link by CUDA", {"MB": size / 1e6, "GB/s": rate / 1e9, "error": failed})
    return rate


def _cuda_runtime() -> str:
    """The library that this process has loaded for XLA, or the system's."""
    with open("/proc/self/maps", encoding="utf-8") as maps:
        loaded = [line.split()[-1] for line in maps if "libcudart" in line]
    return loaded[0] if loaded else "libcudart.so"


def random_model(
    config: ModelConfig, runtime: Any, device: jax.Device, device_memory: int
) -> DeepSeekV2:
    """Returns a model with random weights whose experts are in the host's memory."""
    kernels = choose_kernels(device, config, runtime)
    graphdef, abstract = abstract_model(config, runtime, None, kernels)
    layout = expert_layout(config, runtime, kernels)
    routed: list[Any] = []
    others: list[Any] = []
    for path, variable in nnx.to_flat_state(abstract):
        mine = routed if is_routed(tuple(map(str, path))) else others
        mine.append((path, variable))
    began = time.perf_counter()
    flat = [
        # Wide, so that a token and not what all have in common decides where it goes.
        (path, v.replace(v[...] * 50) if tuple(path) == ("embed", "weight") else v)
        for path, v in nnx.to_flat_state(random_state(nnx.from_flat_state(others)))
    ]
    flat += [(path, v.replace(no_experts(v.shape, v.dtype))) for path, v in routed]
    flat = [(path, v.replace(jax.device_put(v[...], device))) for path, v in flat]
    model = nnx.merge(graphdef, nnx.from_flat_state(flat))
    jax.block_until_ready(jax.tree.leaves(nnx.state(model)))
    report("rest", {"seconds": time.perf_counter() - began, **device_memory_of(device)})
    began = time.perf_counter()
    rng = np.random.default_rng(0)
    packed: list[list[jax.Array]] = []
    for number in range(config.num_moe_layers):
        twice = np.tile(random_expert(layout, rng), 2)
        packed.append([])
        for expert in range(layout.num_experts):
            packed[-1].append(pinned(shifted(layout, twice, expert), device))
        jax.block_until_ready(packed[-1])
        if number % 10 == 0 or number == config.num_moe_layers - 1:
            size = (number + 1) * layout.num_experts * layout.num_bytes / 1e9
            figures = {"layers": number + 1, "GB": size, "expert_MB": layout.num_bytes / 1e6}
            report("experts", {**figures, "seconds": time.perf_counter() - began})
    set_host_experts(model, HostExperts(layout, packed, device_memory))
    return model


def random_expert(layout: ExpertLayout, rng: np.random.Generator) -> np.ndarray:
    """Returns the bytes of one expert: numbers at random, scales of one size."""
    parts = {}
    for leaf in layout.leaves:
        dtype = jax.numpy.dtype(leaf.dtype)
        if leaf.leaf == "scales":
            array = np.full(leaf.shape, 0.004, np.float32).astype(dtype)
        elif jax.numpy.issubdtype(dtype, np.integer):
            least, most = (0, 15) if leaf.dtype in ("uint4", "uint8") else (-7, 7)
            array = rng.integers(least, most, leaf.shape, np.int8, endpoint=True).astype(dtype)
        else:
            array = (0.02 * rng.standard_normal(leaf.shape, np.float32)).astype(dtype)
        parts[leaf.matrix, leaf.leaf] = array
    return layout.pack(parts)


def shifted(layout: ExpertLayout, twice: np.ndarray, number: int) -> np.ndarray:
    """Returns another expert: the numbers of each of the first one's matrices begin elsewhere."""
    out = twice[: layout.num_bytes].copy()
    for leaf in layout.leaves:
        if leaf.leaf == "weight":
            first = leaf.start
            step = number * 4096 % leaf.num_bytes
            whole = out[first : first + leaf.num_bytes]
            source = twice[first : first + leaf.num_bytes]
            whole[: leaf.num_bytes - step] = source[step:]
            whole[leaf.num_bytes - step :] = source[:step]
    return out


def measure_engine(
    model: DeepSeekV2, arguments: argparse.Namespace, skew: float, link: float
) -> None:
    """Measures prefill and decoding."""
    config = model.config
    warm = max(1, arguments.tokens // 4)
    prompt_size = min(arguments.prompt, config.max_length - warm - arguments.tokens - 8)
    began = time.perf_counter()
    engine = Engine(
        model,
        NumberTokenizer(config.vocab_size),
        EngineConfig(
            max_batch=1,
            max_length=prompt_size + warm + arguments.tokens + 8,
            chunk_tokens=prompt_size,
            chunks=((1, prompt_size),),
            prompt_logprobs=False,
            share_prefixes=False,
        ),
    )
    reader = engine._runner._host_reader
    assert reader is not None
    about = {"skew": skew, "seconds": time.perf_counter() - began}
    report("engine", {**about, "experts_kept": reader._cache.capacity})
    rng = np.random.default_rng(1)

    def request(size: int, tokens: int) -> Request:
        prompt = tuple(rng.integers(0, config.vocab_size, size).tolist())
        return Request(prompt, Sampling(max_tokens=tokens, ignore_eos=True, temperature=1.0))

    with engine:
        for _ in range(2):
            times = [time.perf_counter()]
            before = dataclasses.replace(reader._experts.traffic)
            engine.generate([request(prompt_size, 1)])
            seconds = time.perf_counter() - times[0]
            copied = reader._experts.traffic.copied_bytes - before.copied_bytes
            figures = {"skew": skew, "tokens": prompt_size, "seconds": seconds}
            bounds = {"copied_GB": copied / 1e9, "link_bound_seconds": copied / link}
            report("prefill", {**figures, **bounds})
        for guesses in arguments.guesses:
            reader.guesses = guesses
            figures = decode(engine, reader, request(prompt_size, warm + arguments.tokens), warm)
            seconds, missed = figures["seconds_a_token"], figures["missed_bytes_a_token"]
            bound = missed / link
            report(
                "decode",
                {
                    "skew": skew,
                    "guesses": guesses,
                    "tokens_per_second": 1 / seconds,
                    "bound_tokens_per_second": 1 / bound if bound else None,
                    "of_link_bound": bound / seconds,
                    "copied_over_link_rate": figures["copied_bytes_a_token"] / link / seconds,
                    **figures,
                },
            )
    report("memory", {"skew": skew, **device_memory_of(jax.devices()[0])})


def decode(engine: Engine, reader: HostReader, request: Request, warm: int) -> dict[str, Any]:
    """Reads a prompt and draws tokens; what comes after the first `warm` of them is measured."""
    traffic = reader._experts.traffic
    at: list[tuple[float, Any]] = []
    wanted: Counter[tuple[int, int]] = Counter()
    take = reader._cache.take

    def counted(keys: Sequence[tuple[int, int]], *, passing: bool = False) -> list[jax.Array]:
        if len(at) > warm and not passing:
            wanted.update(keys)
        return take(keys, passing=passing)

    def note(_: int, event: Any) -> None:
        if isinstance(event, TextPiece) and event.tokens:
            at.append((time.perf_counter(), dataclasses.replace(traffic)))

    reader._cache.take = counted  # type: ignore[method-assign]
    try:
        engine.generate([request], note)
    finally:
        reader._cache.take = take  # type: ignore[method-assign]
    (began, before), (ended, after) = at[warm], at[-1]
    tokens = len(at) - 1 - warm
    num_bytes = reader._experts.layout.num_bytes
    hits, asked = after.hits - before.hits, after.wanted - before.wanted
    foreseen, guessed = after.foreseen - before.foreseen, after.guessed - before.guessed
    # What came on a guess had to cross the link as well: it is no hit of what the device kept.
    missed = asked - hits + foreseen
    layers, experts = len(reader._experts.packed), reader._experts.layout.num_experts
    counts = [sorted(wanted[layer, one] for one in range(experts)) for layer in range(layers)]
    quarter = sum(sum(of_layer[-experts // 4 :]) for of_layer in counts)
    return {
        "seconds_a_token": (ended - began) / tokens,
        "tokens": tokens,
        "hit_rate": (asked - missed) / asked,
        "right_guesses": foreseen / guessed if guessed else None,
        "missed_bytes_a_token": missed * num_bytes / tokens,
        "copied_bytes_a_token": (after.copied_bytes - before.copied_bytes) / tokens,
        "share_of_most_wanted_quarter": quarter / max(1, sum(wanted.values())),
    }


def device_memory_of(device: jax.Device) -> dict[str, float]:
    """Returns what a device says of its memory, in GB."""
    stats = device.memory_stats() or {}
    return {
        f"{name}_GB": stats[key] / 1e9
        for name, key in (("in_use", "bytes_in_use"), ("peak", "peak_bytes_in_use"))
        if key in stats
    } | _CARD.figures()


class Card:
    """The memory in use on the first card as its driver sees it, sampled every 10 ms."""

    def __init__(self) -> None:
        self._peak = 0

    def start(self) -> None:
        """Begins to sample; without the driver's library, does nothing."""
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
        except OSError:
            return
        handle = ctypes.c_void_p()
        if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByIndex_v2(0, ctypes.byref(handle)):
            return
        found = (ctypes.c_ulonglong * 3)()  # all, free, used

        def sample() -> None:
            while library.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(found)) == 0:
                self._peak = max(self._peak, found[2])
                time.sleep(0.01)

        threading.Thread(target=sample, daemon=True).start()

    def figures(self) -> dict[str, float]:
        """Returns the peak so far, contexts and other processes included."""
        return {"card_peak_GiB": self._peak / 2**30} if self._peak else {}


_CARD = Card()


def report(name: str, figures: dict[str, Any]) -> None:
    """Prints a measurement, rounded."""
    rounded = {k: round(v, 4) if isinstance(v, float) else v for k, v in figures.items()}
    print(json.dumps({"measurement": name, **rounded}), flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
