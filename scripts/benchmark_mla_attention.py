"""Measures latent attention on a GPU: errors, speed, the ratio to a dense product and to cuDNN.

    python scripts/benchmark_mla_attention.py [--check] [--segment-ids] [--implementation xla]

Prints TFLOP/s of the forward and the backward pass (DeepSeek-V2's 192/128 heads, causal, bfloat16),
counted as 2 B H T^2 (192 + 128) / 2 and 2 B H T^2 (3 * 192 + 2 * 128) / 2. With torch installed its
cuDNN attention is measured in the same run. `--check` compares all of the tests' cases with the
float64 oracle first. `--segment-ids` gives all tokens the id of one document, as training on long
documents does. The work is the same, but the kernels look for masked blocks.
"""

import functools
import os
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from arguments import IMPLEMENTATIONS, command_line, numbers, one_line_errors

os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")  # torch needs memory as well
sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
import jax.numpy as jnp

from pallas_kernels.mla_attention import mla_attention, mla_attention_with_lse
from pallas_kernels.mla_attention.cases import CASES, LARGE_CASES, TIMED, Case
from tests import oracle_attention

SCALE = 192**-0.5
FORWARD_DIMS, BACKWARD_DIMS = 192 + 128, 3 * 192 + 2 * 128


def seconds(run: Callable[[], Any], wait: Callable[[Any], Any], repeats: int = 10) -> float:
    """Returns the median time of a call, over three rounds of `repeats` calls each."""
    wait(run())
    rounds = []
    for _ in range(3):
        start = time.perf_counter()
        for _ in range(repeats):
            result = run()
        wait(result)
        rounds.append((time.perf_counter() - start) / repeats)
    return statistics.median(rounds)


@functools.partial(jax.jit, static_argnums=(0, 1))
def draw(heads: int, tokens: int, seed: int) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Returns random inputs and a random gradient of the output, of one sequence."""
    dims = [(tokens, heads, 128), (tokens, heads, 64), (tokens, heads, 128), (tokens, 64)]
    dims += [(tokens, heads, 128), (tokens, heads, 128)]
    keys = jax.random.split(jax.random.key(seed), len(dims))
    arrays = [
        jax.random.normal(key, (1, *shape), jnp.bfloat16)
        for key, shape in zip(keys, dims, strict=True)
    ]
    return tuple(arrays[:5]), arrays[5]


def errors(case: Case, implementation: str) -> list[float]:
    """Returns a case's relative errors against the oracle: output, log-sum-exp, five gradients."""
    arrays, masks, d_out = case.draw(time.time_ns() % 2**31, jnp.bfloat16)
    attend = functools.partial(
        mla_attention_with_lse,
        scale=case.scale,
        causal=case.causal,
        q_segment_ids_BT=masks[0],
        kv_segment_ids_BS=masks[1],
        q_offset_B=masks[2],
        implementation=implementation,
    )

    def both(arrays: tuple[jax.Array, ...], d_out: jax.Array) -> tuple[jax.Array, ...]:
        out, pullback, lse = jax.vjp(attend, *arrays, has_aux=True)
        return (out, lse, *pullback(d_out))

    run = jax.jit(both).lower(arrays, d_out).compile()
    jax.block_until_ready(jnp.full((2**26,), jnp.nan)).delete()  # poisons what is allocated next
    results = run(arrays, d_out)
    inputs: tuple[Any, ...] = (*arrays, *masks, d_out)
    oracle = functools.partial(oracle_attention.attend, scale=case.scale, causal=case.causal)
    out, lse, grads = oracle(*inputs)
    pairs = zip(results, (out, lse, *grads), strict=True)
    return [oracle_attention.relative_error(*pair) for pair in pairs]


def check(implementation: str) -> bool:
    """Prints each case's relative errors against the oracle; returns whether all are small."""
    passed = True
    cases = CASES + LARGE_CASES
    with ThreadPoolExecutor(8) as pool:  # Compiling takes the time.
        for case, found in zip(
            cases, pool.map(lambda case: errors(case, implementation), cases), strict=True
        ):
            passed &= all(error < 5e-3 for error in found)
            print(f"{case.name:24}", *(f"{error:.1e}" for error in found), flush=True)
    return passed


def measure_cudnn(heads: int, tokens: int) -> tuple[float, float]:
    """Returns the seconds of a forward and of a backward pass of torch's cuDNN attention."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def normal(dim: int) -> torch.Tensor:
        shape = (1, heads, tokens, dim)
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda", requires_grad=True)

    q, k, v = normal(192), normal(192), normal(128)
    attend = torch.nn.functional.scaled_dot_product_attention
    wait = lambda _: torch.cuda.synchronize()  # noqa: E731
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        with torch.no_grad():
            forward = seconds(lambda: attend(q, k, v, is_causal=True), wait)
        out = attend(q, k, v, is_causal=True)
        d_out = torch.randn_like(out)
        run = lambda: torch.autograd.grad(out, (q, k, v), d_out, retain_graph=True)  # noqa: E731
        return forward, seconds(run, wait)


def main() -> None:
    """Runs what the command line asks for."""
    parser = command_line(__doc__)
    parser.add_argument("--check", action="store_true", help="compare with the oracle first")
    parser.add_argument("--segment-ids", action="store_true", help="give ids, all alike")
    parser.add_argument("--implementation", default="hopper", choices=IMPLEMENTATIONS)
    parser.add_argument(
        "--shapes", nargs="+", type=numbers(2), default=[f"{h}x{t}" for h, t in TIMED]
    )
    options = parser.parse_args()
    print(jax.devices()[0].device_kind, options.implementation, flush=True)
    if options.check and not check(options.implementation):
        sys.exit("an error is over 5e-3")
    matrix = jax.random.normal(jax.random.key(0), (8192, 8192), jnp.bfloat16)
    product = jax.jit(lambda a: a @ a)
    dense = 2 * 8192**3 / seconds(lambda: product(matrix), jax.block_until_ready) / 1e12
    print(f"dense bfloat16 8192^3: {dense:.0f} TFLOP/s", flush=True)
    attend = functools.partial(mla_attention, scale=SCALE, implementation=options.implementation)
    forward = jax.jit(attend)
    # The residuals are arguments, so that the backward pass alone is measured.
    residuals = jax.jit(lambda *arrays, **ids: jax.vjp(lambda *x: attend(*x, **ids), *arrays)[1])
    backward = jax.jit(lambda pullback, d_out: pullback(d_out))
    for shape in options.shapes:
        heads, tokens = map(int, shape.split("x"))
        arrays, d_out = draw(heads, tokens, 1)
        ids: dict[str, jax.Array] = {}
        if options.segment_ids:
            ids = dict.fromkeys(
                ("q_segment_ids_BT", "kv_segment_ids_BS"), jnp.ones((1, tokens), int)
            )
        pullback = residuals(*arrays, **ids)
        ours = (
            seconds(functools.partial(forward, *arrays, **ids), jax.block_until_ready),
            seconds(functools.partial(backward, pullback, d_out), jax.block_until_ready),
        )
        try:
            peers = measure_cudnn(heads, tokens)
        except ImportError:
            peers = None
        for i, (name, dims) in enumerate((("forward", FORWARD_DIMS), ("backward", BACKWARD_DIMS))):
            speed = heads * tokens**2 * dims / ours[i] / 1e12
            row = f"{shape:9} {name:8} {speed:4.0f} TFLOP/s, {speed / dense:.2f} of dense"
            if peers is not None:
                row += f", {peers[i] / ours[i]:.2f} x cuDNN ({speed * ours[i] / peers[i]:.0f})"
            print(row, flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
