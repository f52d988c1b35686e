"""Training steps of ours and of transformers on one GPU, in one run, each in a process of its own.

    python scripts/benchmark_training.py                       # the rows of `DEFAULT`
    python scripts/benchmark_training.py ours_bf16 peer_compiled --profile profiles
    python scripts/benchmark_training.py --rows                # names what there is

By default V2-Lite cut to 8 layers, with AdamW, clipped gradients, random weights and tokens on both
sides. Prints a JSON line a row and a table: tokens per second, model FLOPs over the chip's peak,
peak memory, and the ratio to the first peer of the same shape. With --profile also a text file a
row: the device's time by kernel, and of ours the compiled program. XLA_FLAGS reach ours. With
`--mesh expert=2` ours runs on that many devices of this host: `--batch` counts the rows of all, and
tokens a second are a device's.
"""

from __future__ import annotations

import argparse
import dataclasses
import gzip
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

from arguments import IMPLEMENTATIONS, axis, command_line, one_line_errors, positive
from profiles import Kernel, kernels_in, summary

OURS, PEER = "ours", "transformers"


@dataclasses.dataclass(frozen=True)
class Row:
    """One measurement.

    Attributes:
        side: whose step.
        batch: sequences a step.
        length: tokens of each.
        options: of ours, overrides of the runtime and the optimiser; of the peer, "eager" or
            "compiled".
    """

    side: str
    batch: int
    length: int
    options: tuple[str, ...]


_BF16 = ("runtime.param_dtype=bfloat16", "optimizer.moment_dtype=bfloat16")
_WIDE = ("runtime.param_dtype=bfloat16", "optimizer.moment_dtype=float32")
ROWS = {
    "ours_bf16": Row(OURS, 4, 4096, (*_BF16, "runtime.remat=none")),
    "ours_bf16_dots": Row(OURS, 4, 4096, (*_BF16, "runtime.remat=save_dots")),
    "ours_bf16_attention": Row(OURS, 4, 4096, (*_BF16, "runtime.remat=save_attention")),
    "ours_stochastic": Row(
        OURS, 4, 4096, (*_BF16, "optimizer.rounding=stochastic", "runtime.remat=save_attention")
    ),
    "ours_float32": Row(OURS, 4, 4096, (*_WIDE, "runtime.remat=save_attention")),
    "peer_compiled": Row(PEER, 4, 4096, ("compiled",)),
    "peer_eager": Row(PEER, 4, 4096, ("eager",)),
    "ours_16k": Row(OURS, 1, 16384, (*_BF16, "runtime.remat=none")),
    "peer_16k": Row(PEER, 1, 16384, ("compiled",)),
    "ours_32k": Row(OURS, 1, 32768, (*_BF16, "runtime.remat=save_attention")),
    "peer_32k": Row(PEER, 1, 32768, ("compiled",)),
}
DEFAULT = ("ours_bf16", "ours_bf16_dots", "ours_bf16_attention", "ours_float32", "peer_compiled")


def main() -> None:
    """Measures the rows, or one of them where this is the process of a row."""
    parser = command_line(__doc__)
    parser.add_argument("names", nargs="*", metavar="ROW", help=f"of {', '.join(ROWS)}")
    parser.add_argument("--rows", action="store_true", help="name all rows and end")
    parser.add_argument("--config", default="configs/models/deepseek_v2_lite.py")
    parser.add_argument("--set", nargs="*", default=["num_layers=8"], help="overrides of the model")
    parser.add_argument("--batch", type=positive, help="instead of the rows' own")
    parser.add_argument("--length", type=positive, help="instead of the rows' own")
    parser.add_argument(
        "--kernels",
        default="auto",
        choices=("auto", *IMPLEMENTATIONS),
        help="auto, or one implementation for all",
    )
    parser.add_argument(
        "--mesh", type=axis, nargs="+", default=(), metavar="AXIS=N", help="of ours"
    )
    parser.add_argument("--steps", type=positive, default=5, help="timed repetitions")
    parser.add_argument("--profile", type=Path, help="a folder for profiles as text")
    parser.add_argument("--one", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    unknown = [name for name in arguments.names if name not in ROWS]
    if unknown:
        parser.error(f"{', '.join(unknown)}: no such row; there are {', '.join(ROWS)}")
    if arguments.rows:
        print("\n".join(f"{name}: {row}" for name, row in ROWS.items()))
        return
    if arguments.one:
        (name,) = arguments.names
        print(json.dumps(measure(name, arguments)), flush=True)
        return
    names = arguments.names or DEFAULT
    print(table({name: in_own_process(name, sys.argv[1:], names) for name in names}))


def in_own_process(name: str, argv: list[str], names: Any) -> dict[str, Any]:
    """Measures a row where no other has left memory behind; says what it said if it fails."""
    options = [word for word in argv if word not in names]
    side = ROWS[name].side
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | dict(os.environ)
    if side == PEER:
        environment["JAX_PLATFORMS"] = "cpu"  # our code counts FLOPs there and takes no memory
        environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
    command = [sys.executable, __file__, name, "--one", *options]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, check=False, text=True)
    lines = done.stdout.strip().splitlines()
    figures = json.loads(lines[-1]) if done.returncode == 0 and lines else {"failed": True}
    print(json.dumps({"row": name} | figures), flush=True)
    return figures


def table(found: dict[str, dict[str, Any]]) -> str:
    """Returns the rows as Markdown."""
    peers: dict[tuple[int, int], float] = {}
    for name, figures in found.items():
        if ROWS[name].side == PEER and "tokens_per_second" in figures:
            shape = (figures["batch"], figures["length"])
            peers.setdefault(shape, figures["tokens_per_second"])
    lines = ["| row | shape | ms | tokens/s | MFU | peak GiB | of the peer |", "|" + "---|" * 7]
    for name, figures in found.items():
        if "tokens_per_second" not in figures:
            lines.append(f"| {name} | failed (see above) | | | | | |")
            continue
        speed, shape = figures["tokens_per_second"], (figures["batch"], figures["length"])
        peak = figures["mfu"]
        cells = (
            name,
            f"{shape[0]} x {shape[1]:,}",
            f"{figures['seconds'] * 1e3:.1f}",
            f"{speed:,.0f}",
            "" if peak is None else f"{peak:.1%}",
            f"{figures['peak_bytes'] / 2**30:.1f}",
            f"{speed / peers[shape]:.2f}" if shape in peers else "",
        )
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def measure(name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Measures a row in this process."""
    from dsjax.chips import peak_flops
    from dsjax.config.load import load_model_and_runtime
    from dsjax.counts import train_flops_per_token

    row = ROWS[name]
    row = dataclasses.replace(
        row, batch=arguments.batch or row.batch, length=arguments.length or row.length
    )
    model, _ = load_model_and_runtime(arguments.config, arguments.set)
    if row.length > model.max_length:
        model = dataclasses.replace(model, max_length=row.length)
    run = {OURS: measure_ours, PEER: measure_peer}[row.side]
    figures = run(name, row, model, arguments)
    rate = row.batch * row.length / figures["seconds"] / figures.get("devices", 1)
    chip: Any = types.SimpleNamespace(device_kind=figures["chip"])
    peak = peak_flops(chip)
    mfu = None if peak is None else rate * train_flops_per_token(model, row.length) / peak
    shape = {"side": row.side, "batch": row.batch, "length": row.length, "options": row.options}
    return shape | figures | {"tokens_per_second": rate, "mfu": mfu}


def timed(step: Callable[[], Any], steps: int) -> float:
    """Returns the median time of a call that waits, after two that compile and warm up."""
    for _ in range(2):
        step()
    times = []
    for _ in range(steps):
        began = time.perf_counter()
        step()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_ours(
    name: str, row: Row, model_config: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Times our whole optimiser step."""
    import functools

    import jax
    import jax.numpy as jnp
    from flax import nnx

    from dsjax.config import (
        BalanceConfig,
        GuardConfig,
        KernelConfig,
        LossConfig,
        MeshConfig,
        OptimizerConfig,
        RuntimeConfig,
    )
    from dsjax.config.load import override
    from dsjax.kernels import choose_kernels
    from dsjax.mesh import make_mesh, train_rules
    from dsjax.model import create_model
    from dsjax.training.step import abstract_train_state, init_train_state, jitted_train_step

    def given(room: str) -> list[str]:
        return [o.removeprefix(room) for o in row.options if o.startswith(room)]

    device = jax.devices()[0]
    runtime = override(RuntimeConfig(), given("runtime."))
    optimizer = override(OptimizerConfig(), given("optimizer."))
    if arguments.kernels != "auto":
        runtime = dataclasses.replace(runtime, kernels=KernelConfig.all_of(arguments.kernels))
    mesh = make_mesh(override(MeshConfig(fsdp=1), arguments.mesh)) if arguments.mesh else None
    rules = train_rules(mesh)
    kernels = choose_kernels(device, model_config, runtime, rules)
    graphdef, params = nnx.split(create_model(model_config, 0, runtime, rules, kernels))
    abstract = abstract_train_state(optimizer, params, rules, device)
    places = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    create = functools.partial(init_train_state, optimizer)
    state = jax.jit(create, donate_argnums=0, out_shardings=places)(params)
    shape = (1, row.batch, row.length)
    tokens = jax.random.randint(jax.random.key(1), shape, 0, model_config.vocab_size)
    batch = {
        "tokens": tokens,
        "targets": jnp.roll(tokens, -1, axis=-1),
        "positions": jnp.broadcast_to(jnp.arange(row.length), shape),
        "segment_ids": jnp.ones(shape, jnp.int32),
        "weights": jnp.ones(shape, jnp.float32),
    }
    if mesh is not None:
        batch = jax.device_put(batch, rules.sharding(None, "batch", "length"))
    rate = jnp.float32(1e-4)
    # The paper's balance losses (§3.1.2), which the peer does not compute.
    static = (graphdef, optimizer, LossConfig(BalanceConfig(0.003, 0.05, 0.02)), GuardConfig())
    began = time.perf_counter()
    lowered = jitted_train_step(device.platform).lower(*static, state, batch, rate)
    compiled = lowered.compile()
    compile_seconds = time.perf_counter() - began
    held = [state]

    def step() -> None:
        held[0], report = compiled(held[0], batch, rate)
        jax.block_until_ready((held[0], report))

    del state, params
    seconds = timed(step, arguments.steps)
    used = [device] if mesh is None else list(mesh.devices.flat)
    peaks = [(one.memory_stats() or {}).get("peak_bytes_in_use", 0) for one in used]
    analysis = compiled.memory_analysis()
    if arguments.profile is not None:
        arguments.profile.mkdir(parents=True, exist_ok=True)
        text = compiled.as_text() or ""
        (arguments.profile / f"{name}.hlo.txt.gz").write_bytes(gzip.compress(text.encode()))
        with tempfile.TemporaryDirectory() as folder:
            with jax.profiler.trace(folder):
                for _ in range(2):
                    step()
            kernels_run = kernels_in(folder)
        (arguments.profile / f"{name}.txt").write_text(summary(kernels_run, 2), encoding="utf-8")
    return {
        "chip": device.device_kind,
        "seconds": seconds,
        "devices": len(used),
        "peak_bytes": max(peaks),
        "argument_bytes": 0 if analysis is None else analysis.argument_size_in_bytes,
        "temporary_bytes": 0 if analysis is None else analysis.temp_size_in_bytes,
        "compile_seconds": compile_seconds,
        "kernels": dataclasses.asdict(kernels),
    }


def measure_peer(
    name: str, row: Row, model_config: Any, arguments: argparse.Namespace
) -> dict[str, Any]:
    """Times a step of transformers' DeepSeek-V2: grouped_mm, sdpa, torch's own fused AdamW."""
    import torch
    from transformers_peer import peer_model

    on_gpu = torch.cuda.is_available()
    model = peer_model(model_config).train()
    device = model.device
    tokens = torch.randint(0, model_config.vocab_size, (row.batch, row.length), device=device)
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(
        parameters, lr=1e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=on_gpu
    )
    forward: Any = torch.compile(model) if row.options == ("compiled",) else model

    def step() -> None:
        loss = forward(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if on_gpu:
            torch.cuda.synchronize()

    seconds = timed(step, arguments.steps)
    if arguments.profile is not None:
        arguments.profile.mkdir(parents=True, exist_ok=True)
        activities = [torch.profiler.ProfilerActivity.CUDA if on_gpu else None]
        kinds = [kind for kind in activities if kind] or [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=kinds) as profile:
            for _ in range(2):
                step()
        events = [
            Kernel(event.key, "", event.self_device_time_total * 1e3 / event.count)
            for event in profile.key_averages()
            for _ in range(event.count)
            if event.self_device_time_total
        ]
        (arguments.profile / f"{name}.txt").write_text(summary(events, 2), encoding="utf-8")
    return {
        "chip": torch.cuda.get_device_name() if on_gpu else "cpu",
        "seconds": seconds,
        "peak_bytes": torch.cuda.max_memory_allocated() if on_gpu else 0,
        "reserved_bytes": torch.cuda.max_memory_reserved() if on_gpu else 0,
    }


if __name__ == "__main__":
    with one_line_errors():
        main()
