"""Few rows times quantised matrices of their groups on Hopper, the numbers read where they lie.

A tile is 64 columns of a group's result and up to some tens of its rows, over the whole
contraction. The product is taken turned: the stored numbers [columns, K] come through TMA into
shared memory, and as bfloat16 in registers are wgmma's first operand; the rows are its second.
Compute warpgroups take a tile's steps in turn, gate and up alternating, and the first adds up what
all have. Scales multiply float32 sums, of a block of K or at the end, so that nothing is rounded
before it is added. All layers' matrices may lie in one array: a tile's matrix is found in the
kernel, and nothing is copied.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.chips import num_sms
from pallas_kernels.hopper_parts import (
    LANE_COMPILER_PARAMS,
    MATRIX,
    PER_ROW,
    row_views_smem,
    swizzled,
)
from pallas_kernels.hopper_row_ranges import RowRanges, running_sums, store_rows
from pallas_kernels.hopper_schedule import Turns, for_tiles
from pallas_kernels.manual_axes import vary_like
from pallas_kernels.quantised import HOPPER_STEP as LANE
from pallas_kernels.quantised import Format, QuantisedWeights

COLUMNS = 64  # of a tile: the rows of wgmma's first operand


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of the kernel.

    Attributes:
        block_m: rows of a tile.
        warpgroups: that multiply, an even number.
        stages: steps of the contraction held in shared memory, a multiple of `warpgroups`.
        blocks: thread blocks on a multiprocessor.
    """

    block_m: int
    warpgroups: int
    stages: int
    blocks: int = 1


def choose_tile(num_rows: int, num_groups: int) -> Tile:
    """Sizes by the mean number of rows of a group."""
    mean = num_rows / num_groups
    for block_m, warpgroups, stages in ((8, 4, 12), (16, 4, 12), (32, 4, 8)):
        if mean <= block_m or block_m == 32:
            return Tile(block_m, warpgroups, stages)
    raise AssertionError


class _Scales:
    """When a tile's sums are multiplied by which scales."""

    def __init__(self, form: Format, ref: Any, step: int):
        self.ref, self.form = ref, form
        self.at_end = form.per_column
        self.block = form.block_in or step
        # Sums that are scaled together, within a step of the contraction.
        self.unit = step if self.at_end else min(self.block, step)
        self.units = step // self.unit
        self.step = step

    def of_columns(self, matrix: Array, n: Array, block: Array | int) -> Array:
        """Scales of a tile's columns, or the one of all of them."""
        if self.form.block_out > 1:
            one: Array = self.ref[matrix, lax.div(n * COLUMNS, self.form.block_out), block]
            return one
        column = self.ref.at[matrix, pl.ds(n * COLUMNS, COLUMNS), block]
        scales: Array = plgpu.load(column, layout=PER_ROW, optimized=False)
        return scales

    def of_step(self, matrix: Array, n: Array, k: Array) -> tuple[Array, ...]:
        """Scales of a step's units; past the last step, those of the last."""
        if self.at_end:
            return ()
        last = self.ref.shape[-1] - 1
        blocks = (
            lax.div(k * self.step + unit * self.unit, self.block) for unit in range(self.units)
        )
        return tuple(self.of_columns(matrix, n, jnp.minimum(block, last)) for block in blocks)


def _times(sums: Array, scale: Array) -> Array:
    """Multiplies sums [columns, rows] by one scale, or one a column."""
    scale = scale.astype(jnp.float32)
    if scale.ndim:
        scale = lax.broadcast_in_dim(scale, sums.shape, (0,))
    return sums * scale


def row_products(
    lhs_MK: Array,
    rhs: Sequence[QuantisedWeights],
    layer: Array | int,
    group_sizes_G: Array,
    group_offset: Array,
    *,
    activation: bool = False,
    out_dtype: DTypeLike = jnp.bfloat16,
    tile: Tile | None = None,
    num_ctas: int | None = None,
) -> Array:
    """Rows times their group's matrices: one product, or two with SwiGLU after them.

    Args:
        lhs_MK: bfloat16.
        rhs: one matrix of each group, or a gate and an up matrix, [..., G, K, N]: with a dim before
            G, of all layers.
        layer: int32, the layer among those.
        group_sizes_G: int32 rows of every group.
        group_offset: int32, the first group held.
        activation: give silu(gate) * up of the two products.
        out_dtype: bfloat16 or float32.
        tile: sizes; None for the table's.
        num_ctas: thread blocks; None for as many as fit.

    Returns:
        Rows [M, N] of `out_dtype`.
    """
    num_rows, num_k = lhs_MK.shape
    *_, num_groups, num_n, _ = rhs[0].values.shape
    form = rhs[0].format
    tile = tile or choose_tile(num_rows, num_groups)
    num_ctas = num_ctas or num_sms() * tile.blocks
    block_m, workers, stages = tile.block_m, tile.warpgroups, tile.stages
    num_products = len(rhs)
    step_k = 2 * LANE if num_k % (2 * LANE) == 0 else LANE
    pieces = step_k // LANE
    k_steps, columns = num_k // step_k, num_n // COLUMNS
    values = [array.values.reshape(-1, num_n, num_k) for array in rhs]
    scales = [array.scales.reshape(-1, *array.scales.shape[-2:]) for array in rhs]
    narrow = values[0].dtype
    swizzle = step_k * (4 if narrow == jnp.int4 else 8) // 8
    upcast = plgpu.Layout.WGMMA_UPCAST_4X if swizzle < step_k else plgpu.Layout.WGMMA_UPCAST_2X
    first_matrix = jnp.asarray(layer, jnp.int32).reshape(1) * num_groups
    dtype = jnp.bfloat16

    def body(start_ref, tiles_ref, first_ref, lhs_ref, *refs):
        values_refs, refs = refs[:num_products], refs[num_products:]
        scale_refs, refs = refs[:num_products], refs[num_products:]
        out_ref, (lhs_pieces, lhs_plain), numbers_smem, partial, out_smem, *rest = refs
        loaded, free, partial_ready, partial_free = rest
        wg = lax.axis_index("wg")
        ranges = RowRanges(start_ref, tiles_ref, num_rows, block_m, columns)
        total = ranges.num_tiles
        numbers = Turns(num_ctas)

        def locate(number):
            """The place of a tile, with its matrix among those of all layers."""
            number, group, *rest = ranges.locate(number, 16, k_steps * num_products)
            return number, first_ref[0] + group, *rest

        @pl.when(wg == workers)
        def _load() -> None:
            def load_tile(index, place, step):
                _, matrix, row, _, n, steps = place

                def load_step(k, step):
                    for product in range(num_products):
                        slot = lax.rem(step, stages)
                        pl.when(step >= stages)(
                            functools.partial(plgpu.barrier_wait, free.at[slot])
                        )
                        plgpu.copy_gmem_to_smem(
                            values_refs[product].at[
                                matrix, pl.ds(n * COLUMNS, COLUMNS), pl.ds(k * step_k, step_k)
                            ],
                            numbers_smem.at[slot],
                            loaded.at[slot],
                        )
                        for piece in range(pieces):
                            plgpu.copy_gmem_to_smem(
                                lhs_ref.at[pl.ds(row, block_m), k * pieces + piece],
                                lhs_plain.at[slot, piece],
                                loaded.at[slot],
                            )
                        step = step + 1
                    return step

                step = lax.fori_loop(0, lax.div(steps, num_products), load_step, step)
                return locate(numbers.read(index + 1)), step

            for_tiles(numbers, total, locate, load_tile, jnp.int32(0))

        def compute(product: int) -> None:
            own = _Scales(form, scale_refs[product], step_k)

            def multiply(index, place, before):
                """This warpgroup's share of a tile's sums [columns, rows]."""
                _, matrix, _, _, n, steps = place
                # Steps are dealt over all tiles, so that a stage is always one warpgroup's: each
                # counts the phases of a barrier by its own waits.
                start = lax.rem(wg + workers - lax.rem(before, workers), workers)

                def k_step(turn, carry):
                    sums, *scales_now = carry
                    ours = start + turn * workers
                    slot = lax.rem(before + ours, stages)
                    k = lax.div(ours + workers, num_products)
                    scales_next = own.of_step(matrix, n, k)
                    plgpu.barrier_wait(loaded.at[slot])
                    stored = plgpu.load(numbers_smem.at[slot], layout=upcast)
                    if narrow in (jnp.int8, jnp.int4):
                        weights = plgpu.layout_cast(stored, MATRIX).astype(dtype)
                    else:
                        # float8 widens to float16 in one instruction.
                        wide = plgpu.layout_cast(stored, MATRIX).astype(jnp.float16)
                        weights = wide.astype(jnp.float32).astype(dtype)

                    def products(*accs):
                        for unit, acc in enumerate(accs):
                            for piece in range(own.unit // LANE):
                                at = unit * (own.unit // LANE) + piece
                                b = lhs_pieces.at[slot, at].transpose((1, 0))
                                plgpu.wgmma(acc, weights[:, at * LANE : (at + 1) * LANE], b)
                        plgpu.wgmma_wait(0)
                        return tuple(acc[...] for acc in accs)

                    accs = [plgpu.ACC((COLUMNS, block_m), jnp.float32)] * own.units
                    parts = pl.run_scoped(products, *accs)
                    plgpu.barrier_arrive(free.at[slot])
                    for unit, part in enumerate(parts):
                        sums = sums + (_times(part, scales_now[unit]) if scales_now else part)
                    return sums, *scales_next

                zeros = jnp.zeros((COLUMNS, block_m), jnp.float32)
                zeros = plgpu.layout_cast(zeros, MATRIX)
                turns = lax.div(steps - start + (workers - 1), workers)
                first = own.of_step(matrix, n, lax.div(start, num_products))
                sums, *_ = lax.fori_loop(0, turns, k_step, (zeros, *first))
                return sums

            def share(index, sums):
                """Hands this warpgroup's sums to the first one."""
                pl.when(index > 0)(lambda: plgpu.barrier_wait(partial_free))
                partial[wg - 1] = sums
                # All threads have written before one of them says so.
                plgpu.commit_smem()
                plgpu.barrier_arrive(partial_ready)

            def store(place, sums):
                """Adds up all warpgroups' sums and writes the tile."""
                _, matrix, row, valid, n, _ = place
                plgpu.barrier_wait(partial_ready)
                by_product = [sums, None][:num_products]
                for other in range(1, workers):
                    part = plgpu.load(partial.at[other - 1], layout=MATRIX, optimized=False)
                    at = other % num_products
                    by_product[at] = part if by_product[at] is None else by_product[at] + part
                plgpu.commit_smem()
                plgpu.barrier_arrive(partial_free)
                if form.per_column:
                    for at, ref in enumerate(scale_refs):
                        column = _Scales(form, ref, step_k).of_columns(matrix, n, 0)
                        by_product[at] = _times(by_product[at], column)
                out = by_product[0]
                if activation:
                    out = out * (1 / (1 + jnp.exp(-out))) * by_product[1]
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                out = out.astype(out_dtype)
                if out.dtype != dtype:  # float32's neighbours of a column share no register
                    out = plgpu.layout_cast(out, plgpu.Layout.WGMMA_TRANSPOSED)
                out_smem.transpose((1, 0))[...] = out
                store_rows(out_smem, out_smem, out_ref.at[:, n], row, valid, block_m)

            def compute_tile(index, place, before):
                sums = multiply(index, place, before)
                if product == 0:
                    pl.when(wg == 0)(lambda: store(place, sums))
                pl.when(wg > 0)(lambda: share(index, sums))
                return locate(numbers.read(index + 1)), before + place[-1]

            for_tiles(numbers, total, locate, compute_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

        for product in range(num_products):
            pl.when((wg < workers) & (lax.rem(wg, num_products) == product))(
                functools.partial(compute, product)
            )

    rows_shape = (stages, pieces, block_m, LANE)
    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, columns, LANE), out_dtype),
        grid=(num_ctas,),
        grid_names=("sm",),
        num_threads=workers + 1,
        thread_name="wg",
        scratch_types=[
            row_views_smem(rows_shape, dtype),
            _stored_smem((stages, COLUMNS, step_k), narrow, swizzle),
            plgpu.SMEM((workers - 1, COLUMNS, block_m), jnp.float32),
            plgpu.SMEM((block_m, COLUMNS), out_dtype),
            plgpu.Barrier(num_arrivals=1 + pieces, num_barriers=stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=stages),
            plgpu.Barrier(num_arrivals=workers - 1),
            plgpu.Barrier(num_arrivals=1),
        ],
        compiler_params=LANE_COMPILER_PARAMS,
    )
    sums = running_sums(group_sizes_G, group_offset, num_groups, block_m)
    view = lhs_MK.reshape(num_rows, num_k // LANE, LANE)
    out = kernel(*sums, first_matrix, view, *values, *scales)
    return vary_like(out.reshape(num_rows, num_n), lhs_MK)


def _stored_smem(shape: Sequence[int], dtype: Any, swizzle: int) -> Any:
    """Shared memory for stored numbers, in rows of `swizzle` bytes."""
    tiling = plgpu.TilingTransform((8, shape[-1]))  # type: ignore[abstract]
    return plgpu.SMEM(tuple(shape), dtype, transforms=(tiling, *swizzled(swizzle)))
