"""Times the experts' products beside a dense matmul, a plain read and torch's in the same run.

    python scripts/benchmark_grouped_matmul.py [training] [swiglu] [decode] [portable]
        [--implementation hopper] [--no-torch]

Rates are 2 M N K over the time (4 M N K for SwiGLU), M the sum of the group sizes. A GPU under load
changes its clock. So the variants of one size are timed in turns, and the median of the turns is
given. Decode is the time of all kernels on the device by CUPTI, the group metadata's included, with
the L2 cache flushed before every call. `portable` is for the CPU: the xla implementation beside
jax.lax.ragged_dot.
"""

import concurrent.futures
import functools
import time
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
from arguments import IMPLEMENTATIONS, command_line, one_line_errors
from jax import lax

from pallas_kernels.grouped_matmul import grouped_matmul, grouped_swiglu
from pallas_kernels.grouped_matmul.cases import DECODE, PORTABLE, SWIGLU, TRAINING
from pallas_kernels.quantised import BlockScaledWeights, block_scaled

ROUNDS, ROUND_SECONDS = 5, 0.02


def draw(seed: int, *shape: int, scale: float = 1.0) -> jax.Array:
    """Returns random bfloat16 values; zeros would let the chip run faster."""
    return jax.random.normal(jax.random.key(seed), shape, jnp.bfloat16) * jnp.bfloat16(scale)


def even_sizes(num_groups: int, num_rows: int) -> jax.Array:
    """Returns the same number of rows for every group, but for a remainder."""
    sizes = np.full(num_groups, num_rows // num_groups)
    sizes[: num_rows % num_groups] += 1
    return jnp.asarray(sizes, jnp.int32)


def zipf_sizes(num_groups: int, num_rows: int) -> jax.Array:
    """Returns sizes proportional to 1 / rank, in random order."""
    share = 1 / np.arange(1, num_groups + 1)
    sizes = np.floor(share / share.sum() * num_rows).astype(np.int64)
    sizes[0] += num_rows - sizes.sum()
    return jnp.asarray(np.random.default_rng(0).permutation(sizes), jnp.int32)


def compile_all(
    calls: Mapping[str, tuple[Callable[..., object], tuple[jax.Array, ...]]],
) -> dict[str, jax.stages.Compiled]:
    """Compiles functions for their arguments, all at once."""
    lowered = {name: jax.jit(call).lower(*arrays) for name, (call, arrays) in calls.items()}
    with concurrent.futures.ThreadPoolExecutor() as pool:
        compiled = pool.map(lambda each: each.compile(), lowered.values())
        return dict(zip(lowered, compiled, strict=True))


def take_turns(
    calls: Mapping[str, Callable[[], object]], wait: Callable[[object], object]
) -> dict[str, float]:
    """Returns the median seconds of each call, timed in turns."""
    repeats: dict[str, int] = {}
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for name, call in calls.items():
        wait(call())
        start = time.perf_counter()
        wait(call())
        repeats[name] = max(2, int(ROUND_SECONDS / (time.perf_counter() - start)))
    for _ in range(ROUNDS):
        for name, call in calls.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                out = call()
            wait(out)
            seconds[name].append((time.perf_counter() - start) / repeats[name])
            del out
    return {name: sorted(times)[ROUNDS // 2] for name, times in seconds.items()}


def show(title: str, flops: int, seconds: dict[str, float], peers: tuple[str, ...]) -> None:
    """Prints one line a variant: milliseconds, rate, and the ratio to each peer."""
    print(f"\n{title}")
    for name, each in seconds.items():
        ratios = "".join(
            f"  {seconds[peer] / each:5.2f} x {peer}" for peer in peers if peer in seconds
        )
        print(f"  {name:22s} {each * 1e3:9.3f} ms {flops / each / 1e12:7.1f} TFLOP/s{ratios}")


def torch_calls(
    lhs: jax.Array, rhs: jax.Array, d_out: jax.Array, sizes: Mapping[str, jax.Array]
) -> dict[str, Callable[[], object]]:
    """Returns calls of torch._grouped_mm on the same arrays, forward and weights-backward."""
    import torch

    torch_lhs, torch_rhs, torch_d_out = map(torch.from_dlpack, (lhs, rhs, d_out))
    ends = {k: torch.from_dlpack(jnp.cumsum(v, dtype=jnp.int32)) for k, v in sizes.items()}
    product = torch._grouped_mm
    return {
        "torch": lambda: product(torch_lhs, torch_rhs, offs=ends["even"]),
        "torch zipf": lambda: product(torch_lhs, torch_rhs, offs=ends["zipf"]),
        "torch weights": lambda: product(torch_lhs.t(), torch_d_out, offs=ends["even"]),
    }


def training(implementation: str, with_torch: bool) -> None:
    """Times forward, rows-backward and weights-backward, with even and with Zipf sizes."""

    def forward(lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(lhs, rhs, sizes, implementation=implementation)

    def rows(d_out: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        return grouped_matmul(d_out, rhs, sizes, transpose_rhs=True, implementation=implementation)

    def weights(d_out: jax.Array, lhs: jax.Array, rhs: jax.Array, sizes: jax.Array) -> jax.Array:
        pull = jax.vjp(lambda rhs: forward(lhs, rhs, sizes), rhs)[1]
        return pull(d_out)[0]

    for num_groups, width_in, width_out, num_rows in TRAINING:
        lhs, d_out = draw(0, num_rows, width_in), draw(1, num_rows, width_out)
        rhs = draw(2, num_groups, width_in, width_out, scale=width_in**-0.5)
        sizes = {
            "even": even_sizes(num_groups, num_rows),
            "zipf": zipf_sizes(num_groups, num_rows),
        }
        arrays: dict[str, tuple[jax.Array, ...]] = {
            "forward": (lhs, rhs),
            "rows-backward": (d_out, rhs),
            "weights-backward": (d_out, lhs, rhs),
        }
        passes: tuple[Callable[..., jax.Array], ...] = (forward, rows, weights)
        kinds = compile_all(
            {
                kind: (call, (*arrays[kind], sizes["even"]))
                for kind, call in zip(arrays, passes, strict=True)
            }
        )
        calls: dict[str, Callable[[], object]] = {
            "dense": functools.partial(jax.jit(jnp.matmul), lhs, rhs[0])
        }
        for size, of_groups in sizes.items():
            for kind, compiled in kinds.items():
                calls[f"{kind} {size}"] = functools.partial(compiled, *arrays[kind], of_groups)
        wait: Callable[[object], object] = jax.block_until_ready
        if with_torch:
            import torch

            calls |= torch_calls(lhs, rhs, d_out, sizes)

            def wait(out: object) -> None:
                jax.block_until_ready(out)
                torch.cuda.synchronize()

        title = f"{num_rows} rows, {width_in} -> {width_out}, {num_groups} experts"
        show(
            title, 2 * num_rows * width_in * width_out, take_turns(calls, wait), ("dense", "torch")
        )


def thrice(call: Callable[[], object]) -> list[object]:
    """Returns the results of three calls."""
    return [call() for _ in range(3)]


def swiglu(implementation: str, with_torch: bool) -> None:
    """Times gate, up and SwiGLU, fused and apart, and then forward and backward together."""
    del with_torch

    def fused(lhs: jax.Array, gate: jax.Array, up: jax.Array, sizes: jax.Array) -> jax.Array:
        return grouped_swiglu(lhs, gate, up, sizes, implementation=implementation)

    def apart(lhs: jax.Array, gate: jax.Array, up: jax.Array, sizes: jax.Array) -> jax.Array:
        products = [
            grouped_matmul(lhs, rhs, sizes, implementation=implementation) for rhs in (gate, up)
        ]
        gate_MN, up_MN = (product.astype(jnp.float32) for product in products)
        return (jax.nn.silu(gate_MN) * up_MN).astype(lhs.dtype)

    def step(
        call: Callable[..., jax.Array],
        lhs: jax.Array,
        gate: jax.Array,
        up: jax.Array,
        sizes: jax.Array,
        d_hidden: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        hidden, pull = jax.vjp(lambda *arrays: call(*arrays, sizes), lhs, gate, up)
        return hidden, pull(d_hidden)

    for num_groups, width_in, width_out, num_rows in SWIGLU:
        lhs, d_hidden = draw(0, num_rows, width_in), draw(1, num_rows, width_out)
        gate, up = (
            draw(seed, num_groups, width_in, width_out, scale=width_in**-0.5) for seed in (2, 3)
        )
        arrays = (lhs, gate, up, even_sizes(num_groups, num_rows))
        both = jnp.concatenate([gate[0], up[0]], axis=1)
        forward = {
            "dense": functools.partial(jax.jit(jnp.matmul), lhs, both),
            "fused": functools.partial(jax.jit(fused), *arrays),
            "apart": functools.partial(jax.jit(apart), *arrays),
        }
        flops = 4 * num_rows * width_in * width_out
        title = f"SwiGLU, {num_rows} rows, {width_in} -> 2 x {width_out}, {num_groups} experts"
        show(title, flops, take_turns(forward, jax.block_until_ready), ("dense", "apart"))
        # A step has three times the forward pass' products.
        whole = {
            "dense, three times": functools.partial(thrice, forward["dense"]),
            "fused": functools.partial(jax.jit(functools.partial(step, fused)), *arrays, d_hidden),
        }
        title += ", forward + backward"
        show(title, 3 * flops, take_turns(whole, jax.block_until_ready), ("dense, three times",))


def device_seconds(call: Callable[..., object], *arrays: jax.Array | BlockScaledWeights) -> float:
    """Returns the time of all kernels of a call, the median over calls."""
    from jax.experimental.mosaic.gpu import profiler

    _, milliseconds = profiler.Cupti(finalize=False).measure(call, iterations=9)(*arrays)
    return sorted(milliseconds)[4] / 1e3


def decode(implementation: str, with_torch: bool) -> None:
    """Times few tokens, which read each touched expert's weights once, beside a plain read."""
    del with_torch
    flush = draw(9, 100_000_000)

    def total(array: jax.Array) -> jax.Array:
        return jnp.sum(array.astype(jnp.float32))

    @jax.jit
    def run(
        lhs: jax.Array, rhs: jax.Array | BlockScaledWeights, sizes: jax.Array, flush: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        return total(flush), grouped_matmul(lhs, rhs, sizes, implementation=implementation)

    @jax.jit
    def read(array: jax.Array, flush: jax.Array) -> tuple[jax.Array, jax.Array]:
        return total(flush), total(array)

    flushing = device_seconds(jax.jit(total), flush)
    print("\ndecode: GB/s of the touched experts' weights; a plain read of as many bytes")
    for num_groups, width_in, width_out, top_k, dtype, tokens_of_case in DECODE:
        rhs = draw(2, num_groups, width_in, width_out, scale=width_in**-0.5)
        if dtype != "bfloat16":
            rhs = jax.jit(block_scaled, static_argnums=1)(rhs, dtype)
        for tokens in tokens_of_case:
            rng = np.random.default_rng(tokens)
            chosen = [rng.permutation(num_groups)[:top_k] for _ in range(tokens)]
            sizes = np.bincount(np.concatenate(chosen), minlength=num_groups)
            touched = int((sizes > 0).sum()) * width_in * width_out * rhs.dtype.itemsize
            lhs = draw(tokens, tokens * top_k, width_in)
            ours = device_seconds(run, lhs, rhs, jnp.asarray(sizes, jnp.int32), flush) - flushing
            plain = device_seconds(read, draw(3, touched // 2), flush) - flushing
            print(
                f"  {width_in} -> {width_out}, {num_groups} experts, {dtype}, {tokens:3d} tokens: "
                f"{ours * 1e6:7.1f} us {touched / ours / 1e9:6.0f} GB/s, "
                f"read {touched / plain / 1e9:6.0f}, {plain / ours:.2f} x read"
            )


def portable(implementation: str, with_torch: bool) -> None:
    """Times the xla implementation beside jax.lax.ragged_dot, forward and backward."""
    del implementation, with_torch

    def both_ways(
        call: Callable[..., jax.Array],
        lhs: jax.Array,
        rhs: jax.Array,
        sizes: jax.Array,
        d_out: jax.Array,
    ) -> tuple[jax.Array, tuple[jax.Array, ...]]:
        out, pull = jax.vjp(lambda *arrays: call(*arrays, sizes), lhs, rhs)
        return out, pull(d_out)

    xla = functools.partial(grouped_matmul, implementation="xla")
    for num_groups, width_in, width_out, num_rows in PORTABLE:
        lhs, d_out = (
            draw(0, num_rows, width).astype(jnp.float32) for width in (width_in, width_out)
        )
        rhs = draw(2, num_groups, width_in, width_out).astype(jnp.float32)
        arrays = (lhs, rhs, even_sizes(num_groups, num_rows))
        forward, backward = {}, {}
        for name, call in (("xla", xla), ("ragged_dot", lax.ragged_dot)):
            forward[name] = functools.partial(jax.jit(call), *arrays)
            backward[name] = functools.partial(
                jax.jit(functools.partial(both_ways, call)), *arrays, d_out
            )
        flops = 2 * num_rows * width_in * width_out
        title = (
            f"portable, float32, {num_rows} rows, {width_in} -> {width_out}, {num_groups} experts"
        )
        wait = jax.block_until_ready
        show(title, flops, take_turns(forward, wait), ("ragged_dot",))
        show(f"{title}, both ways", 3 * flops, take_turns(backward, wait), ("ragged_dot",))


SECTIONS = {
    "training": training,
    "swiglu": swiglu,
    "decode": decode,
    "portable": portable,
}


def main() -> None:
    """Runs the sections named on the command line."""
    parser = command_line(__doc__)
    parser.add_argument("sections", nargs="*", help=", ".join(SECTIONS))
    parser.add_argument("--implementation", default="hopper", choices=IMPLEMENTATIONS)
    parser.add_argument("--no-torch", action="store_true", help="leave torch's kernels out")
    options = parser.parse_args()
    unknown = set(options.sections) - set(SECTIONS)
    if unknown:
        parser.error(f"unknown sections {sorted(unknown)}; there are {', '.join(SECTIONS)}")
    print(f"{jax.devices()[0].device_kind}, jax {jax.__version__}")
    for name in options.sections or ("training", "swiglu", "decode"):
        SECTIONS[name](options.implementation, not options.no_torch)


if __name__ == "__main__":
    with one_line_errors():
        main()
