"""Many rows times stored float8 weights on Hopper, both in float8: dense, and by group.

A persistent block walks over tiles of 128 rows and two pieces of 128 columns: two pieces of one
matrix, or one of SwiGLU's gate and one of its up matrix. Its memory warpgroup fills a ring of
stages of 128 of the contraction. Each of two compute warpgroups multiplies 64 rows by one piece
after the other. wgmma adds up 128 products at most, as its sums of float8 keep some 14 bits; these
are scaled and added up in float32 (DeepSeek-V3, arXiv 2412.19437, 3.3.2), while the tensor cores
multiply for the other warpgroup.

Stored numbers lie with the contraction last, which is the only order that wgmma takes of float8, so
that they are read as they are: nothing is laid out anew, neither at load nor in a step.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jax.typing import DTypeLike

from pallas_kernels.chips import num_sms
from pallas_kernels.fp8_rows import BLOCK, DTYPE, quantised_blocks
from pallas_kernels.hopper_fp8_rows import round_rows
from pallas_kernels.hopper_parts import (
    LANE_COMPILER_PARAMS,
    MATRIX,
    PER_COLUMN,
    PER_ROW,
    row_views_smem,
)
from pallas_kernels.hopper_row_ranges import RowRanges, running_sums, store_rows
from pallas_kernels.hopper_schedule import Tickets, Turns, for_tiles, give_registers, load_tiles
from pallas_kernels.manual_axes import vary_like
from pallas_kernels.quantised import QuantisedWeights

COMPUTE_WGS = 2
WG_ROWS = 64  # of a warpgroup: the least that wgmma takes
BLOCK_M = COMPUTE_WGS * WG_ROWS
PIECES = 2  # pieces of BLOCK columns that a tile has
_OUT_BYTES = 128  # of a row of the result in a block that leaves
_BFLOAT16 = jnp.bfloat16
_SLOTS = 2  # blocks of the result of a warpgroup: one leaves while the next is put together


@dataclasses.dataclass(frozen=True)
class Tile:
    """How the kernel goes over its tiles.

    Attributes:
        stages: steps of the contraction held in shared memory, 48 KiB each.
        band: rows of tiles taken together before going on to the next column.
        tickets: deal tiles to blocks as they ask, not in turn.
    """

    stages: int = 4
    band: int = 16
    tickets: bool = False


class _Scales:
    """The scales of one warpgroup's sums over a step of the contraction."""

    def __init__(self, rows_ref: Any, weights_refs: Sequence[Any]):
        self.rows_ref, self.weights_refs = rows_ref, weights_refs
        self.last = rows_ref.shape[0] - 1

    def of_step(self, k: Array | int, place: tuple[Array, Array, Sequence[Array]]) -> tuple:
        """One of each row, and one of each piece unless columns have theirs at the end.

        Loads, asked for a step ahead; past the last step those of the last.
        """
        row, matrix, columns = place
        k = jnp.minimum(k, self.last)
        rows = self.rows_ref.at[k, pl.ds(row, WG_ROWS)]
        of_rows = plgpu.load(rows, layout=PER_ROW, optimized=False)
        of_pieces = (
            ref[matrix, jnp.minimum(lax.div(column, BLOCK), ref.shape[1] - 1), k]
            for ref, column in zip(self.weights_refs, columns, strict=False)
        )
        return of_rows, *of_pieces


def row_products(
    lhs_MK: Array,
    rhs: Sequence[QuantisedWeights],
    layer: Array | int,
    group_sizes_G: Array,
    group_offset: Array,
    *,
    activation: bool = False,
    out_dtype: DTypeLike = _BFLOAT16,
    tile: Tile | None = None,
    num_ctas: int | None = None,
) -> Array:
    """Rows, rounded to float8, times their group's matrices: one, or two with SwiGLU after them.

    Args:
        lhs_MK: bfloat16; K a multiple of 16, as TMA's strides are, and N of 64.
        rhs: float8_e4m3fn with one scale for each 128 x 128 block or each column: one matrix of
            each group, or a gate and an up matrix, each [..., G, K, N]: with a dim before G, of all
            layers, which are read where they lie.
        layer: int32, the layer among those.
        group_sizes_G: int32 rows of every group.
        group_offset: int32, the first group held.
        activation: give silu(gate) * up of the two products.
        out_dtype: bfloat16 or float32.
        tile: None for what fits the number of rows.
        num_ctas: thread blocks; None for one on each multiprocessor.

    Returns:
        Rows [M, N] of `out_dtype`; 0 for rows of groups that are not held.
    """
    num_rows, num_k = lhs_MK.shape
    *_, num_groups, num_n, _ = rhs[0].values.shape
    form = rhs[0].format
    if tile is None:
        # Even groups lose a little by tickets, uneven ones win more; one group is even.
        tile = Tile(tickets=num_groups > 1 and num_rows > BLOCK * num_groups)
    num_ctas = num_ctas or num_sms()
    stages = tile.stages
    block_n = BLOCK if activation else PIECES * BLOCK
    k_steps, tile_columns = pl.cdiv(num_k, BLOCK), pl.cdiv(num_n, block_n)
    values = [array.values.reshape(-1, num_n, num_k) for array in rhs]
    layer = jnp.asarray(layer, jnp.int32)
    if form.per_column:
        scales = [_column_scales(array, layer, tile_columns * block_n) for array in rhs]
    else:
        scales = [array.scales.reshape(-1, *array.scales.shape[-2:]) for array in rhs]
    lane = _OUT_BYTES // jnp.dtype(out_dtype).itemsize
    out_lanes = num_n // lane
    # One result of a tile with SwiGLU, else one of each piece, in blocks of so many columns.
    num_results = 1 if activation else PIECES
    blocks = [(piece, j) for piece in range(num_results) for j in range(BLOCK // lane)]

    def body(start_ref, tiles_ref, first_ref, lhs_ref, lhs_scales_ref, *refs):
        values_refs, scale_refs = refs[: len(rhs)], refs[len(rhs) : 2 * len(rhs)]
        out_ref, *scratch = refs[2 * len(rhs) :]
        (lhs_pieces, lhs_plain), (rhs_pieces, rhs_plain), (out_pieces, out_plain) = scratch[:3]
        loaded, free, *of_tickets = scratch[3:]
        wg = lax.axis_index("wg")
        ranges = RowRanges(start_ref, tiles_ref, num_rows, BLOCK_M, tile_columns)
        total = ranges.num_tiles
        numbers = Tickets(*of_tickets) if tile.tickets else Turns(num_ctas)
        # By piece: SwiGLU's are of two matrices, one product's follow one another in its own.
        of_piece = [piece if activation else 0 for piece in range(PIECES)]

        def columns_of(n):
            return [n * block_n + (0 if activation else piece * BLOCK) for piece in range(PIECES)]

        def locate(number):
            """The place of a tile; of rows that get zeros, scales are read of a group that is."""
            number, group, *rest = ranges.locate(number, tile.band, k_steps)
            return number, jnp.clip(group, 0, num_groups - 1), *rest

        @pl.when(wg == COMPUTE_WGS)
        def _load() -> None:
            give_registers(40, "decrease", COMPUTE_WGS)

            def load_step(k, step, place):
                _, group, row, _, n, _ = place
                slot = lax.rem(step, stages)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                plgpu.copy_gmem_to_smem(
                    lhs_ref.at[pl.ds(row, BLOCK_M), k],
                    lhs_plain.at[pl.ds(slot * BLOCK_M, BLOCK_M)],
                    loaded.at[slot],
                )
                for piece, column in enumerate(columns_of(n)):
                    plgpu.copy_gmem_to_smem(
                        values_refs[of_piece[piece]].at[
                            first_ref[0] + group, pl.ds(column, BLOCK), pl.ds(k * BLOCK, BLOCK)
                        ],
                        rhs_plain.at[piece, slot],
                        loaded.at[slot],
                    )
                return step + 1

            def load(place, step):
                return lax.fori_loop(0, place[-1], lambda k, step: load_step(k, step, place), step)

            load_tiles(numbers, total, locate, load)

        @pl.when(wg < COMPUTE_WGS)
        def _compute() -> None:
            give_registers(232, "increase", COMPUTE_WGS)
            wg_row = wg * WG_ROWS
            of_blocks = [] if form.per_column else [scale_refs[at] for at in of_piece]
            own_scales = _Scales(lhs_scales_ref, of_blocks)

            def skip_step(_, step):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                return step + 1

            def multiply(place, step, steps):
                """This warpgroup's sums [64, 128] of each piece, scaled but for columns' scales."""
                _, group, row, _, n, _ = place
                where = (row + wg_row, first_ref[0] + group, columns_of(n))

                def k_step(k, carry):
                    step, sums, (of_rows, *of_pieces) = carry
                    following = own_scales.of_step(k + 1, where)
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(loaded.at[slot])
                    a = lhs_pieces.at[pl.ds(slot * BLOCK_M + wg_row, WG_ROWS)]
                    added = []
                    for piece in range(PIECES):
                        b = rhs_pieces.at[piece, slot].transpose((1, 0))

                        def product(acc, a=a, b=b):
                            plgpu.wgmma(acc, a, b)
                            plgpu.wgmma_wait(0)
                            return acc[...]

                        part = pl.run_scoped(product, plgpu.ACC((WG_ROWS, BLOCK), jnp.float32))
                        if piece == PIECES - 1:
                            # Read by now; what follows needs registers alone.
                            plgpu.barrier_arrive(free.at[slot])
                        scale = of_rows * of_pieces[piece] if of_pieces else of_rows
                        scale = lax.broadcast_in_dim(scale, part.shape, (0,))
                        added.append(sums[piece] + part * scale)
                    return step + 1, tuple(added), following

                zeros = jnp.zeros((WG_ROWS, BLOCK), jnp.float32)
                zeros = plgpu.layout_cast(zeros, MATRIX)
                start = (step, (zeros,) * PIECES, own_scales.of_step(0, where))
                step, sums, _ = lax.fori_loop(0, steps, k_step, start)
                return step, sums

            def by_column(sums, place):
                """The sums times one scale for each of their columns."""
                _, group, _, _, n, _ = place
                scaled = []
                for piece, column in enumerate(columns_of(n)):
                    scale = scale_refs[of_piece[piece]].at[group, pl.ds(column, BLOCK)]
                    scale = plgpu.load(scale, layout=PER_COLUMN, optimized=False)
                    spread = lax.broadcast_in_dim(scale, (WG_ROWS, BLOCK), (1,))
                    scaled.append(sums[piece] * spread)
                return scaled

            def store(block, value, place):
                """A block of a result from registers to memory."""
                _, _, row, valid, n, _ = place
                piece, j = block
                plgpu.wait_smem_to_gmem(_SLOTS - 1, wait_read_only=True)
                slot = blocks.index(block) % _SLOTS
                out_pieces[wg, slot] = value[:, j * lane : (j + 1) * lane]
                column = lax.div(n * block_n + piece * BLOCK, lane) + j
                store_rows(
                    out_pieces.at[wg, slot],
                    out_plain.at[wg, slot],
                    out_ref.at[:, jnp.minimum(column, out_lanes - 1)],
                    row + wg_row,
                    jnp.where(column < out_lanes, valid - wg_row, 0),
                    WG_ROWS,
                )

            def compute_tile(index, place, step):
                _, _, _, valid, _, steps = place
                # Past its group's last row a warpgroup leaves the tensor cores to the other.
                skipped = jnp.where(valid > wg_row, 0, steps)
                step = lax.fori_loop(0, skipped, skip_step, step)
                step, sums = multiply(place, step, steps - skipped)
                next_place = locate(numbers.read(index + 1))
                if form.per_column:
                    sums = by_column(sums, place)
                if activation:
                    gate, up = sums
                    sums = (gate * (1 / (1 + jnp.exp(-gate))) * up,)
                results = [value.astype(out_dtype) for value in sums]
                for block in blocks:
                    store(block, results[block[0]], place)
                return next_place, step

            for_tiles(numbers, total, locate, compute_tile, jnp.int32(0))
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_rows, out_lanes, lane), out_dtype),
        grid=(num_ctas,),
        grid_names=("sm",),
        num_threads=COMPUTE_WGS + 1,
        thread_name="wg",
        scratch_types=[
            row_views_smem((stages * BLOCK_M, BLOCK), DTYPE),
            row_views_smem((PIECES, stages, BLOCK, BLOCK), DTYPE),
            row_views_smem((COMPUTE_WGS, _SLOTS, WG_ROWS, lane), out_dtype),
            plgpu.Barrier(num_arrivals=1 + PIECES, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WGS, num_barriers=stages),
            *(Tickets if tile.tickets else Turns).scratch(COMPUTE_WGS + 1),
        ],
        compiler_params=LANE_COMPILER_PARAMS,
    )
    lhs, lhs_scales = _rounded_for_tiles(lhs_MK)
    sums = running_sums(group_sizes_G, group_offset, num_groups, BLOCK_M)
    first = (layer * num_groups).reshape(1)
    out = kernel(*sums, first, lhs, lhs_scales, *values, *scales)
    return vary_like(out.reshape(num_rows, num_n), lhs_MK)


def _rounded_for_tiles(lhs_MK: Array) -> tuple[Array, Array]:
    """Rows in float8, and their scales by step of the contraction, as a tile reads them.

    A tile's last rows may be none: it reads scales beyond those of the rows.
    """
    num_rows, num_k = lhs_MK.shape
    if num_k % BLOCK == 0:
        return round_rows(lhs_MK, pl.cdiv(num_rows, BLOCK_M) * BLOCK_M + BLOCK_M)
    lhs, scales = quantised_blocks(lhs_MK)
    return lhs, jnp.pad(scales.T, ((0, 0), (0, BLOCK_M)))


def _column_scales(weights: QuantisedWeights, layer: Array, width: int) -> Array:
    """One layer's scales of columns, float32 [G, width], with as many as the last tile reads."""
    num_groups, num_n, _ = weights.scales.shape[-3:]
    by_layer = weights.scales.reshape(-1, num_groups, num_n)
    return jnp.pad(by_layer[layer].astype(jnp.float32), ((0, 0), (0, width - num_n)))
