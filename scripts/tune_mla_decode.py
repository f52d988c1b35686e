"""Sweeps the sizes of the Hopper decode kernel on the GPU at hand; the best go into `tiles.py`.

python scripts/tune_mla_decode.py [--cases NAME ...]
"""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterator

import jax
from arguments import command_line, one_line_errors
from benchmark_mla_decode import SCALE, time_decode

from pallas_kernels.mla_decode import hopper
from pallas_kernels.mla_decode.cases import TIMED
from pallas_kernels.mla_decode.tiles import HOPPER, HopperTile

CHOICES = {
    "merge_rows": (4, 8, 16),
    "merge_pieces": (8, 33),
    "narrow_merge_pieces": (33, 66),
}


def candidates() -> Iterator[HopperTile]:
    """Yields the sizes that differ from the table's in one field, after these themselves."""
    yield HOPPER
    for name, values in CHOICES.items():
        for value in values:
            if value != getattr(HOPPER, name):
                yield dataclasses.replace(HOPPER, **{name: value})


def main() -> None:
    """Prints the time of every candidate, and the best over all shapes."""
    parser = command_line(__doc__)
    names = [shape.name for shape in TIMED]
    parser.add_argument("--cases", nargs="*", default=names, choices=names)
    args = parser.parse_args()
    chip = jax.devices()[0].device_kind
    shapes = [shape for shape in TIMED if shape.name in args.cases]
    times = {}
    for shape, tile in itertools.product(shapes, candidates()):
        decode = functools.partial(hopper.decode, scale=SCALE, tile=tile)
        times[shape, tile], _ = time_decode(shape, decode, budget=0.05)
        print(f"{shape.name:26} {times[shape, tile] * 1e6:9.1f} us  {tile}", flush=True)

    def slowdown(tile: HopperTile) -> float:
        ratios = [
            times[shape, tile] / min(times[shape, other] for other in candidates())
            for shape in shapes
        ]
        return math.prod(ratios) ** (1 / len(ratios))

    best = min(candidates(), key=slowdown)
    print(f"{chip}: {best}, {slowdown(best):.3f} of each shape's own best in the geometric mean")


if __name__ == "__main__":
    with one_line_errors():
        main()
