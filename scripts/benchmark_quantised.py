"""Weights in fewer bits beside bfloat16 and a plain read of the same bytes, in one run.

    python scripts/benchmark_quantised.py products experts --batch 1 128
    python scripts/benchmark_quantised.py float8

`products` are V2-Lite's matrices outside the experts, `experts` one layer of its routed experts
(SwiGLU and down). Every copy of a matrix is read once in turn, more of them than caches hold, in
one program of many products. Prints a JSON line a measurement: microseconds, bytes of the weights
as stored, their rate, and its ratio to the plain read's. Of experts the bytes are those of the
experts chosen. Whole steps: `benchmark_steps.py --weights`.

`float8` are products of many rows, dense and by group, on Hopper: rows rounded to float8 and the
rounding alone beside the same product in bfloat16, in microseconds and TFLOP/s.
"""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from arguments import command_line, num_bytes, one_line_errors, positive

from dsjax.config import RECIPES, ModelConfig, RuntimeConfig
from dsjax.config.load import load_model_config
from dsjax.kernels import choose_kernels
from dsjax.layers.linear import multiply
from dsjax.plan.figures import device_bytes
from dsjax.quantise import format_of
from dsjax.xla_options import inference_options
from pallas_kernels.fp8_rows import BLOCK, quantised_blocks
from pallas_kernels.grouped_matmul import LayerOfStack, grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.cases import SWIGLU, TRAINING
from pallas_kernels.quantised import Format, QuantisedWeights, quantise
from pallas_kernels.quantised_matmul import quantised_matmul
from pallas_kernels.quantised_matmul.cases import MODELS, PREFILL

# What a matrix of each kind is stored in; "int4" is int4_g64.
FORMATS: dict[str, Format | None] = {
    "bf16": None,
    "int8": format_of("int8"),
    "fp8": format_of("fp8_block128"),
    "int4": format_of("int4_g64"),
}
COPIES_BYTES = 256 << 20  # several times an H100's L2 cache


def main() -> None:
    """Measures what the command line asks for."""
    parser = command_line(__doc__)
    parser.add_argument("what", nargs="+", choices=("products", "experts", "float8"))
    parser.add_argument("--batch", type=positive, nargs="+", default=[1, 128])
    parser.add_argument("--formats", nargs="+", choices=tuple(FORMATS), default=list(FORMATS))
    parser.add_argument("--config", default="deepseek_v2_lite", help="the model of experts")
    parser.add_argument("--copies-bytes", type=num_bytes, default=COPIES_BYTES)
    arguments = parser.parse_args()
    if "float8" in arguments.what:
        float8()
    if arguments.what == ["float8"]:
        return
    read = plain_read(arguments.copies_bytes)
    config = load_model_config(arguments.config)
    for batch in arguments.batch:
        if "products" in arguments.what:
            products(config, batch, arguments.formats, read, arguments.copies_bytes)
        if "experts" in arguments.what:
            experts(config, batch, arguments.formats, read)


def compiled(function: Callable[..., Any], *arguments: Any) -> Any:
    """Compiles as the engine does."""
    narrow = any(jnp.dtype(leaf.dtype).itemsize == 1 for leaf in jax.tree.leaves(arguments))
    options = inference_options(jax.devices()[0].platform, quantised=narrow)
    return jax.jit(function).lower(*arguments).compile(compiler_options=options or None)


def seconds_of(run: Callable[[], Any], rounds: int = 5) -> float:
    """Returns the best time of a call that takes some milliseconds, waited for."""
    jax.block_until_ready(run())
    times = []
    for _ in range(rounds):
        began = time.perf_counter()
        jax.block_until_ready(run())
        times.append(time.perf_counter() - began)
    return min(times)


def plain_read(num_bytes: int) -> float:
    """Returns bytes a second of a sum over 32-bit numbers."""
    numbers = jnp.ones(max(4 * num_bytes, 4) // 4, jnp.int32)
    run = compiled(jnp.sum, numbers)
    rate = float(numbers.nbytes / seconds_of(lambda: run(numbers)))
    print(json.dumps({"measurement": "plain read", "GB/s": round(rate / 1e9, 1)}), flush=True)
    return rate


def report(name: str, batch: int, form: str, seconds: float, num_bytes: float, read: float) -> None:
    """Prints a measurement."""
    rate = num_bytes / seconds
    figures = {
        "measurement": name,
        "chip": jax.devices()[0].device_kind,
        "batch": batch,
        "weights": form,
        "us": round(seconds * 1e6, 2),
        "MB": round(num_bytes / 1e6, 3),
        "GB/s": round(rate / 1e9, 1),
        "of_plain_read": round(rate / read, 3),
    }
    print(json.dumps(figures), flush=True)


@functools.partial(jax.jit, static_argnums=(1, 2))
def random_matrix(key: jax.Array, shape: tuple[int, ...], form: Format | None) -> Any:
    """Returns random weights [..., N, K], or [..., K, N] of bfloat16, as products take them."""
    weights = jax.random.normal(key, shape, jnp.bfloat16) * jnp.bfloat16(0.02)
    return weights.swapaxes(-1, -2) if form is None else quantise(weights, form)


def products(
    config: ModelConfig, batch: int, names: Sequence[str], read: float, copies_bytes: int
) -> None:
    """Times dense products, each of many copies of a matrix in one program."""
    runtime = RuntimeConfig(param_dtype="bfloat16", quantisation=RECIPES["int8"])
    kernels = choose_kernels(jax.devices()[0], config, runtime)
    for case in MODELS:
        for name in names:
            form = FORMATS[name]
            shape = (case.width_out, case.width_in)
            first = random_matrix(jax.random.key(0), shape, form)
            copies = max(2, int(copies_bytes // device_bytes(first)) + 1)
            matrices = [first]
            matrices += [random_matrix(jax.random.key(i), shape, form) for i in range(1, copies)]
            rows = jax.random.normal(jax.random.key(9), (copies, batch, shape[1]), jnp.bfloat16)

            def run(rows: jax.Array, matrices: list[Any]) -> list[jax.Array]:
                return [
                    multiply(x, matrix, kernels) for x, matrix in zip(rows, matrices, strict=True)
                ]

            program = compiled(run, rows, matrices)
            seconds = seconds_of(functools.partial(program, rows, matrices)) / copies
            report(f"product {case}", batch, name, seconds, device_bytes(first), read)


def experts(config: ModelConfig, batch: int, names: Sequence[str], read: float) -> None:
    """Times one layer of routed experts, of a stack of layers, with random routing."""
    assert config.moe is not None
    moe, layers = config.moe, 3
    wide, narrow = config.hidden_dim, moe.intermediate_dim
    rng = np.random.default_rng(0)
    chosen = [rng.permutation(moe.num_experts)[: moe.top_k] for _ in range(batch)]
    sizes = jnp.asarray(np.bincount(np.concatenate(chosen), minlength=moe.num_experts), jnp.int32)
    share = float((sizes > 0).mean())
    rows = jax.random.normal(jax.random.key(1), (batch * moe.top_k, wide), jnp.bfloat16)
    for name in names:
        form = FORMATS[name]
        runtime = RuntimeConfig(param_dtype="bfloat16")
        kernel = choose_kernels(jax.devices()[0], config, runtime).grouped_matmul
        shapes = [(layers, moe.num_experts, *s) for s in ((narrow, wide),) * 2 + ((wide, narrow),)]
        stacks = [random_matrix(jax.random.key(i), s, form) for i, s in enumerate(shapes)]

        def run(
            rows: jax.Array, stacks: list[Any], kernel: str = kernel, form: Format | None = form
        ) -> jax.Array:
            def body(rows: jax.Array, xs: Any) -> tuple[jax.Array, None]:
                layer, own = xs
                weights = own if form is None else [LayerOfStack(s, layer) for s in stacks]
                gate, up, down = weights
                hidden = grouped_swiglu(rows, gate, up, sizes, implementation=kernel)
                out = grouped_matmul(hidden, down, sizes, implementation=kernel)
                return (rows + out).astype(rows.dtype), None

            own = stacks if form is None else None
            numbers = jnp.arange(layers, dtype=jnp.int32)
            return jax.lax.scan(body, rows, (numbers, own))[0]

        program = compiled(run, rows, stacks)
        seconds = seconds_of(functools.partial(program, rows, stacks)) / layers
        num_bytes = share * device_bytes(stacks) / layers
        report(f"experts {config.moe.num_experts}", batch, name, seconds, num_bytes, read)


# How often a product of many rows is in one program, with other rows and weights each time; and
# rows of a product in the programs that follow one another: to wait for each costs 0.3 ms.
TURNS, ROWS_IN_A_ROW = 8, 100_000
MANY_ROWS = "hopper"  # what multiplies them


def float8() -> None:
    """Times products of many rows in float8 beside bfloat16, each stored form in turn."""
    forms = {"fp8_block128": format_of("fp8_block128"), "fp8": format_of("fp8")}

    def dense(rows: jax.Array, matrix: Any) -> jax.Array:
        if isinstance(matrix, QuantisedWeights):
            return quantised_matmul(rows, matrix, products="fp8", implementation=MANY_ROWS)
        return rows @ matrix

    for case in PREFILL:
        shape = (case.width_out, case.width_in)
        flops = 2 * case.rows * case.width_in * case.width_out
        beside_bfloat16(f"product {case}", dense, case.rows, (shape,), forms, flops)

    uneven = np.random.default_rng(0).dirichlet(np.full(64, 2.0))
    for kind in ("even", "uneven"):

        def sizes_of(rows: int, groups: int, kind: str = kind) -> jax.Array:
            share = np.full(groups, 1 / groups) if kind == "even" else uneven
            sizes = np.floor(share * rows).astype(np.int32)
            sizes[-1] += rows - sizes.sum()
            return jnp.asarray(sizes)

        def by_group(rows: jax.Array, *matrices: Any, sizes_of: Any = sizes_of) -> jax.Array:
            stored = isinstance(matrices[0], QuantisedWeights)
            how = {"products": "fp8" if stored else "widen", "implementation": MANY_ROWS}
            sizes = sizes_of(rows.shape[0], matrices[0].shape[0])
            run: Any = grouped_swiglu if len(matrices) == 2 else grouped_matmul
            out: jax.Array = run(rows, *matrices, sizes, **how)
            return out

        grouped = [(each, 1) for each in TRAINING if each.num_rows == 49152]
        for (groups, width_in, width_out, rows), count in [*grouped, (SWIGLU[0], 2)]:
            shapes = ((groups, width_out, width_in),) * count
            flops = 2 * rows * width_in * width_out * count
            name = f"{'swiglu' if count == 2 else 'grouped'} {kind} {rows}x{width_in}x{width_out}"
            beside_bfloat16(name, by_group, rows, shapes, forms, flops)


def beside_bfloat16(
    name: str,
    product: Callable[..., jax.Array],
    num_rows: int,
    shapes: Sequence[tuple[int, ...]],
    forms: dict[str, Format | None],
    flops: float,
) -> None:
    """Prints the times of a product in bfloat16, of its rows' rounding, and in float8."""
    draw = functools.partial(jax.random.normal, shape=(num_rows, shapes[0][-1]))
    rows = [draw(jax.random.key(turn), dtype=jnp.bfloat16) for turn in range(TURNS)]

    calls = max(1, ROWS_IN_A_ROW // num_rows)

    def time_of(run: Callable[..., Any], form: Format | None, matrices: bool = True) -> float:
        sets: list[Any] = [()] * TURNS
        if matrices:
            keys = iter(jax.random.split(jax.random.key(TURNS), TURNS * len(shapes)))
            sets = [tuple(random_matrix(next(keys), s, form) for s in shapes) for _ in sets]

        once = jax.jit(run)  # traced, and its kernels made, once for all turns

        def every(rows: list[jax.Array], sets: list[Any]) -> list[Any]:
            return [once(each, *matrices) for each, matrices in zip(rows, sets, strict=True)]

        program = compiled(every, rows, sets)

        def several() -> Any:
            for _ in range(calls):
                outs = program(rows, sets)
            return outs

        return seconds_of(several) / (TURNS * calls)

    def rounding(rows: jax.Array) -> Any:
        if MANY_ROWS != "hopper":
            return quantised_blocks(rows)
        # Here, so that a host needs no other chip's compiler.
        from pallas_kernels.hopper_fp8_rows import round_rows

        return round_rows(rows, rows.shape[0] + BLOCK)

    seconds = {
        "bf16": time_of(product, None),
        "rounding by XLA": time_of(quantised_blocks, None, False),
        "rounding": time_of(rounding, None, False),
    }
    seconds |= {name: time_of(product, form) for name, form in forms.items()}
    figures: dict[str, Any] = {"measurement": name, "chip": jax.devices()[0].device_kind}
    figures |= {f"{what} us": round(each * 1e6, 1) for what, each in seconds.items()}
    for what in ("bf16", *forms):
        figures[f"{what} TFLOP/s"] = round(flops / seconds[what] / 1e12, 1)
    for what in forms:
        alone = seconds[what] - seconds["rounding"]
        figures[f"{what} of bf16"] = round(seconds["bf16"] / seconds[what], 3)
        figures[f"{what} of bf16, rows rounded before"] = round(seconds["bf16"] / alone, 3)
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
