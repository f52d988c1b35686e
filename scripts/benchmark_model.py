"""Speed of whole models on random weights and tokens: training, prefill and decode.

    python scripts/benchmark_model.py train configs/models/deepseek_v2_lite.py num_layers=8
    python scripts/benchmark_model.py generate configs/models/deepseek_v2_lite.py --batch 128
    python scripts/benchmark_model.py generate deepseek_v2_lite --quantize fp8 --products fp8

Prints one JSON line a measurement: median seconds, tokens per second, and for training the share
of the chip's peak where it is known. Every call is waited for.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from arguments import IMPLEMENTATIONS, command_line, one_line_errors, positive
from flax import nnx

from dsjax.cache import LatentPool, Part, View, allocate_pool
from dsjax.chips import peak_flops
from dsjax.config import (
    RECIPES,
    BalanceConfig,
    GuardConfig,
    KernelConfig,
    LossConfig,
    ModelConfig,
    OptimizerConfig,
    RuntimeConfig,
)
from dsjax.config.load import load_model_and_runtime
from dsjax.counts import count_parameters, train_flops_per_token
from dsjax.kernels import choose_kernels
from dsjax.model import DeepSeekV2, create_model
from dsjax.training.step import init_train_state, jitted_train_step


def main() -> None:
    """Measures what the command line asks for."""
    parser = command_line(__doc__)
    parser.add_argument("what", choices=("train", "generate"))
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--batch", type=positive, default=4)
    parser.add_argument("--length", type=positive, default=4096)
    parser.add_argument("--steps", type=positive, default=5, help="timed repetitions")
    parser.add_argument(
        "--kernels",
        default="auto",
        choices=("auto", *IMPLEMENTATIONS),
        help="auto, or one implementation for all",
    )
    parser.add_argument("--quantize", choices=tuple(RECIPES), help="weights in fewer bits")
    parser.add_argument("--products", choices=("widen", "fp8"), default="widen")
    arguments = parser.parse_args()
    config, runtime = load_model_and_runtime(arguments.config, arguments.overrides)
    if arguments.kernels != "auto":
        runtime = dataclasses.replace(runtime, kernels=KernelConfig.all_of(arguments.kernels))
    if arguments.quantize is not None:
        kernels = dataclasses.replace(runtime.kernels, quantised_products=arguments.products)
        recipe = RECIPES[arguments.quantize]
        runtime = dataclasses.replace(runtime, kernels=kernels, quantisation=recipe)
    run = {"train": measure_training, "generate": measure_generation}[arguments.what]
    run(config, runtime, arguments)


def report(name: str, model: DeepSeekV2, figures: dict[str, Any]) -> None:
    """Prints a measurement with what it was made on."""
    total, active = count_parameters(model.config)
    about = {
        "measurement": name,
        "chip": jax.devices()[0].device_kind,
        "parameters": total,
        "active": active,
        "dtype": model.options.runtime.dtype,
        "latent_dtype": model.options.runtime.cached_dtype,
        "kernels": dataclasses.asdict(model.options.kernels),
    }
    print(json.dumps(about | figures), flush=True)


def median_seconds(run: Callable[[], Any], steps: int) -> float:
    """Returns the median time of a call, after one that compiles and one that warms up."""
    for _ in range(2):
        jax.block_until_ready(run())
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_training(
    config: ModelConfig, runtime: RuntimeConfig, arguments: argparse.Namespace
) -> None:
    """Times whole optimiser steps."""
    batch, length = arguments.batch, arguments.length
    optimizer, guard = OptimizerConfig(), GuardConfig()
    loss = LossConfig(BalanceConfig(0.003, 0.05, 0.02))  # §3.1.2
    kernels = choose_kernels(jax.devices()[0], config, runtime)
    model = create_model(config, 0, runtime, kernels=kernels)
    graphdef, params = nnx.split(model)
    state = jax.jit(functools.partial(init_train_state, optimizer), donate_argnums=0)(params)
    tokens = jax.random.randint(jax.random.key(1), (1, batch, length), 0, config.vocab_size)
    rows = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=-1),
        "positions": jnp.broadcast_to(jnp.arange(length), tokens.shape),
        "segment_ids": jnp.ones(tokens.shape, jnp.int32),
        "weights": jnp.ones(tokens.shape, jnp.float32),
    }
    held = [state]
    train_step = jitted_train_step(jax.devices()[0].platform)

    def step() -> Any:
        rate = jnp.float32(1e-4)
        held[0], step_report = train_step(graphdef, optimizer, loss, guard, held[0], rows, rate)
        return step_report

    seconds = median_seconds(step, arguments.steps)
    rate = batch * length / seconds
    figures = {"batch": batch, "length": length, "seconds": seconds, "tokens_per_second": rate}
    peak = peak_flops(jax.devices()[0])
    if peak is not None:
        figures["mfu"] = rate * train_flops_per_token(config, length) / peak
    figures["peak_bytes"] = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
    report("train", model, figures)


def measure_generation(
    config: ModelConfig, runtime: RuntimeConfig, arguments: argparse.Namespace
) -> None:
    """Times a prefill of all prompts, and the decode steps after it."""
    batch, length = arguments.batch, arguments.length
    runtime = dataclasses.replace(runtime, param_dtype=runtime.dtype)
    kernels = choose_kernels(jax.devices()[0], config, runtime)
    model = create_model(config, 0, runtime, kernels=kernels)
    graphdef, state = nnx.split(model)
    prompts = jax.random.randint(jax.random.key(1), (batch, length), 0, config.vocab_size)
    pages = -(-(length + 256) // 64)
    prompt = Part(
        page_table_BP=jnp.arange(batch * pages, dtype=jnp.int32).reshape(batch, pages),
        lengths_B=jnp.zeros(batch, jnp.int32),
        num_new_B=jnp.full(batch, length, jnp.int32),
        num_tokens=length,
        is_first=True,
    )

    @functools.partial(jax.jit, donate_argnums=2)
    def extend(state: nnx.State, tokens: jax.Array, pool: LatentPool, part: Part) -> Any:
        """Reads a part; returns each sequence's best next token, the pool, and the part after."""
        model: DeepSeekV2 = nnx.merge(graphdef, state)
        last = jnp.arange(1, batch + 1) * part.num_tokens - 1
        logits, pool = model.extend(tokens, pool, View((part,)), last)
        return jnp.argmax(logits, axis=-1).astype(jnp.int32), pool, part.advanced()

    def prefill() -> Any:
        pool = allocate_pool(
            config,
            batch * pages,
            runtime.cached_dtype,
            rope_dtype=runtime.dtype,
            decode_kernel=kernels.mla_decode,
        )
        return extend(state, prompts.reshape(-1), pool, prompt)

    seconds = median_seconds(prefill, 2)
    figures = {"batch": batch, "length": length, "seconds": seconds}
    report("prefill", model, figures | {"tokens_per_second": batch * length / seconds})

    tokens, pool, part = prefill()
    one = jnp.ones(batch, jnp.int32)
    part = dataclasses.replace(part, num_new_B=one, num_tokens=1, is_first=False)
    held = [tokens, pool, part]

    def step() -> Any:
        held[:] = extend(state, *held)
        return held[0]

    seconds = median_seconds(step, max(20, arguments.steps))
    figures = {"batch": batch, "length": length, "seconds": seconds}
    report("decode", model, figures | {"tokens_per_second": batch / seconds})


if __name__ == "__main__":
    with one_line_errors():
        main()
