"""Where tiles of rows lie that belong to groups, as Hopper's kernels find them."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.hopper_row_ranges import RowRanges, running_sums

COLUMNS, STEPS, BAND = 3, 5, 2


def tiles_of(sizes: np.ndarray, first: int, held: int, num_rows: int, block_m: int) -> set:
    """Every tile's group, first row, rows from there to its range's end, column and steps."""
    ends = np.cumsum(sizes)
    inside = range(first, first + held)
    bounds = [0, ends[first] - sizes[first], *(ends[group] for group in inside), num_rows]
    tiles = set()
    for index, (start, end) in enumerate(itertools.pairwise(bounds)):
        steps = STEPS if 0 < index <= held else 0
        for row in range(start, end, block_m):
            tiles |= {(index - 1, row, end - row, n, steps) for n in range(COLUMNS)}
    return tiles


@pytest.mark.core
@pytest.mark.parametrize("block_m", [16, 128])  # searched in two wide levels, and in halves
@pytest.mark.parametrize("num_groups", [1, 2, 8, 64, 160])
def test_every_tile_is_found_once(num_groups, block_m, rng):
    sizes = rng.multinomial(40 * num_groups, rng.dirichlet(np.full(num_groups, 0.3)))
    num_rows = int(sizes.sum()) + 50
    first = int(rng.integers(num_groups))
    held = int(rng.integers(1, num_groups - first + 1))

    @jax.jit
    def locate(numbers_N):
        sums = running_sums(jnp.asarray(sizes, jnp.int32), jnp.int32(first), held, block_m)
        ranges = RowRanges(*sums, num_rows, block_m, COLUMNS)
        find = jax.vmap(lambda number: ranges.locate(number, BAND, STEPS))
        return ranges.num_tiles, find(numbers_N)

    want = tiles_of(sizes, first, held, num_rows, block_m)
    num_tiles, found = locate(jnp.arange(len(want), dtype=jnp.int32))
    assert num_tiles == len(want)
    _, *places = (np.asarray(each).tolist() for each in found)
    assert set(zip(*places, strict=True)) == want
