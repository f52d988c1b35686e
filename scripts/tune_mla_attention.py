"""Measures the Hopper attention kernels under other tiles; the best go into tiles.py by hand.

python scripts/tune_mla_attention.py [--shapes 16x16384 128x4096]
"""

import functools
import sys
from pathlib import Path

from arguments import command_line, numbers, one_line_errors

sys.path.insert(0, str(Path(__file__).parents[1]))

import jax
from benchmark_mla_attention import BACKWARD_DIMS, FORWARD_DIMS, SCALE, draw, seconds

from pallas_kernels.mla_attention import hopper_backward, hopper_forward
from pallas_kernels.mla_attention.arguments import Inputs, Masks
from pallas_kernels.mla_attention.cases import TIMED
from pallas_kernels.mla_attention.tiles import HopperBackwardTile, HopperForwardTile

FORWARD = [HopperForwardTile(heads_per_group=heads) for heads in (1, 4, 8, 16, 32)]
BACKWARD = [HopperBackwardTile(heads_per_group=heads) for heads in (1, 4, 8, 16, 32)]


def main() -> None:
    """Prints TFLOP/s of every tile and shape."""
    parser = command_line(__doc__)
    parser.add_argument(
        "--shapes", nargs="+", type=numbers(2), default=[f"{h}x{t}" for h, t in TIMED]
    )
    options = parser.parse_args()
    for shape in options.shapes:
        heads, tokens = map(int, shape.split("x"))
        arrays, d_out = draw(heads, tokens, 1)
        rows = jax.random.normal(jax.random.key(2), (1, heads, tokens))  # any: the work is the same
        for tile in [*FORWARD, *BACKWARD]:
            if isinstance(tile, HopperForwardTile):
                dims, inputs = FORWARD_DIMS, arrays
                run = jax.jit(
                    lambda *x, tile=tile, n=tokens: hopper_forward.attend(
                        Inputs(*x), Masks(), None, scale=SCALE, causal=True, num_keys=n, tile=tile
                    )
                )
            else:
                dims, inputs = BACKWARD_DIMS, (*arrays, d_out, rows + 10, rows)
                run = jax.jit(
                    lambda *x, tile=tile: hopper_backward.differentiate(
                        Inputs(*x[:5]), Masks(), None, *x[5:], scale=SCALE, causal=True, tile=tile
                    )
                )
            time = seconds(functools.partial(run, *inputs), jax.block_until_ready)
            print(f"{shape:9} {heads * tokens**2 * dims / time / 1e12:4.0f} {tile}", flush=True)


if __name__ == "__main__":
    with one_line_errors():
        main()
