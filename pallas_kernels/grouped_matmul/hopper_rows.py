"""Rows times their group's weights on Hopper: products, SwiGLU, and the rows' gradients."""

import functools
import itertools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import num_sms
from pallas_kernels.grouped_matmul.limits import HOPPER_LANES as LANE
from pallas_kernels.grouped_matmul.stacks import LayerOfStack
from pallas_kernels.grouped_matmul.tiles import HopperTile, hopper_rows_tile
from pallas_kernels.hopper_parts import LANE_COMPILER_PARAMS, row_views_smem, tiled_smem
from pallas_kernels.hopper_row_ranges import RowRanges, running_sums, store_rows
from pallas_kernels.hopper_schedule import Tickets, Turns, for_tiles, give_registers, load_tiles
from pallas_kernels.manual_axes import vary_like
from pallas_kernels.quantised import SCALE_BLOCK, BlockScaledWeights


def _values(rhs: Array | BlockScaledWeights | LayerOfStack) -> Array:
    """The matrices that the kernel reads, with one dim of groups."""
    if isinstance(rhs, LayerOfStack):
        assert isinstance(rhs.stack, Array)
        return rhs.stack.reshape(-1, *rhs.shape[1:])
    return rhs.values if isinstance(rhs, BlockScaledWeights) else rhs


def row_products(
    lhs: Sequence[Array],
    rhs: Sequence[Array | BlockScaledWeights | LayerOfStack],
    group_sizes_G: Array,
    group_offset: Array,
    *,
    transpose_rhs: bool = False,
    activation: bool = False,
    keep_products: bool = False,
    tile: HopperTile | None = None,
    num_ctas: int | None = None,
) -> tuple[Array, ...]:
    """Rows times their group's matrices: one product, two with SwiGLU, or the sum of two.

    The arguments are those of `portable.row_products`; `tile` None takes the table's sizes, and
    `num_ctas` None one block per multiprocessor. Quantised weights are widened to bfloat16 in
    shared memory, stage by stage; a layer of a stack is read where it lies.
    """
    num_rows, num_k = lhs[0].shape
    num_groups = rhs[0].shape[0]
    # Of a stack all layers' groups are one dim, and the kernel is told where the layer's begin.
    stacks = [array for array in rhs if isinstance(array, LayerOfStack)]
    layers = [jnp.asarray(stack.layer, jnp.int32)[None] for stack in stacks[:1]]
    num_n = rhs[0].shape[1 if transpose_rhs else 2]
    scales = [array.scales for array in rhs if isinstance(array, BlockScaledWeights)]
    values = [_values(array) for array in rhs]
    if tile is None:
        tile = hopper_rows_tile(num_rows, num_groups, num_n, activation, bool(scales))
    num_ctas = num_ctas or num_sms()
    block_m, block_n, stages = tile.block_m, tile.block_n, tile.stages
    num_products = 2 if activation else 1
    num_outs = 3 if keep_products else 1
    k_steps, columns = num_k // LANE, pl.cdiv(num_n, block_n)
    sums = running_sums(group_sizes_G, group_offset, num_groups, block_m)
    # Two warpgroups share the rows of a tile; of a low one (wgmma takes 64 rows) the columns; a
    # low tile of 64 columns has one warpgroup.
    if block_m >= 128:
        compute_wgs, wg_m, wg_n = 2, block_m // 2, block_n
    else:
        compute_wgs = block_n // LANE if scales else 2 if block_n >= 2 * LANE else 1
        wg_m, wg_n = 64, block_n // compute_wgs
    # A tile of fewer than 64 rows is multiplied with what follows it in memory, and not stored.
    lhs_rows = stages * block_m + max(0, wg_m - block_m)
    full = min(block_m, 64)
    dtype = jnp.bfloat16
    # The first result leaves while the next tile multiplies; SwiGLU's products, where they are
    # kept, at once: with them held back there would be too few registers.
    blocks = list(itertools.product(range(num_outs), range(wg_m // 64), range(wg_n // LANE)))
    held, at_once = ([block for block in blocks if (block[0] > 0) == now] for now in (False, True))
    # Copies under way from the two slots of a warpgroup, while a third block is put together.
    in_flight = 1 - len(blocks) % 2
    slots = 1 + in_flight

    def body(start_ref, tiles_ref, *refs):
        lhs_refs, refs = refs[: len(lhs)], refs[len(lhs) :]
        rhs_refs, refs = refs[: len(rhs)], refs[len(rhs) :]
        scale_refs, refs = refs[: len(scales)], refs[len(scales) :]
        layer_refs, refs = refs[: len(layers)], refs[len(layers) :]
        out_refs, refs = refs[:num_outs], refs[num_outs:]
        (lhs_pieces, lhs_plain), rhs_smem, (out_pieces, out_plain), loaded, free, *rest = refs
        wide, of_tickets = rest[: bool(scales)], rest[bool(scales) :]
        wg = lax.axis_index("wg")
        ranges = RowRanges(start_ref, tiles_ref, num_rows, block_m, columns)
        total = ranges.num_tiles
        numbers = Tickets(*of_tickets) if tile.tickets else Turns(num_ctas)

        def locate(number):
            return ranges.locate(number, tile.band, k_steps * len(lhs))

        @pl.when(wg == compute_wgs)
        def _load() -> None:
            give_registers(40, "decrease", compute_wgs)
            before = sum(ref[0] for ref in layer_refs) * num_groups  # groups of the layers before

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
                        rhs_refs[pair + product].at[before + group, *window],
                        rhs_smem.at[product, slot],
                        loaded.at[slot],
                    )
                return step + 1

            def load(place, step):
                for pair in range(len(lhs)):
                    step = lax.fori_loop(
                        0,
                        lax.div(place[-1], len(lhs)),
                        lambda k, step, pair=pair: load_step(k, step, place, pair),
                        step,
                    )
                return step

            load_tiles(numbers, total, locate, load)

        @pl.when(wg < compute_wgs)
        def _compute() -> None:
            give_registers(232, "increase", compute_wgs)
            wg_row, wg_column = (wg * wg_m, 0) if block_m >= 128 else (0, wg * wg_n)

            def skip_step(_, step):
                slot = lax.rem(step, stages)
                plgpu.barrier_wait(loaded.at[slot])
                plgpu.barrier_arrive(free.at[slot])
                return step + 1

            def scales_of(k, group, n):
                """The scales of a step's weights: a load that is asked for one step ahead."""
                row = jnp.minimum(lax.div(k, SCALE_BLOCK // LANE), pl.cdiv(num_k, SCALE_BLOCK) - 1)
                column = lax.div(n * block_n + wg_column, SCALE_BLOCK)
                column = jnp.minimum(column, pl.cdiv(num_n, SCALE_BLOCK) - 1)
                return tuple(scale_ref[group, row, column] for scale_ref in scale_refs)

            def dequantise(step, scales_now):
                """Widens this warpgroup's columns of a stage.

                Into one of three buffers: a warp may still multiply from the step before, and one
                that has not passed this step's barrier from the step before that.
                """
                columns = pl.ds(wg_column, wg_n)
                for product, scale in enumerate(scales_now):
                    narrow = rhs_smem.at[product, lax.rem(step, stages), :, columns]
                    widened = wide[0].at[product, lax.rem(step, 3), :, columns]
                    weights = plgpu.load(narrow, layout=plgpu.Layout.WGMMA_UPCAST_2X)
                    # float8 widens to float16 in one instruction, int8 to bfloat16; both exactly.
                    exact = jnp.bfloat16 if weights.dtype == jnp.int8 else jnp.float16
                    weights = weights.astype(exact).astype(jnp.float32) * scale
                    widened[...] = weights.astype(jnp.bfloat16)
                plgpu.commit_smem()

            def store(block, values, row, valid, n):
                """A block of a tile's results from registers to memory."""
                which, i, j = block
                # The copy before the last has left this slot.
                plgpu.wait_smem_to_gmem(in_flight, wait_read_only=True)
                slot = blocks.index(block) % slots
                value = values[which][i * 64 : (i + 1) * 64, j * LANE : (j + 1) * LANE]
                out_pieces[wg, slot] = value
                first = wg_row + i * 64
                column = lax.div(n * block_n + wg_column, LANE) + j
                store_rows(
                    out_pieces.at[wg, slot],
                    out_plain.at[wg, slot],
                    out_refs[which].at[:, column],
                    row + first,
                    jnp.where(column < num_n // LANE, valid - first, 0),
                    full,
                )

            def multiply(index, place, step, steps, pending, *accs):
                _, group, _, _, n, _ = place

                def issue(k, state):
                    step, *scales_now = state
                    scales_next = scales_of(k + 1, group, n)
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(loaded.at[slot])
                    if scales:
                        dequantise(step, scales_now)
                    a = lhs_pieces.at[pl.ds(slot * block_m + wg_row, wg_m)]
                    for product, acc in enumerate(accs):
                        if scales:
                            b = wide[0].at[product, lax.rem(step, 3), :, pl.ds(wg_column, wg_n)]
                        elif transpose_rhs:
                            b = rhs_smem.at[product, slot, pl.ds(wg_column, wg_n)].transpose((1, 0))
                        else:
                            b = rhs_smem.at[product, slot, :, pl.ds(wg_column, wg_n)]
                        plgpu.wgmma(acc, a, b)
                    return step + 1, *scales_next

                def release(step):
                    """Gives back a step's stage, when there is such a step."""
                    pl.when(step >= first_step)(
                        lambda: plgpu.barrier_arrive(free.at[lax.rem(step, stages)])
                    )

                def k_step(k, state):
                    following = issue(k, state)
                    # The step before has been read; this one may still run.
                    plgpu.wgmma_wait(num_products)
                    release(state[0] - 1)
                    return following

                first_step = step
                ahead = jnp.minimum(steps, 1)
                state = lax.fori_loop(0, ahead, issue, (step, *scales_of(0, group, n)))
                next_place = locate(numbers.read(index + 1))
                # The tile before leaves the registers, one block after each of the first steps:
                # all at once they would keep those steps' stages from the loads.
                for block in held:
                    before, ahead = ahead, jnp.minimum(steps, ahead + 1)
                    state = lax.fori_loop(before, ahead, issue, state)
                    store(block, *pending)
                    plgpu.wgmma_wait(num_products)
                    pl.when(ahead > before)(functools.partial(release, state[0] - 2))
                step, *_ = lax.fori_loop(ahead, steps, k_step, state)
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
                values = tuple(value.astype(dtype) for value in values)
                for block in at_once:
                    store(block, values, row, valid, n)
                return next_place, step, (values[:1], row, valid, n)

            nothing = plgpu.layout_cast(jnp.zeros((wg_m, wg_n), dtype), plgpu.Layout.WGMMA)
            pending = ((nothing,), *[jnp.int32(0)] * 3)
            _, pending = for_tiles(numbers, total, locate, compute_tile, jnp.int32(0), pending)
            for block in held:
                store(block, *pending)
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
            row_views_smem((lhs_rows, LANE), dtype),
            tiled_smem(
                (num_products, stages, *rhs_block), values[0].dtype, swizzle=64 if scales else 128
            ),
            row_views_smem((compute_wgs, slots, 64, LANE), dtype),
            plgpu.Barrier(num_arrivals=1 + num_products, num_barriers=stages),
            plgpu.Barrier(num_arrivals=compute_wgs, num_barriers=stages),
            *[tiled_smem((num_products, 3, *rhs_block), dtype)] * bool(scales),
            *(Tickets if tile.tickets else Turns).scratch(compute_wgs + 1),
        ],
        compiler_params=LANE_COMPILER_PARAMS,
    )
    views = [array.reshape(num_rows, k_steps, LANE) for array in lhs]
    outs = kernel(*sums, *views, *values, *scales, *layers)
    return tuple(vary_like(out.reshape(num_rows, num_n), lhs[0]) for out in outs)
