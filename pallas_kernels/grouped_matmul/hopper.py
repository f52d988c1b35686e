"""Grouped matmul for Hopper: Pallas, Mosaic GPU (sm_90a), bfloat16.

One persistent block per multiprocessor walks over output tiles. Its memory warpgroup fills a ring
of shared-memory stages through TMA, its two compute warpgroups multiply from them with wgmma, and
the ring runs on from one tile to the next, so loads never wait for a tile's end.

Row tiles start at their group's first row, whatever its alignment. TMA allows that for a plain
[rows, 64] window but not for one cut into the [8, 64] pieces that wgmma reads, so rows are loaded
and stored through a second, uncut view of the same memory: with 64 columns of two bytes the two
orders are the same bytes.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.groups import local_groups
from pallas_kernels.grouped_matmul.tiles import (
    HopperTile,
    hopper_tile,
    num_multiprocessors,
    weight_gradient_tile,
)
from pallas_kernels.grouped_matmul.weights import BlockScaledWeights

# Columns in one swizzled row of 128 bytes; also the contraction step of a stage.
LANE = 64
# mypy takes jax's transforms for abstract: one of their base's methods has an empty body.
ROWS = (plgpu.SwizzleTransform(128),)  # type: ignore[abstract]
PIECES = (plgpu.TilingTransform((8, LANE)), *ROWS)  # type: ignore[abstract]
COMPUTE_WARPGROUPS = 2
COMPILER_PARAMS = plgpu.CompilerParams(
    # Lane semantics keep the two views of one shared-memory buffer as they are written.
    lowering_semantics=plgpu.LoweringSemantics.Lane,
    # No thread reads what another wrote without the barriers below.
    unsafe_no_auto_barriers=True,
    approx_math=True,
)


def matmul(
    lhs_MK: Array,
    rhs_GKN: Array | BlockScaledWeights,
    group_sizes_G: Array,
    group_offset: Array,
    *,
    transpose_rhs: bool,
) -> Array:
    """Each row times its group's matrix."""
    (out_MN,) = _rows_kernel(
        (_checked("lhs_MK", lhs_MK),),
        (_checked("rhs_GKN", rhs_GKN),),
        group_sizes_G,
        group_offset,
        transpose_rhs=transpose_rhs,
    )
    return out_MN


def swiglu(
    lhs_MK: Array,
    gate_GKN: Array | BlockScaledWeights,
    up_GKN: Array | BlockScaledWeights,
    group_sizes_G: Array,
    group_offset: Array,
) -> Array:
    """Gate and up projections and their SwiGLU product in one kernel."""
    (hidden_MN,) = _rows_kernel(
        (_checked("lhs_MK", lhs_MK),),
        (_checked("gate_GKN", gate_GKN), _checked("up_GKN", up_GKN)),
        group_sizes_G,
        group_offset,
        activation=True,
    )
    return hidden_MN


def swiglu_products(
    lhs_MK: Array, gate_GKN: Array, up_GKN: Array, group_sizes_G: Array, group_offset: Array
) -> tuple[Array, Array, Array]:
    """As swiglu, and also the gate and up products, which the backward pass needs."""
    hidden_MN, gate_MN, up_MN = _rows_kernel(
        (_checked("lhs_MK", lhs_MK),),
        (_checked("gate_GKN", gate_GKN), _checked("up_GKN", up_GKN)),
        group_sizes_G,
        group_offset,
        activation=True,
        keep_products=True,
    )
    return hidden_MN, gate_MN, up_MN


def swiglu_rows_gradient(
    d_gate_MN: Array,
    d_up_MN: Array,
    gate_GKN: Array,
    up_GKN: Array,
    group_sizes_G: Array,
    group_offset: Array,
) -> Array:
    """d_gate gate^T + d_up up^T, as one product over twice the columns."""
    (d_lhs_MK,) = _rows_kernel(
        (d_gate_MN, d_up_MN), (gate_GKN, up_GKN), group_sizes_G, group_offset, transpose_rhs=True
    )
    return d_lhs_MK


def weight_gradient(
    lhs_MK: Array, d_out_MN: Array, group_sizes_G: Array, group_offset: Array, num_groups: int
) -> Array:
    """Sum over each group's rows of lhs^T d_out."""
    return _weights_kernel(
        _checked("lhs_MK", lhs_MK),
        _checked("d_out_MN", d_out_MN),
        group_sizes_G,
        group_offset,
        num_groups,
    )


def _checked(name: str, array: Array | BlockScaledWeights) -> Array:
    """The array, when it is one that the kernels take."""
    if isinstance(array, BlockScaledWeights) or array.dtype != jnp.bfloat16:
        raise ValueError(
            f"{name}: dtype {array.dtype} must be bfloat16 for implementation 'hopper'"
        )
    widths = array.shape[1:]
    if any(width % LANE for width in widths):
        raise ValueError(
            f"{name}: widths {widths} must be multiples of {LANE} for implementation 'hopper'"
        )
    return array


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


def _raster(local: Array, rows: Array | int, columns: int, band: int) -> tuple[Array, Array]:
    """Row and column of a tile: down the rows of a band, then over the columns, then the next band.

    Tiles that run at one time then share both their rows and their weights in L2.
    """
    index = lax.div(local, band * columns)
    local = lax.rem(local, band * columns)
    height = jnp.minimum(band, rows - index * band)
    return index * band + lax.rem(local, height), lax.div(local, height)


def _my_tiles(total: Array | int, num_ctas: int) -> Array:
    """Number of tiles of this block, which takes every num_ctas-th."""
    return lax.div(total - lax.axis_index("sm") + (num_ctas - 1), jnp.int32(num_ctas))


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


def _give_registers(count: int, action: Literal["increase", "decrease"], compute_wgs: int) -> None:
    """Move registers from the loading warpgroup to two compute warpgroups; one has enough."""
    if compute_wgs == 2:
        plgpu.set_max_registers(count, action=action)


def _rows_kernel(
    lhs: Sequence[Array],
    rhs: Sequence[Array],
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
        rhs: weights [G, K, N], or [G, N, K] when transpose_rhs; two for activation or a sum.
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
    if tile is None:
        tile = hopper_tile(num_rows, num_groups, num_n, activation)
    num_ctas = num_ctas or num_multiprocessors()
    block_m, block_n, stages = tile.block_m, tile.block_n, tile.stages
    num_products = 2 if activation else 1
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

    def body(start_ref, first_tile_ref, *refs):  # type: ignore[no-untyped-def]
        lhs_refs, refs = refs[: len(lhs)], refs[len(lhs) :]
        rhs_refs, refs = refs[: len(rhs)], refs[len(rhs) :]
        *out_refs, (lhs_pieces, lhs_plain), rhs_smem, (out_pieces, out_plain), loaded, free = refs
        wg = lax.axis_index("wg")
        my_tiles = _my_tiles(first_tile_ref[num_ranges] * columns, num_ctas)

        def locate(index):  # type: ignore[no-untyped-def]
            linear = lax.axis_index("sm") + index * num_ctas
            found = _find_range(first_tile_ref, linear, num_ranges, columns)
            first = first_tile_ref[found]
            m, n = _raster(
                linear - first * columns, first_tile_ref[found + 1] - first, columns, tile.band
            )
            row = start_ref[found] + m * block_m
            # The first and the last range hold rows that get zeros.
            has_group = (found > 0) & (found < num_ranges - 1)
            steps = jnp.where(has_group, k_steps * len(lhs), 0)
            return found - 1, row, start_ref[found + 1] - row, n, steps

        @pl.when(wg == compute_wgs)
        def _load() -> None:
            _give_registers(40, "decrease", compute_wgs)

            def load_step(k, step, group, row, n, pair):  # type: ignore[no-untyped-def]
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

            def load_tile(index, step):  # type: ignore[no-untyped-def]
                group, row, _, n, steps = locate(index)
                for pair in range(len(lhs)):
                    step = lax.fori_loop(
                        0,
                        lax.div(steps, len(lhs)),
                        lambda k, step, pair=pair: load_step(k, step, group, row, n, pair),
                        step,
                    )
                return step

            lax.fori_loop(0, my_tiles, load_tile, jnp.int32(0))

        @pl.when(wg < compute_wgs)
        def _compute() -> None:
            _give_registers(232, "increase", compute_wgs)
            wg_row, wg_column = (wg * wg_m, 0) if block_m >= 128 else (0, wg * wg_n)

            def multiply(step, steps, *accs):  # type: ignore[no-untyped-def]
                def k_step(k, step):  # type: ignore[no-untyped-def]
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(loaded.at[slot])
                    a = lhs_pieces.at[pl.ds(slot * block_m + wg_row, wg_m)]
                    for product, acc in enumerate(accs):
                        if transpose_rhs:
                            b = rhs_smem.at[product, slot, pl.ds(wg_column, wg_n)].transpose((1, 0))
                        else:
                            b = rhs_smem.at[product, slot, :, pl.ds(wg_column, wg_n)]
                        plgpu.wgmma(acc, a, b)
                    # The step before has been read; this one may still run.
                    plgpu.wgmma_wait(num_products)
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(step - 1, stages)]))
                    return step + 1

                step = lax.fori_loop(0, steps, k_step, step)
                plgpu.wgmma_wait(0)
                pl.when(steps > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(step - 1, stages)]))
                return tuple(acc[...] for acc in accs)

            def compute_tile(index, step):  # type: ignore[no-untyped-def]
                _, row, valid, n, steps = locate(index)
                values = pl.run_scoped(
                    lambda *accs: multiply(step, steps, *accs),
                    *[plgpu.ACC((wg_m, wg_n), jnp.float32)] * num_products,
                )
                if activation:
                    gate, up = values
                    hidden = gate * (1 / (1 + jnp.exp(-gate))) * up
                    values = (hidden, gate, up) if keep_products else (hidden,)
                blocks = [
                    (value.astype(jnp.bfloat16), out_ref, i, j)
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
                return step + steps

            lax.fori_loop(0, my_tiles, compute_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    dtype = jnp.bfloat16
    rhs_block = (block_n, LANE) if transpose_rhs else (LANE, block_n)
    kernel = plgpu.kernel(
        body,
        out_type=tuple(
            _like(lhs[0], (num_rows, num_n // LANE, LANE)) for _ in range(3 if keep_products else 1)
        ),
        grid=(num_ctas,),
        grid_names=("sm",),
        num_threads=compute_wgs + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.RefUnion(
                plgpu.SMEM((lhs_rows, LANE), dtype, transforms=PIECES),
                plgpu.SMEM((lhs_rows, LANE), dtype, transforms=ROWS),
            ),
            plgpu.SMEM((num_products, stages, *rhs_block), dtype, transforms=PIECES),
            plgpu.RefUnion(
                plgpu.SMEM((compute_wgs, 2, 64, LANE), dtype, transforms=PIECES),
                plgpu.SMEM((compute_wgs, 2, 64, LANE), dtype, transforms=ROWS),
            ),
            plgpu.Barrier(num_arrivals=1 + num_products, num_barriers=stages),
            plgpu.Barrier(num_arrivals=compute_wgs, num_barriers=stages),
        ],
        compiler_params=COMPILER_PARAMS,
    )
    views = [array.reshape(num_rows, k_steps, LANE) for array in lhs]
    outs = kernel(start_R, first_tile_R, *views, *rhs)
    return tuple(out.reshape(num_rows, num_n) for out in outs)


def _like(array: Array, shape: tuple[int, ...]) -> jax.ShapeDtypeStruct:
    """An output that varies over the same mesh axes as an input."""
    return jax.ShapeDtypeStruct(
        shape, jnp.bfloat16, manual_axis_type=jax.typeof(array).manual_axis_type
    )


def _largest_first(sizes_G: Array) -> Array:
    """Groups by size, largest first: with tiles dealt out in turn the small ones level the ends.

    By comparison, not by sort: two small kernels in XLA.
    """
    index_G = jnp.arange(sizes_G.shape[0], dtype=jnp.int32)
    larger_GG = sizes_G > sizes_G[:, None]
    earlier_GG = (sizes_G == sizes_G[:, None]) & (index_G < index_G[:, None])
    rank_G = jnp.sum(larger_GG | earlier_GG, axis=1)
    return jnp.sum(jnp.where(rank_G == index_G[:, None], index_G, 0), axis=1).astype(jnp.int32)


def _zero_rows(ref: Any, first: Array, end: Array) -> None:
    """Zero the rows outside [first, end) of a block of LANE rows."""
    for column in range(0, ref.shape[1], LANE):
        block = ref.at[:, pl.ds(column, LANE)]
        row = plgpu.broadcasted_iota(jnp.int32, (LANE, LANE), 0, layout=plgpu.Layout.WGMMA)
        block[...] = jnp.where((row >= first) & (row < end), block[...], jnp.bfloat16(0))


def _weights_kernel(
    lhs_MK: Array,
    d_out_MN: Array,
    group_sizes_G: Array,
    group_offset: Array,
    num_groups: int,
    *,
    tile: HopperTile | None = None,
    num_ctas: int | None = None,
) -> Array:
    """Sum over each group's rows of lhs^T d_out, [G, K, N]; a group's rows are the contraction.

    Blocks of 64 rows start at multiples of 8. Only a group's first and last block can hold rows of
    others; there both sides are zeroed in shared memory, since such rows may hold anything.
    """
    if pad := -lhs_MK.shape[0] % 8:
        lhs_MK, d_out_MN = (jnp.pad(array, ((0, pad), (0, 0))) for array in (lhs_MK, d_out_MN))
    num_k, num_n = lhs_MK.shape[1], d_out_MN.shape[1]
    tile = tile or weight_gradient_tile(num_k, num_n)
    num_ctas = num_ctas or num_multiprocessors()
    block_m, block_n, stages = tile.block_m, tile.block_n, tile.stages
    wg_m = block_m // COMPUTE_WARPGROUPS
    rows, columns = pl.cdiv(num_k, block_m), pl.cdiv(num_n, block_n)
    start_G, size_G = local_groups(group_sizes_G, group_offset, num_groups)
    order_G = _largest_first(size_G)

    def body(start_ref, size_ref, order_ref, lhs_ref, d_out_ref, out_ref, *scratch):  # type: ignore[no-untyped-def]
        lhs_smem, d_out_smem, out_smem, loaded, free, zeroed = scratch
        wg = lax.axis_index("wg")
        my_tiles = _my_tiles(num_groups * rows * columns, num_ctas)

        def locate(index):  # type: ignore[no-untyped-def]
            linear = lax.axis_index("sm") + index * num_ctas
            group = order_ref[lax.div(linear, rows * columns)]
            m, n = _raster(lax.rem(linear, rows * columns), rows, columns, tile.band)
            start, size = start_ref[group], size_ref[group]
            base = lax.div(start, 8) * 8
            steps = jnp.where(size > 0, lax.div(start - base + size + LANE - 1, LANE), 0)
            return group, m, n, base, start - base, start - base + size, steps

        @pl.when(wg == COMPUTE_WARPGROUPS)
        def _load() -> None:
            plgpu.set_max_registers(40, action="decrease")

            def load_tile(index, step):  # type: ignore[no-untyped-def]
                _, m, n, base, _, _, steps = locate(index)

                def load_step(k, step):  # type: ignore[no-untyped-def]
                    slot = lax.rem(step, stages)
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    row = pl.ds(pl.multiple_of(base + k * LANE, 8), LANE)
                    for ref, smem, column in (
                        (lhs_ref, lhs_smem, pl.ds(m * block_m, block_m)),
                        (d_out_ref, d_out_smem, pl.ds(n * block_n, block_n)),
                    ):
                        plgpu.copy_gmem_to_smem(ref.at[row, column], smem.at[slot], loaded.at[slot])
                    return step + 1

                return lax.fori_loop(0, steps, load_step, step)

            lax.fori_loop(0, my_tiles, load_tile, jnp.int32(0))

        @pl.when(wg < COMPUTE_WARPGROUPS)
        def _compute() -> None:
            plgpu.set_max_registers(232, action="increase")

            def multiply(step, steps, first, end, acc):  # type: ignore[no-untyped-def]
                def k_step(k, step, may_be_shared):  # type: ignore[no-untyped-def]
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(loaded.at[slot])
                    a = lhs_smem.at[slot, :, pl.ds(wg * wg_m, wg_m)]
                    b = d_out_smem.at[slot]
                    if may_be_shared:
                        low, high = first - k * LANE, end - k * LANE

                        @pl.when((low > 0) | (high < LANE))
                        def _() -> None:
                            plgpu.wgmma_wait(0)
                            # Each warpgroup has its own rows of lhs^T and half the columns.
                            half = block_n // COMPUTE_WARPGROUPS
                            _zero_rows(a, low, high)
                            _zero_rows(b.at[:, pl.ds(wg * half, half)], low, high)
                            plgpu.commit_smem()
                            plgpu.barrier_arrive(zeroed)
                            plgpu.barrier_wait(zeroed)

                    plgpu.wgmma(acc, a.transpose((1, 0)), b)
                    plgpu.wgmma_wait(1)
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(step - 1, stages)]))
                    return step + 1

                last = jnp.maximum(steps - 1, 1)
                edges = ((0, jnp.minimum(steps, 1), True), (1, last, False), (last, steps, True))
                for low, high, shared in edges:
                    step = lax.fori_loop(
                        low, high, lambda k, step, shared=shared: k_step(k, step, shared), step
                    )
                plgpu.wgmma_wait(0)
                pl.when(steps > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(step - 1, stages)]))
                return acc[...]

            def compute_tile(index, step):  # type: ignore[no-untyped-def]
                group, m, n, _, first, end, steps = locate(index)
                value = pl.run_scoped(
                    lambda acc: multiply(step, steps, first, end, acc),
                    plgpu.ACC((wg_m, block_n), jnp.float32),
                ).astype(jnp.bfloat16)
                blocks = [(i, j) for i in range(wg_m // 64) for j in range(block_n // LANE)]
                for count, (i, j) in enumerate(blocks):
                    slot = count % 2
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    block = value[i * 64 : (i + 1) * 64, j * LANE : (j + 1) * LANE]
                    out_smem[wg, slot] = block
                    plgpu.commit_smem()
                    row = m * block_m + wg * wg_m + i * 64
                    column = n * block_n + j * LANE
                    window = (group, pl.ds(row, 64), pl.ds(column, LANE))
                    store = functools.partial(
                        plgpu.copy_smem_to_gmem,
                        out_smem.at[wg, slot],
                        out_ref.at[window],
                        commit_group=False,
                    )
                    pl.when((row < num_k) & (column < num_n))(store)
                    plgpu.commit_smem_to_gmem_group()
                return step + steps

            lax.fori_loop(0, my_tiles, compute_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    dtype = jnp.bfloat16
    kernel = plgpu.kernel(
        body,
        out_type=_like(lhs_MK, (num_groups, num_k, num_n)),
        grid=(num_ctas,),
        grid_names=("sm",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=[
            plgpu.SMEM((stages, LANE, block_m), dtype, transforms=PIECES),
            plgpu.SMEM((stages, LANE, block_n), dtype, transforms=PIECES),
            plgpu.SMEM((COMPUTE_WARPGROUPS, 2, 64, LANE), dtype, transforms=PIECES),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
        ],
        compiler_params=COMPILER_PARAMS,
    )
    return kernel(start_G, size_G, order_G, lhs_MK, d_out_MN)
