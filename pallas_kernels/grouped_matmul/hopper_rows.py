"""Rows times their group's weights on Hopper: products, SwiGLU, and the rows' gradients."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.hopper_blocks import (
    BYTE_PIECES,
    COMPILER_PARAMS,
    LANE,
    PIECES,
    ROWS,
    give_registers,
    raster,
    vary_like,
)
from pallas_kernels.grouped_matmul.hopper_schedule import Tickets, Turns, for_tiles
from pallas_kernels.grouped_matmul.tiles import HopperTile, hopper_tile, num_multiprocessors
from pallas_kernels.grouped_matmul.weights import SCALE_BLOCK, BlockScaledWeights


def _row_ranges(
    group_sizes_G: Array, group_offset: Array, num_groups: int, num_rows: int, block_m: int
) -> tuple[Array, Array]:
    """Ranges of rows to write: the rows before the held groups, each group, the rows after them.

    Sums over a comparison matrix, not cumsum: XLA makes each a single small kernel.

    Returns:
        int32 first row and first row tile of each range, with their ends last, [num_groups + 3].
    """
    range_R = jnp.arange(num_groups + 3)
    before_RG = jnp.arange(group_sizes_G.shape[0]) < range_R[:, None] + (group_offset - 1)
    start_R = jnp.sum(jnp.where(before_RG, group_sizes_G, 0), axis=1)
    start_R = jnp.where(range_R == num_groups + 2, num_rows, start_R)
    start_R = jnp.where(range_R == 0, 0, start_R).astype(jnp.int32)
    tiles_R = (start_R[1:] - start_R[:-1] + block_m - 1) // block_m
    before_RR = range_R[:-1] < range_R[:, None]
    first_tile_R = jnp.sum(jnp.where(before_RR, tiles_R, 0), axis=1).astype(jnp.int32)
    return start_R, first_tile_R


def _find_range(first_tile_ref: Any, tile: Array, num_ranges: int, columns: int) -> Array:
    """Last range whose first tile, times the number of column tiles, is at most `tile`."""
    found = jnp.int32(0)
    for bit in reversed(range(math.ceil(math.log2(num_ranges)))):
        candidate = found + (1 << bit)
        first = first_tile_ref[jnp.minimum(candidate, num_ranges)]
        found = jnp.where((candidate < num_ranges) & (first * columns <= tile), candidate, found)
    return found


def _store_rows(pieces: Any, rows: Any, out_ref: Any, row: Array, valid: Array, full: int) -> None:
    """Copy the first `valid` rows of a block out of shared memory; all `full` of them in one copy.

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


def rows_kernel(
    lhs: Sequence[Array],
    rhs: Sequence[Array | BlockScaledWeights],
    group_sizes_G: Array,
    group_offset: Array,
    *,
    transpose_rhs: bool = False,
    activation: bool = False,
    keep_products: bool = False,
    tile: HopperTile | None = None,
    num_ctas: int | None = None,
) -> tuple[Array, ...]:
    """Rows times weights: one product, two with SwiGLU after them, or the sum of two.

    Args:
        lhs: rows [M, K]; two of them for the sum of two products.
        rhs: weights [G, K, N], or [G, N, K] when transpose_rhs; two for activation or a sum. The
            quantised are widened to bfloat16 in shared memory, stage by stage.
        group_sizes_G: int32 rows of every group.
        group_offset: int32 first group held.
        transpose_rhs: multiply by the transposes.
        activation: silu(lhs rhs[0]) * (lhs rhs[1]).
        keep_products: with activation, also return both products.
        tile: sizes; None takes the measured ones.
        num_ctas: blocks to launch; None takes one per multiprocessor.

    Returns:
        One array [M, N], or three with keep_products.
    """
    num_rows, num_k = lhs[0].shape
    num_groups = rhs[0].shape[0]
    num_n = rhs[0].shape[1 if transpose_rhs else 2]
    scales = [array.scales for array in rhs if isinstance(array, BlockScaledWeights)]
    values = [array.values if isinstance(array, BlockScaledWeights) else array for array in rhs]
    if tile is None:
        tile = hopper_tile(num_rows, num_groups, num_n, activation, bool(scales))
    num_ctas = num_ctas or num_multiprocessors()
    block_m, block_n, stages = tile.block_m, tile.block_n, tile.stages
    num_products = 2 if activation else 1
    num_outs = 3 if keep_products else 1
    num_ranges = num_groups + 2
    k_steps, columns = num_k // LANE, pl.cdiv(num_n, block_n)
    start_R, first_tile_R = _row_ranges(group_sizes_G, group_offset, num_groups, num_rows, block_m)
    # Two warpgroups share the rows of a tile; of a low one (wgmma takes 64 rows) the columns; a
    # low tile of 64 columns has one warpgroup.
    if block_m >= 128:
        compute_wgs, wg_m, wg_n = 2, block_m // 2, block_n
    else:
        compute_wgs = 2 if block_n >= 2 * LANE else 1
        wg_m, wg_n = 64, block_n // compute_wgs
    # A tile of fewer than 64 rows is multiplied with what follows it in memory, and not stored.
    lhs_rows = stages * block_m + max(0, wg_m - block_m)
    full = min(block_m, 64)
    dtype = jnp.bfloat16
    # Three results held back and two accumulators are more than the registers.
    deferred = not keep_products

    def body(start_ref, first_tile_ref, *refs):
        lhs_refs, refs = refs[: len(lhs)], refs[len(lhs) :]
        rhs_refs, refs = refs[: len(rhs)], refs[len(rhs) :]
        scale_refs, refs = refs[: len(scales)], refs[len(scales) :]
        out_refs, refs = refs[:num_outs], refs[num_outs:]
        (lhs_pieces, lhs_plain), rhs_smem, (out_pieces, out_plain), loaded, free, *rest = refs
        wide, of_tickets = rest[: bool(scales)], rest[bool(scales) :]
        wg = lax.axis_index("wg")
        total = first_tile_ref[num_ranges] * columns
        numbers = Tickets(*of_tickets) if tile.tickets else Turns(num_ctas)

        def locate(number):
            """Where a tile lies; a number beyond the last gets the last one's place."""
            linear = jnp.minimum(number, total - 1)
            found = _find_range(first_tile_ref, linear, num_ranges, columns)
            first = first_tile_ref[found]
            m, n = raster(
                linear - first * columns, first_tile_ref[found + 1] - first, columns, tile.band
            )
            row = start_ref[found] + m * block_m
            # The first and the last range hold rows that get zeros.
            has_group = (found > 0) & (found < num_ranges - 1)
            steps = jnp.where(has_group, k_steps * len(lhs), 0)
            return number, found - 1, row, start_ref[found + 1] - row, n, steps

        @pl.when(wg == compute_wgs)
        def _load() -> None:
            give_registers(40, "decrease", compute_wgs)

            def load_step(k, step, place, pair):
                _, group, row, _, n, _ = place
                slot = lax.rem(step, stages)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(
                    lhs_refs[pair].at[pl.ds(row, block_m), k],
                    lhs_plain.at[pl.ds(slot * block_m, block_m)],
                    loaded.at[slot],
                )
                k_slice, n_slice = pl.ds(k * LANE, LANE), pl.ds(n * block_n, block_n)
                window = (n_slice, k_slice) if transpose_rhs else (k_slice, n_slice)
                for product in range(num_products):
                    plgpu.copy_gmem_to_smem(
                        rhs_refs[pair + product].at[group, *window],
                        rhs_smem.at[product, slot],
                        loaded.at[slot],
                    )
                return step + 1

            def load_tile(index, place, step, number):
                # Two tiles ahead, so that no load waits for a number.
                numbers.hand_out(index + 1, number)
                number = numbers.draw()
                for pair in range(len(lhs)):
                    step = lax.fori_loop(
                        0,
                        lax.div(place[-1], len(lhs)),
                        lambda k, step, pair=pair: load_step(k, step, place, pair),
                        step,
                    )
                return locate(numbers.read(index + 1)), step, number

            numbers.hand_out(jnp.int32(0), numbers.draw())
            for_tiles(numbers, total, locate, load_tile, jnp.int32(0), numbers.draw())

        @pl.when(wg < compute_wgs)
        def _compute() -> None:
            give_registers(232, "increase", compute_wgs)
            wg_row, wg_column = (wg * wg_m, 0) if block_m >= 128 else (0, wg * wg_n)

            def skip_step(_, step):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                return step + 1

            def dequantise(k, step, group, n):
                """Widen this warpgroup's columns of a stage.

                Into one of three buffers: a warp may still multiply from the step before, and one
                that has not passed this step's barrier from the step before that.
                """
                columns = pl.ds(wg_column, wg_n)
                block_n_index = lax.div(n * block_n + wg_column, SCALE_BLOCK)
                for product, scale_ref in enumerate(scale_refs):
                    narrow = rhs_smem.at[product, lax.rem(step, stages), :, columns]
                    widened = wide[0].at[product, lax.rem(step, 3), :, columns]
                    last = scale_ref.shape[2] - 1
                    scale = scale_ref[
                        group, lax.div(k, SCALE_BLOCK // LANE), jnp.minimum(block_n_index, last)
                    ]
                    weights = plgpu.load(narrow, layout=plgpu.Layout.WGMMA_UPCAST_2X)
                    # float8 widens to float16 in one instruction, int8 to bfloat16; both exactly.
                    exact = jnp.bfloat16 if weights.dtype == jnp.int8 else jnp.float16
                    weights = weights.astype(exact).astype(jnp.float32) * scale
                    widened[...] = weights.astype(jnp.bfloat16)
                plgpu.commit_smem()

            def store(values, row, valid, n):
                """A tile's results from registers to memory."""
                blocks = [
                    (value, out_ref, i, j)
                    for value, out_ref in zip(values, out_refs, strict=True)
                    for i in range(wg_m // 64)
                    for j in range(wg_n // LANE)
                ]
                for count, (value, out_ref, i, j) in enumerate(blocks):
                    slot = count % 2
                    # The copy before the last has left this slot.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    block = value[i * 64 : (i + 1) * 64, j * LANE : (j + 1) * LANE]
                    out_pieces[wg, slot] = block
                    first = wg_row + i * 64
                    column = lax.div(n * block_n + wg_column, LANE) + j
                    _store_rows(
                        out_pieces.at[wg, slot],
                        out_plain.at[wg, slot],
                        out_ref.at[:, column],
                        row + first,
                        jnp.where(column < num_n // LANE, valid - first, 0),
                        full,
                    )

            def multiply(index, place, step, steps, pending, *accs):
                _, group, _, _, n, _ = place

                def issue(k, step):
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(loaded.at[slot])
                    if scales:
                        dequantise(k, step, group, n)
                    a = lhs_pieces.at[pl.ds(slot * block_m + wg_row, wg_m)]
                    for product, acc in enumerate(accs):
                        if scales:
                            b = wide[0].at[product, lax.rem(step, 3), :, pl.ds(wg_column, wg_n)]
                        elif transpose_rhs:
                            b = rhs_smem.at[product, slot, pl.ds(wg_column, wg_n)].transpose((1, 0))
                        else:
                            b = rhs_smem.at[product, slot, :, pl.ds(wg_column, wg_n)]
                        plgpu.wgmma(acc, a, b)
                    return step + 1

                def release(step):
                    """Give back a step's stage, when there is such a step."""
                    pl.when(step >= first_step)(
                        lambda: plgpu.barrier_arrive(free.at[lax.rem(step, stages)])
                    )

                def k_step(k, step):
                    issue(k, step)
                    # The step before has been read; this one may still run.
                    plgpu.wgmma_wait(num_products)
                    plgpu.barrier_arrive(free.at[lax.rem(step - 1, stages)])
                    return step + 1

                first_step = step
                ahead = jnp.minimum(steps, 2)
                # While the first steps multiply, the tile before leaves the registers.
                step = lax.fori_loop(0, ahead, issue, step)
                next_place = locate(numbers.read(index + 1))
                if deferred:
                    store(*pending)
                plgpu.wgmma_wait(num_products)
                release(step - 2)
                step = lax.fori_loop(ahead, steps, k_step, step)
                plgpu.wgmma_wait(0)
                release(step - 1)
                return next_place, step, tuple(acc[...] for acc in accs)

            def compute_tile(index, place, step, pending):
                _, _, row, valid, n, steps = place
                # Past its group's last row a warpgroup leaves the tensor cores to the other.
                skipped = jnp.where(valid > wg_row, 0, steps)
                step = lax.fori_loop(0, skipped, skip_step, step)
                next_place, step, values = pl.run_scoped(
                    lambda *accs: multiply(index, place, step, steps - skipped, pending, *accs),
                    *[plgpu.ACC((wg_m, wg_n), jnp.float32)] * num_products,
                )
                if activation:
                    gate, up = values
                    hidden = gate * (1 / (1 + jnp.exp(-gate))) * up
                    values = (hidden, gate, up) if keep_products else (hidden,)
                pending = (tuple(value.astype(dtype) for value in values), row, valid, n)
                if not deferred:
                    store(*pending)
                    pending = ()
                return next_place, step, pending

            pending: Any = ()
            if deferred:
                nothing = plgpu.layout_cast(jnp.zeros((wg_m, wg_n), dtype), plgpu.Layout.WGMMA)
                pending = ((nothing,) * num_outs, *[jnp.int32(0)] * 3)
            _, pending = for_tiles(numbers, total, locate, compute_tile, jnp.int32(0), pending)
            if deferred:
                store(*pending)
            plgpu.wait_smem_to_gmem(0)

    rhs_block = (block_n, LANE) if transpose_rhs else (LANE, block_n)
    kernel = plgpu.kernel(
        body,
        out_type=(jax.ShapeDtypeStruct((num_rows, num_n // LANE, LANE), dtype),) * num_outs,
        grid=(num_ctas,),
        grid_names=("sm",),
        num_threads=compute_wgs + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.RefUnion(
                plgpu.SMEM((lhs_rows, LANE), dtype, transforms=PIECES),
                plgpu.SMEM((lhs_rows, LANE), dtype, transforms=ROWS),
            ),
            plgpu.SMEM(
                (num_products, stages, *rhs_block),
                values[0].dtype,
                transforms=BYTE_PIECES if scales else PIECES,
            ),
            plgpu.RefUnion(
                plgpu.SMEM((compute_wgs, 2, 64, LANE), dtype, transforms=PIECES),
                plgpu.SMEM((compute_wgs, 2, 64, LANE), dtype, transforms=ROWS),
            ),
            plgpu.Barrier(num_arrivals=1 + num_products, num_barriers=stages),
            plgpu.Barrier(num_arrivals=compute_wgs, num_barriers=stages),
            *[plgpu.SMEM((num_products, 3, *rhs_block), dtype, transforms=PIECES)] * bool(scales),
            *(Tickets if tile.tickets else Turns).scratch(compute_wgs + 1),
        ],
        compiler_params=COMPILER_PARAMS,
    )
    views = [array.reshape(num_rows, k_steps, LANE) for array in lhs]
    outs = kernel(start_R, first_tile_R, *views, *values, *scales)
    return tuple(vary_like(out.reshape(num_rows, num_n), lhs[0]) for out in outs)
