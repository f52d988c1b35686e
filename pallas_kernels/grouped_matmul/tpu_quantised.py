"""Rows times quantised matrices of their groups on TPUs, the numbers read where they lie.

How it is laid out, and why:

- A visit is a block of rows and one group that has some of them. Blocks come through Pallas'
  pipeline and stay while their groups pass, so decode has one block, or few.
- A group's stored numbers [columns, K] lie in VMEM at full depth. They are fetched by hand a group
  or two ahead, once for all visits of the group. All layers' matrices may lie in one array: a
  group's place is found in the kernel, and nothing is copied.
- Some columns at a time are widened to bfloat16, which holds every number of 4 and 8 bits, and
  multiplied in the same stretch of code: the vector unit widens while the matrix units multiply.
  Further rows of the group widen them again: to keep them would take longer (see notes.md).
- Scales multiply float32 sums, of a block of K or at the end, so that nothing is rounded before it
  is added. They come with the columns last, a row of a register for each block of K: so XLA lays
  them out in a TPU's memory by itself, and a scale lies in the lane of the sums that it multiplies.
- Of blocks shorter than 128 a matrix unit has several at once. The rows come as often, each time
  with one block of every 128 and zeros for the others, one below the other: the weights, whose way
  into the matrix unit is what takes time, go there once.
"""

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import TPU_LANES as LANES
from pallas_kernels.chips import TpuChip, tpu_chip
from pallas_kernels.grouped_matmul.groups import group_of_tile, local_groups
from pallas_kernels.grouped_matmul.tpu_windows import ALIGN, pad_rows
from pallas_kernels.manual_axes import output_like
from pallas_kernels.quantised import Format, QuantisedWeights
from pallas_kernels.tpu_parts import dot

# Blocks of K come in as many without room being lost.
_WHOLE_BLOCKS = 8


@dataclasses.dataclass(frozen=True)
class Tile:
    """Sizes of the kernel.

    Attributes:
        rows: rows of a block.
        chunk: rows multiplied at once.
        columns: columns of the result whose weights are in VMEM together.
        body_columns: columns widened and multiplied at once.
        buffers: groups whose weights are in VMEM or on their way there.
    """

    rows: int
    chunk: int
    columns: int
    body_columns: int
    buffers: int


def choose_tile(
    num_rows: int,
    num_groups: int,
    widths: tuple[int, int],
    form: Format,
    num_rhs: int,
    chip: TpuChip | None = None,
) -> Tile:
    """Sizes by the mean rows of a group: as few column tiles as fit, then as many weights ahead.

    Args:
        num_rows: rows of all groups, a multiple of `ALIGN`.
        num_groups: number of all groups.
        widths: contracted width and columns.
        form: how the weights are stored.
        num_rhs: matrices of a group.
        chip: the chip; None for the one that is compiled for.
    """
    chip = chip or tpu_chip()
    depth, num_columns = widths
    mean = num_rows / num_groups
    chunk = min(num_rows, 16 if mean <= 4 else 32 if mean <= 32 else 128)
    rows = min(num_rows, 512)
    lanes = num_columns // LANES
    body = 512 if chunk <= 32 else 256

    def fits(columns: int, buffers: int) -> bool:
        weights = depth * columns * num_rhs * _bits(form) // 8
        wide = depth * min(body, columns) * num_rhs * 2
        scales = form.num_blocks(depth) * columns * num_rhs * 4
        moving = 2 * rows * (depth * _parts(form) + columns) * 2
        return buffers * (weights + scales) + 2 * wide + moving <= chip.vmem_limit - 6 * 2**20

    # Cores share the column tiles.
    parts = range(chip.cores, lanes + chip.cores, chip.cores)
    choices = [(-(-lanes // part) * LANES, n) for part in parts for n in (3, 2)]
    columns, buffers = next((choice for choice in choices if fits(*choice)), (LANES, 2))
    return Tile(rows, chunk, columns, min(body, columns), buffers)


def _bits(form: Format) -> int:
    return 4 if form.dtype == "int4" else 8


def _parts(form: Format) -> int:
    """Blocks of K that a matrix unit's depth of 128 has; 1 where a block is longer."""
    return max(1, LANES // form.block_in) if form.block_in else 1


def row_products(
    lhs_MK: Array,
    rhs: Sequence[QuantisedWeights],
    layer: Array | int,
    group_sizes_G: Array,
    group_offset: Array,
    *,
    activation: bool = False,
    tile: Tile | None = None,
    interpret: Any = False,
) -> Array:
    """Rows times their group's matrices: one product, or two with SwiGLU after them.

    Args:
        lhs_MK: bfloat16; K and N are multiples of 128.
        rhs: one matrix of each group, or a gate and an up matrix, [..., G, K, N]: with a dim before
            G, of all layers.
        layer: int32, the layer among those.
        group_sizes_G: int32 rows of every group.
        group_offset: int32, the first group held.
        activation: give silu(gate) * up of the two products.
        tile: sizes; None for the table's.
        interpret: as of `pallas_call`.

    Returns:
        bfloat16 rows [M, N].
    """
    num_rows, depth = lhs_MK.shape
    *_, num_groups, num_columns, _ = rhs[0].values.shape
    form = rhs[0].format
    lhs = pad_rows(lhs_MK)
    padded, dtype = lhs.shape[0], lhs.dtype
    tile = tile or choose_tile(padded, group_sizes_G.shape[0], (depth, num_columns), form, len(rhs))
    first_group = jnp.asarray(layer, jnp.int32) * num_groups
    visits, *scalars = _visits(group_sizes_G, group_offset, num_groups, first_group, padded, tile)
    values = [array.values.reshape(-1, num_columns, depth) for array in rhs]
    scales = [_scales(array, layer) for array in rhs]
    # Those of one layer begin with its first group's.
    skipped = first_group if scales[0].shape[0] == num_groups else jnp.int32(0)
    scalars.append(skipped.reshape(1))
    lhs_parts = _split(lhs, form)
    column_tiles = -(-num_columns // tile.columns)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)

    def rows_of(column: Any, visit: Any, block_ref: Any, *_: Any) -> tuple[Any, int]:
        return block_ref[visit], 0

    def out_of(column: Any, visit: Any, block_ref: Any, *_: Any) -> tuple[Any, Any]:
        return block_ref[visit], column

    out = pl.pallas_call(
        functools.partial(_kernel, tile, form, num_columns, activation, len(rhs)),
        out_shape=output_like(lhs, (padded, num_columns), dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(column_tiles, visits),
            in_specs=[pl.BlockSpec((tile.rows, depth), rows_of)] * len(lhs_parts)
            + [anywhere] * (len(values) + len(scales)),
            out_specs=pl.BlockSpec((tile.rows, tile.columns), out_of),
            scratch_shapes=[
                [pltpu.VMEM((tile.buffers, tile.columns, depth), x.dtype) for x in values],
                [pltpu.VMEM((tile.buffers, x.shape[1], tile.columns), x.dtype) for x in scales],
                pltpu.SemaphoreType.DMA((tile.buffers,)),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=tpu_chip().vmem_limit,
            disable_bounds_checks=True,
        ),
        cost_estimate=pl.CostEstimate(
            flops=2 * padded * depth * num_columns * len(rhs),
            bytes_accessed=num_groups * depth * num_columns * len(rhs) * _bits(form) // 8
            + 2 * padded * (depth + num_columns),
            transcendentals=padded * num_columns if activation else 0,
        ),
        interpret=interpret,
        name="grouped_swiglu" if activation else "grouped_matmul",
    )(*scalars, *lhs_parts, *values, *scales)
    return out[:num_rows]


def _scales(rhs: QuantisedWeights, layer: Array | int) -> Array:
    """Scales [matrices, blocks of K, columns], of all layers or of the one.

    Of one layer where XLA makes them anew: where columns share scales, which are spread, and where
    the blocks fill no registers, so that a TPU's memory has them in another order.
    """
    scales, block_out = rhs.scales, rhs.format.block_out
    blocks = scales.shape[-1]
    if scales.ndim == 4 and (block_out > 1 or (blocks % _WHOLE_BLOCKS and blocks > 1)):
        scales = jax.lax.dynamic_index_in_dim(scales, jnp.asarray(layer), keepdims=False)
    if block_out > 1:
        scales = jnp.repeat(scales, block_out, axis=-2)[..., : rhs.values.shape[-2], :]
    return scales.swapaxes(-1, -2).reshape(-1, blocks, scales.shape[-2])


def _split(lhs_MK: Array, form: Format) -> list[Array]:
    """The rows once for each block that 128 lanes have, with zeros for the other blocks."""
    parts = _parts(form)
    if parts == 1:
        return [lhs_MK]
    part_K = jnp.arange(lhs_MK.shape[1]) // (LANES // parts) % parts
    return [jnp.where(part_K == part, lhs_MK, 0) for part in range(parts)]


def _visits(
    group_sizes_G: Array,
    group_offset: Array,
    num_groups: int,
    first_group: Array,
    num_rows: int,
    tile: Tile,
) -> tuple[Array, ...]:
    """The visits, over the rows before the held groups, each group's, and those after.

    Returns:
        Their number; for each visit its block of rows, the first and the end of its rows in that
        block, and its group's number among the held groups that have rows (-1 before and after);
        for each such number the place of its matrix; and how many of them there are, [1].
    """
    starts_G, sizes_G = local_groups(group_sizes_G, group_offset, num_groups)
    end = starts_G[-1:] + sizes_G[-1:]
    zero = jnp.zeros_like(end)
    start_R = jnp.concatenate([zero, starts_G, end]).astype(jnp.int32)
    end_R = jnp.concatenate([start_R[1:], jnp.full_like(start_R[:1], num_rows)])
    first_R = start_R // tile.rows
    visits_R = jnp.where(end_R > start_R, (end_R - 1) // tile.rows - first_R + 1, 0)
    most = -(-num_rows // tile.rows) + min(num_groups + 2, num_rows)
    range_V, index_V, count = group_of_tile(visits_R, most)
    block_V = first_R[range_V] + index_V
    low_V = jnp.maximum(start_R[range_V] - block_V * tile.rows, 0)
    high_V = jnp.minimum(end_R[range_V] - block_V * tile.rows, tile.rows)
    used_G = (sizes_G > 0).astype(jnp.int32)
    after_G = jnp.cumsum(used_G)
    used_R = jnp.concatenate([zero - 1, after_G - used_G, zero - 1])
    number_G = jnp.arange(num_groups, dtype=jnp.int32)
    group_U = jnp.sum(after_G <= number_G[:, None], axis=1, dtype=jnp.int32)
    place_U = jnp.minimum(group_U, num_groups - 1) + first_group
    lists = (block_V, low_V, high_V, used_R[range_V], place_U, after_G[-1:])
    return count.astype(jnp.int32), *(x.astype(jnp.int32) for x in lists)


def _kernel(
    tile: Tile,
    form: Format,
    num_columns: int,
    activation: bool,
    num_rhs: int,
    block_ref: Any,
    low_ref: Any,
    high_ref: Any,
    used_ref: Any,
    place_ref: Any,
    num_used_ref: Any,
    skipped_ref: Any,
    *refs: Any,
) -> None:
    *arrays, out_ref, values_refs, scales_refs, semaphores = refs
    lhs_refs, values_hbm, scales_hbm = (
        arrays[: -2 * num_rhs],
        arrays[-2 * num_rhs : -num_rhs],
        arrays[-num_rhs:],
    )
    column_tile, visit = pl.program_id(0), pl.program_id(1)
    used = used_ref[visit]
    before = jnp.maximum(visit - 1, 0)
    # lax's division, as Python's asks for the sign of what is never negative.
    slot = jax.lax.rem(jnp.maximum(used, 0), tile.buffers)

    def copy_weights(used: Any, slot: Any, *, wait: bool) -> None:
        """A group's columns of this tile, and their scales."""
        place = place_ref[used]
        first = pl.multiple_of(column_tile * tile.columns, LANES)

        def copy(source: Any, target: Any) -> None:
            transfer = pltpu.make_async_copy(source, target, semaphores.at[slot])
            transfer.wait() if wait else transfer.start()

        def copy_width(width: int) -> None:
            part = pl.ds(first, width)
            for hbm, ref in zip(values_hbm, values_refs, strict=True):
                copy(hbm.at[place, part], ref.at[slot, pl.ds(0, width)])
            for hbm, ref in zip(scales_hbm, scales_refs, strict=True):
                source = hbm.at[place - skipped_ref[0], :, part]
                copy(source, ref.at[slot, :, pl.ds(0, width)])

        whole, rest = divmod(num_columns, tile.columns)
        if whole:
            pl.when(column_tile < whole)(functools.partial(copy_width, tile.columns))
        if rest:
            pl.when(column_tile == whole)(functools.partial(copy_width, rest))

    @pl.when(visit == 0)
    def _first() -> None:
        for ahead in range(tile.buffers - 1):
            pl.when(ahead < num_used_ref[0])(
                functools.partial(copy_weights, ahead, ahead, wait=False)
            )

    @pl.when((visit == 0) | (block_ref[visit] != block_ref[before]))
    def _zero() -> None:
        @pl.loop(0, tile.rows // ALIGN)
        def _rows(n: Any) -> None:
            here = pl.ds(pl.multiple_of(n * ALIGN, ALIGN), ALIGN)
            out_ref[here] = jnp.zeros((ALIGN, tile.columns), out_ref.dtype)

    @pl.when((used >= 0) & ((visit == 0) | (used != used_ref[before])))
    def _weights() -> None:
        copy_weights(used, slot, wait=True)
        ahead = used + (tile.buffers - 1)

        @pl.when(ahead < num_used_ref[0])
        def _ahead() -> None:
            copy_weights(ahead, jax.lax.rem(ahead, tile.buffers), wait=False)

    low, high = low_ref[visit], high_ref[visit]
    first_row = low & -ALIGN

    def columns(start: Any, width: int) -> None:
        """All rows of the visit by some columns."""
        part = pl.ds(pl.multiple_of(start, LANES), width)
        scales = [ref[slot, :, part].astype(jnp.float32) for ref in scales_refs]

        @pl.loop(0, jax.lax.div(high - first_row + tile.chunk - 1, tile.chunk))
        def _chunk(chunk: Any) -> None:
            # The last chunk may take rows again that are done: it gives them the same values.
            base = jnp.minimum(first_row + chunk * tile.chunk, tile.rows - tile.chunk)
            here = pl.ds(pl.multiple_of(base, ALIGN), tile.chunk)
            sums = []
            for values_ref, scale_BN in zip(values_refs, scales, strict=True):

                def weights(lanes: Any, ref: Any = values_ref) -> Array:
                    return ref[slot, part, lanes].astype(jnp.bfloat16)

                sums.append(_product([ref.at[here] for ref in lhs_refs], weights, scale_BN, form))
            result = jax.nn.silu(sums[0]) * sums[1] if activation else sums[0]
            row = base + jax.lax.broadcasted_iota(jnp.int32, (tile.chunk, 1), 0)
            kept = out_ref[here, part].astype(jnp.float32)
            own = (row >= low) & (row < high)
            out_ref[here, part] = jnp.where(own, result, kept).astype(out_ref.dtype)

    @pl.when(used >= 0)
    def _compute() -> None:
        whole, rest = divmod(tile.columns, tile.body_columns)
        if whole > 1:
            pl.loop(0, whole)(lambda n: columns(n * tile.body_columns, tile.body_columns))
        elif whole:
            columns(0, tile.body_columns)
        if rest:
            columns(whole * tile.body_columns, rest)


def _product(lhs_refs: list[Any], weights: Any, scale_BN: Array, form: Format) -> Array:
    """Rows times some columns, float32."""
    depth = lhs_refs[0].shape[1]
    if form.per_column:
        return dot(lhs_refs[0][...], weights(slice(None)), transpose_rhs=True) * scale_BN[:1]
    assert form.block_in is not None
    parts = len(lhs_refs)
    step = max(form.block_in, LANES)
    total: Any = 0.0
    for number, first in enumerate(range(0, depth, step)):
        lanes = slice(first, min(first + step, depth))
        rows = [ref[:, lanes] for ref in lhs_refs]
        lhs = jnp.concatenate(rows, axis=0) if parts > 1 else rows[0]
        sums = dot(lhs, weights(lanes), transpose_rhs=True)
        height = rows[0].shape[0]
        for part in range(parts):
            block = number * parts + part
            total += sums[part * height : (part + 1) * height] * scale_BN[block : block + 1]
    return total
