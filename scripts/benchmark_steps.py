"""Steps of the engine as it serves beside their bounds, and transformers at the same sizes.

    python scripts/benchmark_steps.py configs/models/deepseek_v2_lite.py
    python scripts/benchmark_steps.py configs/models/deepseek_v2_lite.py --parts long

Random weights and tokens, one device, bfloat16 unless told otherwise. Nothing waits for a step but
the engine's own loop. Prints one JSON line a measurement, as it is made. Each side has a process.

"decode": `--rows 32x2048` decodes 32 sequences behind prompts of 2,048. The bound is the bytes
that the timed steps had to read over a plain read of this run: the experts that each layer used in
these steps (counted on the device, by running them once more over the same tokens and the same
cache), other weights once, a row of the embedding a token, latents. The embedding is scaled so that
a token's own row leads its stream, which makes routing near-uniform: of_even_routing is the mean
number of experts that a layer used over what even routing would give.

`--weights int8 int4` measures the same with weights in fewer bits, stored by these recipes, and
gives their speeds over the first's; each has a process, and a plain read and a dense product in it.
With `--profile FOLDER` a text file a row says which kernels ran, and when none did.

"prefill": whole prompts, as many a step as `--prefill 4x4096` says, over the dense product of this
run. "long": one prompt in chunks and in one piece, and the decode behind it.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from arguments import command_line, num_bytes, numbers, one_line_errors, positive, real
from benchmark_engine import NumberTokenizer, keep_what_is_there, report, time_of
from benchmark_mla_decode import time_matmul, time_read
from flax import nnx
from profiles import kernels_in, summary
from random_models import random_model
from recorded_steps import Recorder, StepRead, decode_figures, seconds_a_step, spread_tokens
from transformers_peer import PeerSteps, missing

from dsjax.config import RECIPES, EngineConfig
from dsjax.config.load import load_model_and_runtime
from dsjax.counts import serving_flops
from dsjax.engine import Engine, Request
from dsjax.inference.sampling import Sampling
from dsjax.model import DeepSeekV2
from dsjax.plan.figures import device_bytes

OURS, PEER = "ours", "peer"
WEIGHTS = ("bf16", *RECIPES)
PARTS = ("decode", "prefill", "long", "peer")
CHUNK = 2048
PROFILED = 12  # decode steps
PREFILLS = 8  # steps, of which the first three and the last fill and empty the queue


def main() -> None:
    """Measures what the command line asks for, or one side where this is its process."""
    parser = command_line(__doc__)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument(
        "--parts", nargs="+", choices=PARTS, default=["decode", "prefill", "peer"], help="in turn"
    )
    rows = ["1x2048", "32x2048", "128x1024"]
    parser.add_argument("--rows", type=numbers(2), nargs="+", default=rows, metavar="BATCHxLENGTH")
    parser.add_argument("--prefill", type=numbers(2), default="4x4096", metavar="BATCHxLENGTH")
    parser.add_argument("--long", type=positive, default=131_008, help="tokens of the long prompt")
    parser.add_argument("--chunk", type=positive, default=8192, help="tokens of its chunks")
    parser.add_argument("--steps", type=positive, default=64, help="decode steps timed")
    parser.add_argument("--peer-steps", type=positive, default=8, help="of the peer's")
    parser.add_argument("--repeats", type=positive, default=3, help="of a long prompt")
    parser.add_argument("--read-bytes", type=num_bytes, default=2 << 30, help="of the plain read")
    parser.add_argument("--dense-size", type=positive, default=8192, help="of the dense product")
    parser.add_argument("--embed-scale", type=real, default=50.0)
    parser.add_argument("--profile", type=Path, metavar="FOLDER", help="of decode: kernels by time")
    parser.add_argument("--weights", nargs="+", choices=WEIGHTS, default=WEIGHTS[:1], help="ours")
    parser.add_argument("--side", choices=(OURS, PEER), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    config, _ = load_model_and_runtime(arguments.config, arguments.overrides)
    for name, length in (("--prefill", sizes(arguments.prefill)[1]), ("--long", arguments.long)):
        if name.removeprefix("--") in arguments.parts and length >= config.max_length:
            parser.error(f"{name}: {length} tokens leave no room in {config.max_length}")
    if arguments.side == OURS:
        measure_ours(arguments)
    elif arguments.side == PEER:
        measure_peer(arguments)
    elif not in_own_processes(arguments.parts, arguments.weights):
        sys.exit(1)


def sizes(text: str) -> tuple[int, int]:
    """Returns the batch and the length of such as "32x2048"."""
    batch, length = map(int, text.split("x"))
    return batch, length


def in_own_processes(parts: list[str], weights: list[str]) -> bool:
    """Runs the sides one after the other, as each leaves its memory only when it ends.

    Returns:
        Whether all went well; a peer that cannot be run here did no harm.
    """
    found: dict[tuple[str, int, int], dict[str, float]] = {}
    sides = [(name, OURS) for name in weights] if set(parts) - {PEER} else []
    sides += [(PEER, PEER)] if PEER in parts else []
    well = True
    for name, side in sides:
        environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.95"} | dict(os.environ)
        if side == PEER:
            if (package := missing()) is not None:
                print(json.dumps({"measurement": PEER, "skipped": f"no {package} here"}))
                continue
            environment["JAX_PLATFORMS"] = "cpu"  # our code takes no memory of the device there
            environment.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
        own = ["--weights", name] if side == OURS else []
        command = [sys.executable, *sys.argv, *own, "--side", side]
        with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as ran:
            assert ran.stdout is not None
            for line in ran.stdout:
                print(line, end="", flush=True)
                if line.startswith("{"):
                    figures = json.loads(line)
                    of_shape = (figures["measurement"], figures.get("batch"), figures.get("length"))
                    found.setdefault(of_shape, {})[name] = figures.get("tokens_per_second")
        if ran.returncode:
            well = False
            print(json.dumps({"measurement": name, "failed": ran.returncode}), flush=True)
    for (what, batch, length), speeds in found.items():
        shape = {"of": what, "batch": batch, "length": length}
        for name, other in [(weights[0], PEER), *((each, weights[0]) for each in weights[1:])]:
            if speeds.get(name) and speeds.get(other):
                ratio = {"side": name, "to": other, "ratio": speeds[name] / speeds[other]}
                print(json.dumps({"measurement": "ratio", **shape, **ratio}), flush=True)
    return well


def measure_ours(arguments: argparse.Namespace) -> None:
    """Measures the engine's steps, on one device."""
    read = arguments.read_bytes / time_read(arguments.read_bytes)
    dense, _ = time_matmul(arguments.dense_size)
    about = {"read_bytes": arguments.read_bytes, "dense_size": arguments.dense_size}
    report("ceilings", about | {"bytes_per_second": read, "flops_per_second": dense})
    gc.collect()
    (weights,) = arguments.weights
    recipe = weights if weights in RECIPES else None
    model = random_model(arguments.config, arguments.overrides, recipe=recipe)
    spread_tokens(model, arguments.embed_scale)
    stored = {"weights": weights, "weight_bytes": device_bytes(nnx.state(model))}
    rows = [sizes(row) for row in arguments.rows]
    if "decode" in arguments.parts:
        for figures in decode(model, rows, arguments.steps, read, arguments.profile, weights):
            report("decode", stored | figures | {"embed_scale": arguments.embed_scale})
    if "prefill" in arguments.parts:
        report("prefill", stored | prefill(model, *sizes(arguments.prefill), dense))
    if "long" in arguments.parts:
        pieces = (arguments.chunk, arguments.long)
        for name, figures in long_prompt(
            model, arguments.long, pieces, arguments.steps, arguments.repeats, read
        ):
            report(name, stored | figures)


def random_requests(
    model: DeepSeekV2, seed: int, batch: int, length: int, tokens: int
) -> list[Request]:
    """Returns prompts that have nothing in common, greedily continued to the full length."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, model.config.vocab_size, (batch, length)).tolist()
    return [Request(tuple(row), Sampling(max_tokens=tokens, ignore_eos=True)) for row in ids]


def engine_of(model: DeepSeekV2, config: EngineConfig) -> Engine:
    """Returns an engine that shares no prefixes and gives prompts no log-probabilities."""
    config = dataclasses.replace(config, share_prefixes=False, prompt_logprobs=False)
    return Engine(model, NumberTokenizer(model.config.vocab_size), config)


def decode(
    model: DeepSeekV2,
    rows: list[tuple[int, int]],
    steps: int,
    read: float,
    profile: Path | None = None,
    weights: str = "bf16",
) -> Iterator[dict[str, Any]]:
    """Yields the figures of decoding each batch behind prompts of its length.

    One engine serves all rows, so that a step with prompts is compiled once. It compiles what it
    needs when it needs it: of two rounds the second is timed, and a third is profiled if that is
    asked for.
    """
    shortest = min(length for _, length in rows)
    piece = min(shortest, CHUNK)
    chunk = (max(1, CHUNK // piece), piece)
    # A batch decodes together when its last prompt has been read, a step after the other.
    texts = [
        -(-batch // chunk[0]) * -(-length // piece) + max(steps, PROFILED) + 16 + batch // 8
        for batch, length in rows
    ]
    pairs = list(zip(rows, texts, strict=True))
    most = max(batch for batch, _ in rows)
    config = EngineConfig(
        max_batch=most,
        batch_sizes=tuple(sorted({batch for batch, _ in rows})),
        chunks=(chunk,),
        max_length=max(length + text for (_, length), text in pairs),
        warm_up=False,
    )
    per_row = [b * (1 + -(-(length + text) // config.page_size)) for (b, length), text in pairs]
    with engine_of(model, dataclasses.replace(config, num_pages=max(per_row))) as engine:
        recorder = Recorder(engine)
        for seed, ((batch, length), text) in enumerate(pairs):
            for _ in range(2):
                engine.generate(random_requests(model, seed, batch, length, text))
                keep_what_is_there()
            figures = decode_figures(recorder, model, batch, read, most=steps)
            yield {"length": length} | figures
            if profile is not None:
                requests = random_requests(model, seed, batch, length, text)
                with tempfile.TemporaryDirectory() as folder:
                    trace_decodes(engine, recorder, requests, folder)
                    kernels = kernels_in(folder)
                profile.mkdir(parents=True, exist_ok=True)
                file = profile / f"{weights}_{batch}x{length}.txt"
                file.write_text(summary(kernels, PROFILED), encoding="utf-8")


def trace_decodes(engine: Engine, recorder: Recorder, requests: list[Request], folder: str) -> None:
    """Leaves a profile of steps that decode all requests, as they are served."""
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0  # it would make the host late
    count = 0

    def note(step: StepRead) -> None:
        nonlocal count
        if len(step.decoding) != len(requests) or step.prompt_tokens:
            return
        count += 1
        if count == 4:
            jax.profiler.start_trace(folder, profiler_options=options)
        elif count == 4 + PROFILED:
            jax.profiler.stop_trace()

    recorder.on_step = note
    engine.generate(requests)
    recorder.on_step = lambda _: None


def prefill(model: DeepSeekV2, batch: int, length: int, dense: float) -> dict[str, Any]:
    """Returns the figures of steps that each read `batch` whole prompts, over a dense product's."""
    config = EngineConfig(
        max_batch=2 * batch,
        batch_sizes=(2 * batch,),
        chunks=((batch, length),),
        max_length=length + 1,
        num_pages=2 * batch * (1 + -(-(length + 1) // 64)),
    )
    with engine_of(model, config) as engine:
        recorder = Recorder(engine)
        engine.generate(random_requests(model, 0, PREFILLS * batch, length, 1))
        # What a step's launch waits for is the end of the step two before it.
        steps = [step for step in recorder.steps if step.prompt_tokens == batch * length][2:]
    seconds = seconds_a_step(steps)
    flops = serving_flops(
        model.config, batch * length, batch, batch * length * (length + 1) // 2, "expanded"
    )
    return {
        "batch": batch,
        "length": length,
        "steps": len(steps) - 1,
        "seconds": seconds,
        "tokens_per_second": batch * length / seconds,
        "flops_per_second": flops / seconds,
        "of_dense": flops / seconds / dense,
    }


def long_prompt(
    model: DeepSeekV2,
    length: int,
    pieces: tuple[int, ...],
    steps: int,
    repeats: int,
    read: float,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields the figures of one long prompt in chunks of each size, then a ratio to the last."""
    text = steps + 16
    firsts: list[float] = []
    for piece in pieces:
        config = EngineConfig(
            max_batch=1,
            chunks=((1, piece),),
            max_length=length + text,
            num_pages=2 + -(-(length + text) // 64),
        )
        about = {"batch": 1, "length": length, "chunk": piece}
        try:
            with engine_of(model, config) as engine:
                recorder = Recorder(engine)
                seconds = []
                for seed in range(repeats):
                    keep_what_is_there()
                    (request,) = random_requests(model, seed, 1, length, text)
                    seconds.append(time_of(engine, request)[0])
                figures = decode_figures(recorder, model, 1, read, most=steps)
        except (ValueError, RuntimeError) as error:  # of memory
            yield "long", about | {"failed": str(error).splitlines()[0]}
            return
        firsts.append(statistics.median(seconds))
        peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)
        first = {"first_token": firsts[-1], "repeats": repeats, "peak_bytes": peak}
        yield "long", about | first | {"decode": figures}
    yield "long ratio", {"chunk": pieces[0], "of_one_piece": firsts[0] / firsts[-1]}


def measure_peer(arguments: argparse.Namespace) -> None:
    """Measures transformers at the sizes of ours."""
    config, _ = load_model_and_runtime(arguments.config, arguments.overrides)
    peer = PeerSteps(config, arguments.embed_scale)
    shapes = [("decode", *sizes(row)) for row in arguments.rows if "decode" in arguments.parts]
    if "prefill" in arguments.parts:
        shapes.append(("prefill", *sizes(arguments.prefill)))
    for name, batch, length in shapes:
        about = {"measurement": name, "side": PEER, "chip": peer.chip()}
        try:
            if name == "decode":
                figures = peer.decode(batch, length, arguments.peer_steps)
            else:
                figures = peer.prefill(batch, length, arguments.repeats)
        except RuntimeError as error:  # out of memory is one
            figures = {"failed": str(error).splitlines()[0]}  # type: ignore[dict-item]
        peer.forget()
        print(json.dumps({**about, "batch": batch, "length": length, **figures}), flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
