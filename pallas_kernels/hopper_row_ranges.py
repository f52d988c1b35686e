"""Rows by group on Hopper: where tiles of a group's rows lie, and how such a tile is stored."""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.hopper_schedule import raster


def running_sums(
    group_sizes_G: Array, group_offset: Array, num_groups: int, block_m: int
) -> tuple[Array, Array]:
    """For each range of rows, the rows before it and the tiles of the held groups before it.

    The ranges to write are the rows before the held groups, each group, and the rows after them.
    Sums over a comparison matrix and nothing after them, so that XLA makes one small kernel.

    Returns:
        int32 rows and tiles, [num_groups + 2].
    """
    range_R1 = jnp.arange(num_groups + 2)[:, None]
    group_G = jnp.arange(group_sizes_G.shape[0])
    before_RG = (range_R1 > 0) & (group_G < range_R1 + (group_offset - 1))
    tiles_G = (group_sizes_G + block_m - 1) // block_m
    sizes_RG = jnp.where(before_RG, group_sizes_G, 0)
    tiles_RG = jnp.where(before_RG & (group_G >= group_offset), tiles_G, 0)
    return jnp.sum(sizes_RG, axis=1, dtype=jnp.int32), jnp.sum(tiles_RG, axis=1, dtype=jnp.int32)


class RowRanges:
    """Where the ranges of rows and their tiles begin, from their running sums.

    Attributes:
        num_tiles: of all ranges, `columns` for each tile of rows.
    """

    def __init__(self, start_ref: Any, tiles_ref: Any, num_rows: int, block_m: int, columns: int):
        self.start_ref, self.tiles_ref = start_ref, tiles_ref
        self.num_ranges, self.num_rows = start_ref.shape[0], num_rows
        self.block_m, self.columns = block_m, columns
        first, last = start_ref[1], start_ref[self.num_ranges - 1]
        self.leading = lax.div(first + block_m - 1, block_m)
        trailing = lax.div(num_rows - last + block_m - 1, block_m)
        self.total = self.leading + tiles_ref[self.num_ranges - 1] + trailing
        self.num_tiles = self.total * columns

    def tile(self, index: Array) -> Array:
        """First tile of a range."""
        return jnp.where(index > 0, self.leading + self.tiles_ref[index], 0)

    def locate(self, number: Array, band: int, steps: int) -> tuple[Array, ...]:
        """Where a tile lies; a number beyond the last gets the last one's place.

        Args:
            number: of the tile.
            band: rows of tiles taken together before going on to the next column.
            steps: of a tile whose rows have a group.

        Returns:
            The number, the group among those held (of rows that have none, one that is not), the
            tile's first row and the rows from there to the group's end, its column of tiles, and
            its steps: none where rows get zeros.
        """
        linear = jnp.minimum(number, self.num_tiles - 1)
        found, first, height, start, end = self.find(linear)
        m, n = raster(linear - first * self.columns, height, self.columns, band)
        row = start + m * self.block_m
        # The first and the last range hold rows that get zeros.
        has_group = (found > 0) & (found < self.num_ranges - 1)
        steps_here = jnp.where(has_group, steps, 0)
        return number, found - 1, row, end - row, n, steps_here

    def find(self, tile: Array) -> tuple[Array, Array, Array, Array, Array]:
        """The range of a tile.

        Returns:
            The range, its first tile and number of tiles, its first row and its end.
        """
        # What a level of the search loads does not wait for one another. Where tiles are low, a
        # block's first products wait for the whole search, and there are registers for wide levels.
        fan_out = 2 if self.block_m >= 128 else math.isqrt(self.num_ranges - 1) + 1
        stride = 1
        while stride * fan_out < self.num_ranges:
            stride *= fan_out
        found = jnp.int32(0)
        while stride:
            candidates = [found + i * stride for i in range(1, fan_out)]
            for candidate in candidates:
                first = self.tile(jnp.minimum(candidate, self.num_ranges - 1))
                within = (candidate < self.num_ranges) & (first * self.columns <= tile)
                found = jnp.where(within, candidate, found)
            stride //= fan_out
        after, is_last = found + 1, found == self.num_ranges - 1
        after = jnp.where(is_last, found, after)
        first, tile_end = self.tile(found), jnp.where(is_last, self.total, self.tile(after))
        end = jnp.where(is_last, self.num_rows, self.start_ref[after])
        return found, first, tile_end - first, self.start_ref[found], end


def store_rows(pieces: Any, rows: Any, out_ref: Any, row: Array, valid: Array, full: int) -> None:
    """Copies the first `valid` rows of a block from shared memory; all `full` of them in one copy.

    The rows of a group's last tile go in copies of 32, 16, ... rows, as TMA's windows are static.
    """
    plgpu.commit_smem()

    def copy(first: Array | int, size: int) -> None:
        plgpu.copy_smem_to_gmem(
            rows.at[pl.ds(first, size)], out_ref.at[pl.ds(row + first, size)], commit_group=False
        )

    num_rows = out_ref.shape[0]
    if full <= num_rows:
        pl.when(valid >= full)(functools.partial(copy, 0, full))

    @pl.when((valid > 0) & (valid < full))
    def _() -> None:
        size = full // 2
        while size:
            if size <= num_rows:
                # The larger copies came first.
                first = valid & (full - 2 * size)
                pl.when((valid & size) != 0)(functools.partial(copy, first, size))
            size //= 2

    plgpu.commit_smem_to_gmem_group()
