"""Sweeps the sizes of the Hopper decode kernel on the GPU at hand; the best go into `tiles.py`.

python scripts/tune_mla_decode.py [--cases NAME ...]
"""

import argparse
import dataclasses
import itertools
import math

import jax
from benchmark_mla_decode import SHAPES, time_decode

from pallas_kernels.mla_decode import hopper
from pallas_kernels.mla_decode.tiles import HopperTiles, hopper_tiles

CHOICES = {
    "merge_rows": (4, 8, 16),
    "merge_pieces": (8, 33),
    "narrow_merge_pieces": (33, 66),
}


def candidates(start: HopperTiles):
    """Yields the sizes that differ from `start` in one field, after `start` itself."""
    yield start
    for name, values in CHOICES.items():
        for value in values:
            if value != getattr(start, name):
                yield dataclasses.replace(start, **{name: value})


def main() -> None:
    """Prints the time of every candidate, and the best over all shapes."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [shape.name for shape in SHAPES]
    parser.add_argument("--cases", nargs="*", default=names, choices=names)
    args = parser.parse_args()
    chip = jax.devices()[0].device_kind
    start = hopper_tiles(chip)
    shapes = [shape for shape in SHAPES if shape.name in args.cases]
    times = {}
    for shape, tiles in itertools.product(shapes, candidates(start)):
        hopper.hopper_tiles = lambda tiles=tiles: tiles
        times[shape, tiles], _ = time_decode(shape, "hopper", budget=0.05)
        print(f"{shape.name:26} {times[shape, tiles] * 1e6:9.1f} us  {tiles}", flush=True)

    def slowdown(tiles: HopperTiles) -> float:
        ratios = [
            times[shape, tiles] / min(times[shape, other] for other in candidates(start))
            for shape in shapes
        ]
        return math.prod(ratios) ** (1 / len(ratios))

    best = min(candidates(start), key=slowdown)
    print(f"{chip}: {best}, {slowdown(best):.3f} of each shape's own best in the geometric mean")


if __name__ == "__main__":
    main()
