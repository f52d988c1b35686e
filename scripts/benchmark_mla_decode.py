"""Times absorbed decode on the GPU at hand, beside a plain read and a dense matmul in the same run.

    python scripts/benchmark_mla_decode.py [--cases NAME ...] [--implementation hopper] [--kernels]

A call is timed inside one jitted loop over the layers of a pool that is larger than the last-level
cache, as in a model. Planning the work and merging its pieces are part of it. FLOPs are
B H T 2 S (576 + 512) and bytes 2 B (T H 576 + S 576 + T H 512). A token whose latent has 8 bits
counts 644 bytes, not 2 * 576.

The card's power limit holds long runs back. So each call is timed in short runs after pauses too
("rested"), as benchmarks with few repeats do.
"""

import functools
import statistics
import time
from collections.abc import Callable
from typing import cast

import jax
import jax.numpy as jnp
from arguments import IMPLEMENTATIONS, command_line, one_line_errors
from jax import lax

from pallas_kernels.mla_decode import LatentPages, mla_decode
from pallas_kernels.mla_decode.cases import TIMED, Timed
from pallas_kernels.mla_decode.limits import KV_RANK, ROPE_DIM
from pallas_kernels.quantised import row_scaled

SCALE = 192**-0.5
POOL_BYTES = 400 << 20


# Queries by latent and by position, the pool, the page table and the lengths.
Inputs = tuple[jax.Array, jax.Array, LatentPages, jax.Array, jax.Array]


def make_inputs(shape: Timed) -> tuple[Inputs, int, int]:
    """Draws queries, a pool of several layers, a scattered page table and lengths."""
    keys = jax.random.split(jax.random.key(0), 6)
    columns = shape.length // shape.page_size
    per_layer = shape.batch * columns
    page_bytes = shape.page_size * shape.key_bytes
    # At least two, or the call would not depend on the loop's step and could leave the loop.
    num_layers = max(2, -(-POOL_BYTES // (per_layer * page_bytes)))
    num_pages = num_layers * per_layer
    draw = functools.partial(jax.random.normal, dtype=jnp.bfloat16)
    latent = draw(keys[0], (num_pages, shape.page_size, KV_RANK))
    rope, scale = draw(keys[1], (num_pages, shape.page_size, ROPE_DIM)), None
    if shape.quantised:
        quantize = jax.jit(row_scaled, static_argnums=1)
        latent, scale = quantize(latent, jnp.dtype(shape.quantised))
    pages = LatentPages(latent, rope, scale)
    table = jax.random.permutation(keys[2], per_layer).reshape(shape.batch, columns)
    lengths = jnp.full(shape.batch, shape.length, jnp.int32)
    if shape.ragged:
        lengths = jnp.linspace(shape.length // 2, shape.length, shape.batch).astype(jnp.int32)
        lengths = jax.random.permutation(keys[3], lengths)
    rows = (shape.batch, shape.tokens, shape.heads)
    q_latent, q_rope = draw(keys[4], (*rows, KV_RANK)), draw(keys[5], (*rows, ROPE_DIM))
    return (q_latent, q_rope, pages, table.astype(jnp.int32), lengths), num_layers, per_layer


def seconds_per_call[C: jax.Array | tuple[jax.Array, jax.Array]](
    step: Callable[..., C], first: C, *args: jax.Array | LatentPages, budget: float = 0.1
) -> tuple[float, float]:
    """Returns the median time of `step(i, previous, *args)`, one of many in a jitted loop.

    The second figure is the same of a fifth of the repeats, each time after a pause.
    """
    steps = 20

    @jax.jit
    def repeat(first: C, *args: jax.Array | LatentPages) -> C:
        return lax.fori_loop(0, steps, lambda i, previous: step(i, previous, *args), first)

    def measure(count: int) -> float:
        start = time.perf_counter()
        out = first
        for _ in range(count):
            out = repeat(out, *args)
        jax.block_until_ready(out)
        return (time.perf_counter() - start) / count / steps

    measure(1)
    count = max(2, min(100, int(budget / steps / measure(2))))
    sustained = statistics.median(measure(count) for _ in range(5))

    def measure_rested() -> float:
        time.sleep(0.25)
        return measure(max(2, count // 5))

    return sustained, statistics.median(measure_rested() for _ in range(5))


def time_decode(
    shape: Timed, decode: Callable[..., tuple[jax.Array, jax.Array]], budget: float = 0.1
) -> tuple[float, float]:
    """Returns the seconds that one call of `decode` takes, and takes rested."""
    inputs, num_layers, per_layer = make_inputs(shape)

    def call(
        i: jax.Array,
        _: tuple[jax.Array, jax.Array],
        q_latent: jax.Array,
        q_rope: jax.Array,
        pages: LatentPages,
        table: jax.Array,
        lengths: jax.Array,
    ) -> tuple[jax.Array, jax.Array]:
        table = table + (i % num_layers) * per_layer
        return decode(q_latent, q_rope, pages, table, lengths)

    first = jnp.zeros_like(inputs[0]), jnp.zeros(inputs[0].shape[:-1], jnp.float32)
    return seconds_per_call(call, first, *inputs, budget=budget)


def kernel_times(shape: Timed, decode: Callable[..., object]) -> list[tuple[str, float]]:
    """Returns (name, microseconds) of each kernel of one call, from the driver's own counters."""
    from jax.experimental.mosaic.gpu import profiler

    inputs, _, _ = make_inputs(shape)
    _, times = profiler.measure(jax.jit(decode), aggregate=False, iterations=5)(*inputs)
    runs = cast(list[list[tuple[str, float]]], times)
    return [
        (kernels[0][0], 1e3 * statistics.median(t for _, t in kernels))
        for kernels in zip(*runs, strict=True)
    ]


def time_read(num_bytes: int) -> float:
    """Returns the seconds that a reduction over so many bytes takes."""
    rows = max(1, num_bytes // 4 // 4096)
    copies = max(2, -(-POOL_BYTES // num_bytes))
    x = jax.random.normal(jax.random.key(1), (copies, rows, 4096))
    return seconds_per_call(lambda i, _, x: jnp.max(x[i % copies]), jnp.float32(0), x)[0]


def time_matmul(size: int = 8192) -> tuple[float, float]:
    """Returns the operations per second of a dense bfloat16 product, and those rested."""
    keys = jax.random.split(jax.random.key(2))
    a, x = (jax.random.normal(key, (size, size), jnp.bfloat16) for key in keys)
    # Scaled so that a chain of products keeps its size.
    seconds, rested = seconds_per_call(lambda i, x, a: a @ x, x, a * size**-0.5)
    return 2 * size**3 / seconds, 2 * size**3 / rested


def main() -> None:
    """Prints one line per shape."""
    parser = command_line(__doc__)
    names = [shape.name for shape in TIMED]
    parser.add_argument("--cases", nargs="*", default=names, choices=names)
    parser.add_argument("--implementation", default="hopper", choices=IMPLEMENTATIONS)
    parser.add_argument("--kernels", action="store_true", help="print each kernel's time too")
    args = parser.parse_args()
    decode = functools.partial(mla_decode, scale=SCALE, implementation=args.implementation)

    dense, dense_rested = time_matmul()
    print(
        f"{jax.devices()[0].device_kind}; dense bfloat16 8192^3: {dense / 1e12:.0f} TFLOP/s, "
        f"rested {dense_rested / 1e12:.0f}"
    )
    print(
        f"{'shape':26} {'us':>8} {'TFLOP/s':>8} {'of dense':>8} {'GB/s':>8} {'of read':>8} "
        f"| rested: {'us':>8} {'TFLOP/s':>8} {'of dense':>8}"
    )
    for shape in TIMED:
        if shape.name not in args.cases:
            continue
        seconds, rested = time_decode(shape, decode)
        # A ragged batch holds fewer keys than its longest sequence times its size.
        share = 0.75 if shape.ragged else 1.0
        flops, moved = share * shape.flops / seconds, share * shape.num_bytes / seconds
        read = share * shape.num_bytes / time_read(int(share * shape.num_bytes))
        print(
            f"{shape.name:26} {seconds * 1e6:8.1f} {flops / 1e12:8.1f} {flops / dense:8.3f} "
            f"{moved / 1e9:8.0f} {moved / read:8.3f} |         {rested * 1e6:8.1f} "
            f"{share * shape.flops / rested / 1e12:8.1f} "
            f"{share * shape.flops / rested / dense_rested:8.3f}",
            flush=True,
        )
        if args.kernels:
            for name, microseconds in kernel_times(shape, decode):
                print(f"    {microseconds:8.2f} us  {name[:80]}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
