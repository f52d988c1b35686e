"""Rows times their group's weights on TPUs: products, SwiGLU, and the rows' gradients.

How it is laid out, and why:

- Rows are taken in windows that begin where their group does (rounded down to 16), so a group
  wastes matrix work at its end only. No more rows of a window are fetched than it has.
- A group's weights lie in VMEM at full depth while its rows pass. So they are read once, and sums
  never leave the MXU. They are fetched by hand a group or two ahead: a pipeline that looks one
  step ahead would leave the memory idle until a group's last window.
- Windows cover all rows in order, those of no held group too (as zeros), and every row is written
  once. The 16 rows that two groups share are carried from one window to the next, so no store is
  masked and no output is read.
- Quantised weights are widened in VMEM once for all rows of their group.
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.grouped_matmul.groups import local_groups
from pallas_kernels.grouped_matmul.stacks import LayerOfStack
from pallas_kernels.grouped_matmul.tiles import TpuRowsTile, tpu_rows_tile
from pallas_kernels.grouped_matmul.tpu_windows import (
    ALIGN,
    FIRST,
    compiler_params,
    copy_rows,
    fetched,
    make_windows,
    pad_rows,
)
from pallas_kernels.manual_axes import output_like
from pallas_kernels.quantised import SCALE_BLOCK, BlockScaledWeights, QuantisedWeights
from pallas_kernels.tpu_parts import dot

BUFFERS = 2  # Of rows and of outputs.


@dataclasses.dataclass(frozen=True)
class _Plan:
    """What the kernel's code depends on."""

    tile: TpuRowsTile
    num_columns: int
    transpose_rhs: bool
    activation: bool
    num_lhs: int
    num_rhs: int
    num_out: int
    quantised: bool

    @property
    def column_tiles(self) -> int:
        return -(-self.num_columns // self.tile.columns)

    def each_width(self, number: Any, act: Callable[[int], None]) -> None:
        """Calls `act` with the columns of a tile: the last one may have fewer than the others."""
        whole, rest = divmod(self.num_columns, self.tile.columns)
        if not rest:
            act(self.tile.columns)
        elif not whole:
            act(rest)
        else:
            pl.when(number < whole)(functools.partial(act, self.tile.columns))
            pl.when(number == whole)(functools.partial(act, rest))


def row_products(
    lhs: tuple[Array, ...],
    rhs: tuple[Array | BlockScaledWeights | LayerOfStack, ...],
    group_sizes_G: Array,
    group_offset: Array,
    *,
    transpose_rhs: bool = False,
    activation: bool = False,
    keep_products: bool = False,
    tile: TpuRowsTile | None = None,
    interpret: Any = False,
) -> tuple[Array, ...]:
    """Rows times their group's matrices: one product, two with SwiGLU, or the sum of two.

    The arguments are those of `portable.row_products`; `tile` None takes the table's sizes. All or
    none of `rhs` are of a stack, and then of one layer.
    """
    num_rows, dtype = lhs[0].shape[0], lhs[0].dtype
    num_groups = rhs[0].shape[0]
    first_group = rhs[0].layer * num_groups if isinstance(rhs[0], LayerOfStack) else jnp.int32(0)
    quantised = isinstance(rhs[0], BlockScaledWeights)
    depth, num_columns = lhs[0].shape[1], rhs[0].shape[1 if transpose_rhs else 2]
    lhs = tuple(pad_rows(x) for x in lhs)
    padded = lhs[0].shape[0]
    num_out = 3 if keep_products else 1
    tile = tile or tpu_rows_tile(
        padded,
        group_sizes_G.shape[0],
        (depth, num_columns),
        transpose_rhs=transpose_rhs,
        arrays=(len(lhs), len(rhs), num_out),
        itemsizes=(dtype.itemsize, rhs[0].dtype.itemsize),
    )
    plan = _Plan(
        tile=tile,
        num_columns=num_columns,
        transpose_rhs=transpose_rhs,
        activation=activation,
        num_lhs=len(lhs),
        num_rhs=len(rhs),
        num_out=num_out,
        quantised=quantised,
    )
    scalars = _scalars(plan, group_sizes_G, group_offset, num_groups, first_group, padded)

    values = tuple(map(_stored, rhs))
    columns = tile.columns
    slab = (columns, depth) if transpose_rhs else (depth, columns)
    weights = [pltpu.VMEM((tile.weight_buffers, *slab), x.dtype) for x in values]
    operands = [*lhs, *values]
    if quantised:
        scales = [_tile_scales(x.scales, plan) for x in rhs if isinstance(x, BlockScaledWeights)]
        operands += scales
        weights += [pltpu.VMEM((tile.weight_buffers, *x.shape[2:]), jnp.float32) for x in scales]
        weights += [pltpu.VMEM((1, *slab), dtype) for _ in values]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    outs = pl.pallas_call(
        functools.partial(_kernel, plan=plan),
        out_shape=(output_like(lhs[0], (padded, num_columns), dtype),) * num_out,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=len(scalars),
            grid=(plan.column_tiles,),
            in_specs=[anywhere] * len(operands),
            out_specs=(anywhere,) * num_out,
            scratch_shapes=[
                [pltpu.VMEM((BUFFERS, tile.rows, depth), dtype)] * len(lhs),
                weights,
                [pltpu.VMEM((BUFFERS, tile.rows, columns), dtype)] * num_out,
                [pltpu.VMEM((ALIGN, columns), dtype)] * num_out,
                pltpu.SMEM((BUFFERS,), jnp.int32),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
                pltpu.SemaphoreType.DMA((tile.weight_buffers,)),
                pltpu.SemaphoreType.DMA((BUFFERS,)),
            ],
        ),
        compiler_params=compiler_params(),
        cost_estimate=pl.CostEstimate(
            flops=2 * padded * depth * num_columns * len(rhs),
            bytes_accessed=sum(math.prod(x.shape) * x.dtype.itemsize for x in (*lhs, *rhs))
            + num_out * padded * num_columns * dtype.itemsize,
            transcendentals=padded * num_columns if activation else 0,
        ),
        interpret=interpret,
        name="grouped_swiglu" if activation else "grouped_matmul",
    )(*scalars, *operands)
    return tuple(x[:num_rows] for x in outs)


def _stored(rhs: Array | BlockScaledWeights | LayerOfStack) -> Array:
    """All matrices that lie with those wanted, one after the other."""
    if isinstance(rhs, LayerOfStack):
        assert not isinstance(rhs.stack, QuantisedWeights)
        return rhs.stack.reshape(-1, *rhs.shape[1:])
    return rhs.values if isinstance(rhs, BlockScaledWeights) else rhs


def _scalars(
    plan: _Plan,
    group_sizes_G: Array,
    group_offset: Array,
    num_groups: int,
    first_group: Array,
    num_rows: int,
) -> tuple[Array, ...]:
    """The windows, over the rows before the held groups, each group's, and those after.

    With them, for each window its range's number among the held groups that have rows (-1 before
    and after) and the weight buffer that is that number's; for each such number the place of its
    matrix; then how many of them there are.
    """
    starts_G, sizes_G = local_groups(group_sizes_G, group_offset, num_groups)
    end = starts_G[-1:] + sizes_G[-1:]
    zero = jnp.zeros_like(end)
    start_R = jnp.concatenate([zero, starts_G, end, jnp.full_like(end, num_rows)])
    windows = make_windows(start_R, plan.tile.rows, num_rows, empty_ranges=False)
    used_G = (sizes_G > 0).astype(jnp.int32)
    after_G = jnp.cumsum(used_G)
    used_R = jnp.concatenate([zero - 1, after_G - used_G, zero - 1]).astype(jnp.int32)
    number_G = jnp.arange(num_groups, dtype=jnp.int32)
    group_U = jnp.sum(after_G <= number_G[:, None], axis=1, dtype=jnp.int32)
    place_U = jnp.minimum(group_U, num_groups - 1) + first_group.astype(jnp.int32)
    used_W = used_R[windows.range_W]
    buffer_W = jnp.maximum(used_W, 0) % plan.tile.weight_buffers
    return *windows.scalars, used_W, buffer_W, place_U, after_G[-1:].astype(jnp.int32)


def _tile_scales(scales: Array, plan: _Plan) -> Array:
    """Scales by column tile, [column tiles, stored, ...]: those of one slab are one copy."""
    axis = 1 if plan.transpose_rhs else 2
    blocks = plan.tile.columns // SCALE_BLOCK
    missing = plan.column_tiles * blocks - scales.shape[axis]
    pads = [(0, missing if n == axis else 0) for n in range(3)]
    split = (*scales.shape[:axis], plan.column_tiles, blocks, *scales.shape[axis + 1 :])
    return jnp.moveaxis(jnp.pad(scales, pads).reshape(split), axis, 0)


def _kernel(
    count_ref: Any,
    range_ref: Any,
    base_ref: Any,
    low_ref: Any,
    high_ref: Any,
    bits_ref: Any,
    used_ref: Any,
    buffer_ref: Any,
    place_ref: Any,
    num_used_ref: Any,
    *refs: Any,
    plan: _Plan,
) -> None:
    del range_ref
    tile = plan.tile
    *arrays, lhs_refs, weight_refs, out_refs, carry_refs, stored_ref = refs[:-3]
    lhs_semaphores, weight_semaphores, out_semaphores = refs[-3:]
    num_scales = plan.num_rhs if plan.quantised else 0
    lhs_hbm = arrays[: plan.num_lhs]
    rhs_hbm = arrays[plan.num_lhs : plan.num_lhs + plan.num_rhs]
    scales_hbm = arrays[plan.num_lhs + plan.num_rhs :][:num_scales]
    out_hbm = arrays[-plan.num_out :]
    column_tile = pl.program_id(0)
    first_column = pl.multiple_of(column_tile * tile.columns, SCALE_BLOCK)
    num_windows, num_used = count_ref[0], num_used_ref[0]
    most_rows = min(tile.rows, lhs_hbm[0].shape[0])

    def copy_lhs(index: Any, *, wait: bool) -> None:
        """Rows of the held groups only."""
        slot, base = index & 1, pl.multiple_of(base_ref[index], ALIGN)
        num_rows = jnp.where(used_ref[index] >= 0, fetched(high_ref[index]), 0)
        for hbm, ref in zip(lhs_hbm, lhs_refs, strict=True):
            copy_rows(
                lambda first, size, hbm=hbm: hbm.at[pl.ds(base + first, size)],  # type: ignore[misc]
                lambda first, size, ref=ref: ref.at[slot, pl.ds(first, size)],  # type: ignore[misc]
                lhs_semaphores.at[slot],
                num_rows,
                most_rows,
                wait=wait,
            )

    def copy_weights(used: Any, slot: Any, *, wait: bool) -> None:
        """A group's columns of this tile, and their scales."""
        place, semaphore = place_ref[used], weight_semaphores.at[slot]

        def copy(source: Any, target: Any) -> None:
            transfer = pltpu.make_async_copy(source, target, semaphore)
            transfer.wait() if wait else transfer.start()

        def copy_width(width: int) -> None:
            part = pl.ds(first_column, width)
            for hbm, ref in zip(rhs_hbm, weight_refs[: plan.num_rhs], strict=True):
                if plan.transpose_rhs:
                    copy(hbm.at[place, part], ref.at[slot, pl.ds(0, width)])
                else:
                    copy(hbm.at[place, :, part], ref.at[slot, :, pl.ds(0, width)])

        plan.each_width(column_tile, copy_width)
        for hbm, ref in zip(scales_hbm, weight_refs[plan.num_rhs :], strict=False):
            copy(hbm.at[column_tile, place], ref.at[slot])

    def copy_out(base: Any, num_rows: Any, slot: Any, *, wait: bool) -> None:
        def copy_width(width: int) -> None:
            for hbm, ref in zip(out_hbm, out_refs, strict=True):
                copy_rows(
                    lambda first, size, ref=ref: ref.at[slot, pl.ds(first, size), pl.ds(0, width)],  # type: ignore[misc]
                    lambda first, size, hbm=hbm: hbm.at[  # type: ignore[misc]
                        pl.ds(base + first, size), pl.ds(first_column, width)
                    ],
                    out_semaphores.at[slot],
                    num_rows,
                    most_rows,
                    wait=wait,
                )

        plan.each_width(column_tile, copy_width)

    def await_out(slot: Any) -> None:
        copy_out(pl.multiple_of(0 * slot, ALIGN), stored_ref[slot], slot, wait=True)
        stored_ref[slot] = 0

    def widen(slot: Any) -> None:
        """Quantised weights times their scales."""
        scales = weight_refs[plan.num_rhs : 2 * plan.num_rhs]
        wide = weight_refs[2 * plan.num_rhs :]
        for narrow_ref, scale_ref, wide_ref in zip(weight_refs, scales, wide, strict=False):
            _, num_rows, num_columns = wide_ref.shape

            @pl.loop(0, num_rows // SCALE_BLOCK)
            def _block(
                block: Any, narrow_ref: Any = narrow_ref, scale_ref: Any = scale_ref,
                wide_ref: Any = wide_ref, num_columns: int = num_columns,
            ) -> None:  # fmt: skip
                here = pl.ds(pl.multiple_of(block * SCALE_BLOCK, SCALE_BLOCK), SCALE_BLOCK)
                scale_1N = scale_ref[slot, pl.ds(block, 1), :]
                for n in range(num_columns // SCALE_BLOCK):
                    part = slice(n * SCALE_BLOCK, (n + 1) * SCALE_BLOCK)
                    # Exact: bfloat16 holds every value of either type.
                    values = narrow_ref[slot, here, part].astype(jnp.bfloat16).astype(jnp.float32)
                    scale_11 = scale_1N[:, n : n + 1]
                    wide_ref[0, here, part] = (values * scale_11).astype(wide_ref.dtype)

    def multiply(first: Any, num_rows: int, slot: Any, weight_slot: Any) -> None:
        """Rows first .. first + num_rows - 1 of a window, by some of its columns at a time."""
        here = pl.ds(pl.multiple_of(first, ALIGN), num_rows)
        stored = weight_refs[2 * plan.num_rhs :] if plan.quantised else weight_refs

        def columns(start: Any, width: int) -> None:
            part = pl.ds(pl.multiple_of(start, SCALE_BLOCK), width)
            products = []
            for n, ref in enumerate(stored):
                lhs = lhs_refs[n % plan.num_lhs][slot, here]
                rhs = ref[weight_slot, part] if plan.transpose_rhs else ref[weight_slot, :, part]
                products.append(dot(lhs, rhs, transpose_rhs=plan.transpose_rhs))
            if plan.activation:
                results = [jax.nn.silu(products[0]) * products[1], *products]
            else:
                results = [functools.reduce(jnp.add, products)]
            for ref, result in zip(out_refs, results, strict=False):
                ref[slot, here, part] = result.astype(ref.dtype)

        whole, rest = divmod(tile.columns, tile.body_columns)
        if whole > 1:
            pl.loop(0, whole)(lambda n: columns(n * tile.body_columns, tile.body_columns))
        elif whole:
            columns(0, tile.body_columns)
        if rest:
            columns(whole * tile.body_columns, rest)

    def compute(high: Any, slot: Any, weight_slot: Any) -> None:
        """Large chunks, then small ones; a last chunk nearly as high as a large one is one."""
        large, small = tile.large, tile.small
        num_large = (high + (small - 1)) // large
        rest = jnp.maximum(high - num_large * large, 0)

        @pl.loop(0, num_large)
        def _large(chunk: Any) -> None:
            multiply(chunk * large, large, slot, weight_slot)

        if small < large:

            @pl.loop(0, (rest + (small - 1)) // small)
            def _small(chunk: Any) -> None:
                multiply(num_large * large + chunk * small, small, slot, weight_slot)

    def store(index: Any, slot: Any) -> None:
        """Takes over what earlier windows had of the first rows, and stores all whole blocks."""
        low, high = low_ref[index], high_ref[index]
        whole = high & -ALIGN
        tail = pl.ds(pl.multiple_of(jnp.minimum(whole, tile.rows - ALIGN), ALIGN), ALIGN)
        for out_ref, carry_ref in zip(out_refs, carry_refs, strict=True):

            @pl.when(low > 0)
            def _merge(out_ref: Any = out_ref, carry_ref: Any = carry_ref) -> None:
                row = jax.lax.broadcasted_iota(jnp.int32, (ALIGN, 1), 0)
                head = (out_ref[slot, :ALIGN], carry_ref[...])
                new, old = (x.astype(jnp.float32) for x in head)
                merged = jnp.where(row >= low, new, old)
                out_ref[slot, :ALIGN] = merged.astype(out_ref.dtype)

            @pl.when(whole < high)
            def _keep(out_ref: Any = out_ref, carry_ref: Any = carry_ref) -> None:
                carry_ref[...] = out_ref[slot, tail]

        stored_ref[slot] = whole
        copy_out(pl.multiple_of(base_ref[index], ALIGN), whole, slot, wait=False)

    for slot in range(BUFFERS):
        stored_ref[slot] = 0
    for used in range(tile.weight_buffers - 1):
        pl.when(used < num_used)(functools.partial(copy_weights, used, used, wait=False))
    copy_lhs(0, wait=False)

    @pl.loop(0, num_windows)
    def _window(index: Any) -> None:
        slot, used, buffer = index & 1, used_ref[index], buffer_ref[index]

        @pl.when(index + 1 < num_windows)
        def _next() -> None:
            copy_lhs(index + 1, wait=False)

        @pl.when((used >= 0) & ((bits_ref[index] & FIRST) != 0))
        def _weights() -> None:
            copy_weights(used, buffer, wait=True)
            ahead = used + (tile.weight_buffers - 1)

            @pl.when(ahead < num_used)
            def _ahead() -> None:
                free = jnp.where(buffer == 0, tile.weight_buffers, buffer) - 1
                copy_weights(ahead, free, wait=False)

            if plan.quantised:
                widen(buffer)

        await_out(slot)

        @pl.when(used >= 0)
        def _compute() -> None:
            copy_lhs(index, wait=True)
            compute(high_ref[index], slot, 0 if plan.quantised else buffer)

        @pl.when(used < 0)
        def _zero() -> None:
            for ref in out_refs:

                @pl.loop(0, tile.rows // ALIGN)
                def _block(n: Any, ref: Any = ref) -> None:
                    here = pl.ds(pl.multiple_of(n * ALIGN, ALIGN), ALIGN)
                    ref[slot, here] = jnp.zeros((ALIGN, tile.columns), ref.dtype)

        store(index, slot)

    for slot in range(BUFFERS):
        await_out(slot)
