"""What the TPU kernels share: windows of a group's rows, and copies of the rows that they have."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import tpu_chip
from pallas_kernels.grouped_matmul.groups import group_of_tile

# Rows that copies start at and go by: a register of bfloat16 holds as many.
ALIGN = 16
# What a window is, as bits: the first or the last of its range.
FIRST, LAST = 1, 2


@dataclasses.dataclass(frozen=True)
class Windows:
    """Row ranges cut into windows of at most so many rows, in order.

    A window begins at the multiple of `ALIGN` at or below its range's first row and then every so
    many rows, so what the rows of a range do not fill is at its end only. All that a kernel needs
    is worked out here: its scalar unit would take as long as a part of the matrix work.

    Attributes:
        count: int32 number of windows, [1]; the lists are longer.
        range_W: int32 range of each window.
        base_W: int32 first row of each window, a multiple of `ALIGN`.
        low_W: int32 first valid row, from the base; not 0 in a range's first window only.
        high_W: int32 end of the valid rows, from the base.
        bits_W: int32 `FIRST` and `LAST`.
    """

    count: Array
    range_W: Array
    base_W: Array
    low_W: Array
    high_W: Array
    bits_W: Array

    @property
    def scalars(self) -> tuple[Array, ...]:
        """The arrays, as a kernel takes them."""
        return self.count, self.range_W, self.base_W, self.low_W, self.high_W, self.bits_W


def make_windows(start_R: Array, rows: int, num_rows: int, *, empty_ranges: bool) -> Windows:
    """Cuts ranges into windows.

    Args:
        start_R: int32 first row of each range, and the end of the last, [ranges + 1].
        rows: most rows of a window.
        num_rows: rows of all ranges together, at most.
        empty_ranges: whether an empty range has a window too.
    """
    start_R = start_R.astype(jnp.int32)
    first_R = start_R[:-1] // ALIGN * ALIGN
    windows_R = (start_R[1:] - first_R + rows - 1) // rows
    empty_R = start_R[1:] == start_R[:-1]
    windows_R = jnp.where(empty_R, int(empty_ranges), windows_R).astype(jnp.int32)
    ranges = start_R.shape[0] - 1
    filled = min(ranges, num_rows)
    # A filled range has up to ALIGN - 1 rows more, and its last window may lack all but one.
    most = (num_rows + filled * (ALIGN - 1)) // rows + (ranges if empty_ranges else filled)
    range_W, index_W, count = group_of_tile(windows_R, max(most, 1))
    base_W = first_R[range_W] + index_W * rows
    low_W = jnp.maximum(start_R[range_W] - base_W, 0)
    high_W = jnp.minimum(start_R[range_W + 1] - base_W, rows)
    last_W = index_W == windows_R[range_W] - 1
    bits_W = jnp.where(index_W == 0, FIRST, 0) + jnp.where(last_W, LAST, 0)
    arrays = (count.reshape(1), range_W, base_W, low_W, high_W, bits_W)
    return Windows(*(x.astype(jnp.int32) for x in arrays))


def fetched(high: Any) -> Any:
    """Rows to fetch of a window: up to the last valid one."""
    return (high + (ALIGN - 1)) & -ALIGN


def copy_rows(
    source: Callable[[Any, int], Any],
    target: Callable[[Any, int], Any],
    semaphore: Any,
    num_rows: Any,
    most: int,
    *,
    wait: bool,
) -> None:
    """Starts or awaits copies of a number of rows that the program decides, as powers of two.

    Args:
        source: the part of the source that holds (first row, rows), rows counted from 0.
        target: as `source`.
        semaphore: counts the copies.
        num_rows: int32 multiple of `ALIGN`, at most `most`.
        most: a bound on `num_rows`.
        wait: whether to await them instead.
    """
    size = ALIGN
    while size <= most:
        # The larger powers come first in memory.
        first = pl.multiple_of(num_rows & ~(2 * size - 1), 2 * size)

        @pl.when((num_rows & size) != 0)
        def _piece(first: Any = first, size: int = size) -> None:
            copy = pltpu.make_async_copy(source(first, size), target(first, size), semaphore)
            copy.wait() if wait else copy.start()

        size *= 2


def rows_between(ref: Any, first: Any, low: Any, high: Any) -> Array:
    """The block of `ALIGN` rows of a [rows, columns] ref with 0 outside rows low .. high - 1."""
    first = pl.multiple_of(first, ALIGN)
    block = ref[pl.ds(first, ALIGN), :]
    row = first + lax.broadcasted_iota(jnp.int32, (ALIGN, 1), 0)
    # In float32: not every chip can select among packed values.
    kept = jnp.where((row >= low) & (row < high), block.astype(jnp.float32), 0.0)
    return kept.astype(block.dtype)


def compiler_params() -> pltpu.CompilerParams:
    """What the compiler is told of a kernel whose grid cores share.

    Copies lie within their arrays because windows do; to check each of them again would take as
    long as all other work of a window that is no matrix work.
    """
    return pltpu.CompilerParams(
        dimension_semantics=("parallel",),
        vmem_limit_bytes=tpu_chip().vmem_limit,
        disable_bounds_checks=True,
    )


def pad_rows(array: Array) -> Array:
    """The array with rows to the next multiple of `ALIGN`; itself where it has as many."""
    missing = -array.shape[0] % ALIGN
    return jnp.pad(array, ((0, missing), (0, 0))) if missing else array
