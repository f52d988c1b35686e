"""Gradient of the groups' weights on TPUs: each group's rows^T times the gradient of its outputs.

Windows of rows begin where their group does, as in `tpu_rows`. A tile of one group's gradient is
accumulated in float32 in VMEM over the group's windows. The last of them writes it in its final
type, to be stored while the next group is computed; an empty group stores zeros. Rows of a window
that are not its group's are zeroed where they lie: at most 15 before, and those after up to the
depth that is multiplied. So the matrix work itself masks nothing and never meets NaN.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import TPU_LANES
from pallas_kernels.grouped_matmul.groups import local_groups
from pallas_kernels.grouped_matmul.tiles import TpuWeightGradientTile, tpu_weight_gradient_tile
from pallas_kernels.grouped_matmul.tpu_windows import (
    ALIGN,
    FIRST,
    LAST,
    compiler_params,
    copy_rows,
    fetched,
    make_windows,
    pad_rows,
    rows_between,
)
from pallas_kernels.manual_axes import output_like
from pallas_kernels.tpu_parts import dot

BUFFERS = 2


def weight_gradient(
    lhs_MK: Array,
    d_out_MN: Array,
    group_sizes_G: Array,
    group_offset: Array,
    num_groups: int,
    *,
    tile: TpuWeightGradientTile | None = None,
    interpret: Any = False,
) -> Array:
    """Sums lhs^T d_out over the rows of each held group.

    The arguments are those of `reference.weight_gradient`; `tile` None takes the table's sizes.
    """
    lhs_MK, d_out_MN = pad_rows(lhs_MK), pad_rows(d_out_MN)
    (num_rows, K), N = lhs_MK.shape, d_out_MN.shape[1]
    dtype = lhs_MK.dtype
    tile = tile or tpu_weight_gradient_tile(
        num_rows, group_sizes_G.shape[0], (K, N), dtype.itemsize
    )
    starts_G, sizes_G = local_groups(group_sizes_G, group_offset, num_groups)
    start_R = jnp.concatenate([starts_G, starts_G[-1:] + sizes_G[-1:]])
    windows = make_windows(start_R, tile.rows, num_rows, empty_ranges=True)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    itemsize = dtype.itemsize
    return pl.pallas_call(
        functools.partial(_kernel, tile=tile),
        out_shape=output_like(lhs_MK, (num_groups, K, N), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=6,
            grid=(K // tile.height * (N // tile.width),),
            in_specs=[anywhere, anywhere],
            out_specs=anywhere,
            scratch_shapes=[
                pltpu.VMEM((BUFFERS, tile.rows, tile.height), dtype),
                pltpu.VMEM((BUFFERS, tile.rows, tile.width), dtype),
                pltpu.VMEM((tile.height, tile.width), jnp.float32),
                pltpu.VMEM((tile.height, tile.width), dtype),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SemaphoreType.DMA(()),
            ],
        ),
        compiler_params=compiler_params(),
        cost_estimate=pl.CostEstimate(
            flops=2 * num_rows * K * N,
            bytes_accessed=itemsize * (num_rows * (K + N) + num_groups * K * N),
            transcendentals=0,
        ),
        interpret=interpret,
        name="grouped_weight_gradient",
    )(*windows.scalars, lhs_MK, d_out_MN)


def _kernel(
    count_ref: Any,
    group_ref: Any,
    base_ref: Any,
    low_ref: Any,
    high_ref: Any,
    bits_ref: Any,
    lhs_hbm: Any,
    d_out_hbm: Any,
    out_hbm: Any,
    lhs_ref: Any,
    d_out_ref: Any,
    sum_ref: Any,
    staged_ref: Any,
    semaphores: Any,
    out_semaphore: Any,
    *,
    tile: TpuWeightGradientTile,
) -> None:
    across = out_hbm.shape[2] // tile.width
    tile_id = pl.program_id(0)
    first_row = pl.multiple_of(jax.lax.div(tile_id, across) * tile.height, TPU_LANES)
    first_column = pl.multiple_of(jax.lax.rem(tile_id, across) * tile.width, TPU_LANES)
    num_windows = count_ref[0]

    def copy_in(index: Any, *, wait: bool) -> None:
        slot, base = index & 1, pl.multiple_of(base_ref[index], ALIGN)
        num_rows = jnp.where(high_ref[index] > low_ref[index], fetched(high_ref[index]), 0)
        for hbm, ref, first, width in (
            (lhs_hbm, lhs_ref, first_row, tile.height),
            (d_out_hbm, d_out_ref, first_column, tile.width),
        ):
            copy_rows(
                lambda row, size, hbm=hbm, first=first, width=width: hbm.at[  # type: ignore[misc]
                    pl.ds(base + row, size), pl.ds(first, width)
                ],
                lambda row, size, ref=ref: ref.at[slot, pl.ds(row, size)],  # type: ignore[misc]
                semaphores.at[slot],
                num_rows,
                min(tile.rows, hbm.shape[0]),
                wait=wait,
            )

    def copy_out(group: Any) -> Any:
        part = out_hbm.at[group, pl.ds(first_row, tile.height), pl.ds(first_column, tile.width)]
        return pltpu.make_async_copy(staged_ref, part, out_semaphore)

    def zero_others(low: Any, high: Any, slot: Any) -> None:
        """Zeroes the rows of others, up to the depth that is multiplied."""
        depth = (high + (tile.depths[0] - 1)) // tile.depths[0] * tile.depths[0]
        for ref in (lhs_ref.at[slot], d_out_ref.at[slot]):

            def mask(first: Any, ref: Any = ref) -> None:
                here = pl.ds(pl.multiple_of(first, ALIGN), ALIGN)
                ref[here] = rows_between(ref, first, low, high)

            pl.when(low > 0)(functools.partial(mask, 0))
            edge = high & -ALIGN
            pl.when(edge < high)(functools.partial(mask, edge))

            @pl.loop(fetched(high) // ALIGN, depth // ALIGN)
            def _zero(block: Any, ref: Any = ref) -> None:
                here = pl.ds(pl.multiple_of(block * ALIGN, ALIGN), ALIGN)
                ref[here] = jnp.zeros((ALIGN, ref.shape[1]), ref.dtype)

    def multiply(index: Any, depth: int, *, last: bool) -> None:
        slot, first = index & 1, (bits_ref[index] & FIRST) != 0

        @pl.loop(0, tile.height // tile.body_height)
        def _rows(n: Any) -> None:
            here = pl.ds(pl.multiple_of(n * tile.body_height, TPU_LANES), tile.body_height)
            product_KN = dot(lhs_ref[slot, :depth, here].T, d_out_ref[slot, :depth])
            total_KN = jnp.where(first, 0.0, sum_ref[here]) + product_KN
            if last:
                staged_ref[here] = total_KN.astype(staged_ref.dtype)
            else:
                sum_ref[here] = total_KN

    copy_in(0, wait=False)

    @pl.loop(0, num_windows)
    def _window(index: Any) -> None:
        group, low, high = group_ref[index], low_ref[index], high_ref[index]
        last = (bits_ref[index] & LAST) != 0

        @pl.when(index + 1 < num_windows)
        def _next() -> None:
            copy_in(index + 1, wait=False)

        # All groups have a window, so one group's store is awaited before the next is written.
        @pl.when(last & (group > 0))
        def _await() -> None:
            copy_out(group - 1).wait()

        copy_in(index, wait=True)
        pl.when(high > low)(functools.partial(zero_others, low, high, index & 1))
        pl.when(~last)(functools.partial(multiply, index, tile.rows, last=False))
        below = 0
        for depth in tile.depths:
            fits = last & (high > low) & (high > below) & (high <= depth)
            pl.when(fits)(functools.partial(multiply, index, depth, last=True))
            below = depth

        @pl.when(high <= low)
        def _empty() -> None:
            @pl.loop(0, tile.height // ALIGN)
            def _zero(block: Any) -> None:
                here = pl.ds(pl.multiple_of(block * ALIGN, ALIGN), ALIGN)
                staged_ref[here] = jnp.zeros((ALIGN, tile.width), staged_ref.dtype)

        pl.when(last)(lambda: copy_out(group).start())

    copy_out(out_hbm.shape[0] - 1).wait()
