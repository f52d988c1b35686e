"""Times tiles of the Hopper kernels at one shape, for pallas_kernels/grouped_matmul/tiles.py.

    python scripts/tune_grouped_matmul.py --experts 64 --in 2048 --out 2816 --rows 49152
        [--kind matmul|swiglu|weights] [--skewed]

All tiles that fit into shared memory are timed in turns with a dense matmul. The best come first.
"""

import functools
import itertools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from arguments import command_line, one_line_errors, positive
from benchmark_grouped_matmul import draw, even_sizes, take_turns, zipf_sizes

from pallas_kernels.grouped_matmul import hopper
from pallas_kernels.grouped_matmul.tiles import HopperTile

BLOCKS = {
    "matmul": ((128, 256), (256, 128), (64, 256), (64, 128), (32, 128), (16, 128), (16, 64)),
    "swiglu": ((128, 128), (64, 128), (32, 64), (16, 64)),
    "weights": ((256, 128), (128, 256), (128, 128)),
}


def call_of(kind: str, tile: HopperTile, num_groups: int) -> jax.stages.Wrapped:
    """Returns the jitted kernel with one tile, of the arrays that main draws."""
    if kind == "weights":
        return jax.jit(
            lambda lhs, rhs, d_out, sizes: hopper.weight_gradient(
                lhs, d_out, sizes, jnp.int32(0), num_groups, tile=tile
            )
        )
    swiglu = kind == "swiglu"
    return jax.jit(
        lambda lhs, rhs, d_out, sizes: hopper.row_products(
            (lhs,),
            (rhs, rhs) if swiglu else (rhs,),
            sizes,
            jnp.int32(0),
            activation=swiglu,
            tile=tile,
        )
    )


def main() -> None:
    """Times every tile that compiles and prints them, the fastest first."""
    parser = command_line(__doc__)
    parser.add_argument("--experts", type=positive, default=64)
    parser.add_argument("--in", dest="width_in", type=positive, default=2048)
    parser.add_argument("--out", dest="width_out", type=positive, default=2816)
    parser.add_argument("--rows", type=positive, default=49152)
    parser.add_argument("--kind", choices=BLOCKS, default="matmul")
    parser.add_argument("--skewed", action="store_true", help="Zipf sizes")
    options = parser.parse_args()

    lhs = draw(0, options.rows, options.width_in)
    rhs = draw(1, options.experts, options.width_in, options.width_out)
    d_out = draw(2, options.rows, options.width_out)
    sizes_of = zipf_sizes if options.skewed else even_sizes
    arrays = (lhs, rhs, d_out, sizes_of(options.experts, options.rows))
    calls: dict[str, Callable[[], object]] = {
        "dense": functools.partial(jax.jit(jnp.matmul), lhs, rhs[0])
    }
    # The weights' gradient has no other order.
    orders = (True,) if options.kind == "weights" else (True, False)
    for (block_m, block_n), stages, band, tickets in itertools.product(
        BLOCKS[options.kind], (3, 4, 6, 8), (8, 16, 32), orders
    ):
        tile = HopperTile(block_m, block_n, stages, band, tickets)
        call = call_of(options.kind, tile, options.experts)
        try:
            call.lower(*arrays)
        except ValueError as error:
            if "shared memory" not in str(error):
                raise
            continue
        calls[str(tile)] = functools.partial(call, *arrays)
    seconds = take_turns(calls, jax.block_until_ready)
    for name, each in sorted(seconds.items(), key=lambda item: item[1]):
        print(f"{each * 1e3:9.3f} ms {seconds['dense'] / each:5.2f} x dense  {name}")


if __name__ == "__main__":
    with one_line_errors():
        main()
