"""The weights' gradients on Hopper: for each group, its rows of lhs^T times those of d_out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.chips import num_sms
from pallas_kernels.grouped_matmul.groups import local_groups
from pallas_kernels.grouped_matmul.limits import HOPPER_LANES as LANE
from pallas_kernels.grouped_matmul.tiles import HopperTile, hopper_weight_gradient_tile
from pallas_kernels.hopper_parts import LANE_COMPILER_PARAMS, tiled_smem
from pallas_kernels.hopper_schedule import (
    Tickets,
    for_tiles,
    give_registers,
    largest_first,
    load_tiles,
    raster,
)
from pallas_kernels.manual_axes import vary_like

COMPUTE_WARPGROUPS = 2


def _zero_rows(ref: Any, first: Array, end: Array) -> None:
    """Zeroes the rows outside [first, end) of a block of LANE rows."""
    for column in range(0, ref.shape[1], LANE):
        block = ref.at[:, pl.ds(column, LANE)]
        row = plgpu.broadcasted_iota(jnp.int32, (LANE, LANE), 0, layout=plgpu.Layout.WGMMA)
        block[...] = jnp.where((row >= first) & (row < end), block[...], jnp.bfloat16(0))


def weight_gradient(
    lhs_MK: Array,
    d_out_MN: Array,
    group_sizes_G: Array,
    group_offset: Array,
    num_groups: int,
    *,
    tile: HopperTile | None = None,
    num_ctas: int | None = None,
) -> Array:
    """Sums lhs^T d_out over the rows of each held group.

    The arguments are those of `reference.weight_gradient`; `tile` None takes the table's sizes, and
    `num_ctas` None one block per multiprocessor.

    A group's rows are the contraction. Blocks of 64 rows start at multiples of 8, so only a group's
    first and last block can hold rows of others. There lhs is zeroed in shared memory. d_out is too
    where such rows belong to no held group, as they may hold anything. Between held groups it is
    not: a row of d_out that is not finite reaches the group beside its own.
    """
    if pad := -lhs_MK.shape[0] % 8:
        lhs_MK, d_out_MN = (jnp.pad(array, ((0, pad), (0, 0))) for array in (lhs_MK, d_out_MN))
    num_k, num_n = lhs_MK.shape[1], d_out_MN.shape[1]
    tile = tile or hopper_weight_gradient_tile(num_k, num_n)
    num_ctas = num_ctas or num_sms()
    block_m, block_n, stages = tile.block_m, tile.block_n, tile.stages
    wg_m = block_m // COMPUTE_WARPGROUPS
    num_blocks = wg_m // 64 * (block_n // LANE)
    rows, columns = pl.cdiv(num_k, block_m), pl.cdiv(num_n, block_n)
    dtype = jnp.bfloat16
    start_G, size_G = local_groups(group_sizes_G, group_offset, num_groups)
    order_G = largest_first(size_G)

    def body(start_ref, size_ref, order_ref, lhs_ref, d_out_ref, out_ref, *scratch):
        lhs_smem, d_out_smem, out_smem, loaded, free, zeroed, *of_tickets = scratch
        numbers = Tickets(*of_tickets)
        wg = lax.axis_index("wg")
        total = num_groups * rows * columns
        held_start = start_ref[0]
        held_end = start_ref[num_groups - 1] + size_ref[num_groups - 1]

        def locate(number):
            """Where a tile lies; a number beyond the last gets the last one's place."""
            linear = jnp.minimum(number, total - 1)
            group = order_ref[lax.div(linear, rows * columns)]
            m, n = raster(lax.rem(linear, rows * columns), rows, columns, tile.band)
            start, size = start_ref[group], size_ref[group]
            base = lax.div(start, 8) * 8
            steps = jnp.where(size > 0, lax.div(start - base + size + LANE - 1, LANE), 0)
            return number, group, m, n, base, start - base, start - base + size, steps

        def row_of(base, k, steps):
            """First row of a step. A group's last block of rows, then its first, come at the end.

            Only those can hold rows of others. Zeroing them takes place while the steps before run.
            """
            return base + lax.rem(k + 1, steps) * LANE

        @pl.when(wg == COMPUTE_WARPGROUPS)
        def _load() -> None:
            give_registers(40, "decrease", COMPUTE_WARPGROUPS)

            def load(place, step):
                _, _, m, n, base, _, _, steps = place

                def load_step(k, step):
                    slot = lax.rem(step, stages)
                    pl.when(step >= stages)(lambda: plgpu.barrier_wait(free.at[slot]))
                    row = pl.ds(pl.multiple_of(row_of(base, k, steps), 8), LANE)
                    for ref, smem, column in (
                        (lhs_ref, lhs_smem, pl.ds(m * block_m, block_m)),
                        (d_out_ref, d_out_smem, pl.ds(n * block_n, block_n)),
                    ):
                        plgpu.copy_gmem_to_smem(ref.at[row, column], smem.at[slot], loaded.at[slot])
                    return step + 1

                return lax.fori_loop(0, steps, load_step, step)

            load_tiles(numbers, total, locate, load)

        @pl.when(wg < COMPUTE_WARPGROUPS)
        def _compute() -> None:
            give_registers(232, "increase", COMPUTE_WARPGROUPS)

            def multiply(index, place, step, pending, acc):
                _, _, _, _, base, first, end, steps = place

                def issue(k, step, may_be_shared=False):
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(loaded.at[slot])
                    a = lhs_smem.at[slot, :, pl.ds(wg * wg_m, wg_m)]
                    b = d_out_smem.at[slot]
                    if may_be_shared:
                        row = row_of(base, k, steps)
                        low, high = first + base - row, end + base - row

                        @pl.when((low > 0) | (high < LANE))
                        def _() -> None:
                            # Each warpgroup has its own rows of lhs^T.
                            _zero_rows(a, low, high)
                            plgpu.commit_smem()

                        # A row of no held group may hold anything, and 0 * nan is nan.
                        @pl.when((row < held_start) | (row + LANE > held_end))
                        def _() -> None:
                            half = block_n // COMPUTE_WARPGROUPS
                            _zero_rows(b.at[:, pl.ds(wg * half, half)], low, high)
                            plgpu.commit_smem()
                            plgpu.barrier_arrive(zeroed)
                            plgpu.barrier_wait(zeroed)

                    plgpu.wgmma(acc, a.transpose((1, 0)), b)
                    return step + 1

                def release(step):
                    """Gives back a step's stage, when there is such a step."""
                    pl.when(step >= first_step)(
                        lambda: plgpu.barrier_arrive(free.at[lax.rem(step, stages)])
                    )

                def k_step(k, step, may_be_shared=False):
                    issue(k, step, may_be_shared)
                    # The step before has been read; this one may still run.
                    plgpu.wgmma_wait(1)
                    release(step - 1)
                    return step + 1

                first_step = step
                own = jnp.maximum(steps - 2, 0)
                ahead = jnp.minimum(own, 1)
                step = lax.fori_loop(0, ahead, issue, step)
                next_place = locate(numbers.read(index + 1))
                # The tile before leaves the registers, one block after each of the first steps:
                # all at once they would keep those steps' stages from the loads.
                for block in range(num_blocks):
                    before, ahead = ahead, jnp.minimum(own, block + 2)
                    step = lax.fori_loop(before, ahead, issue, step)
                    store(block, *pending)
                    plgpu.wgmma_wait(1)
                    pl.when(ahead > before)(functools.partial(release, step - 2))
                step = lax.fori_loop(ahead, own, k_step, step)
                masked_step = functools.partial(k_step, may_be_shared=True)
                step = lax.fori_loop(own, steps, masked_step, step)
                plgpu.wgmma_wait(0)
                release(step - 1)
                return next_place, step, acc[...]

            def store(block, value, next_group, m, n):
                """A block of a tile's results from registers to memory.

                next_group is one more than the group; 0 before the first tile.
                """
                i, j = divmod(block, block_n // LANE)
                # The copy before the last has left this slot.
                plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                slot = out_smem.at[wg, block % 2]
                slot[...] = value[i * 64 : (i + 1) * 64, j * LANE : (j + 1) * LANE]
                plgpu.commit_smem()
                row = m * block_m + wg * wg_m + i * 64
                column = n * block_n + j * LANE
                copy = functools.partial(
                    plgpu.copy_smem_to_gmem,
                    slot,
                    out_ref.at[next_group - 1, pl.ds(row, 64), pl.ds(column, LANE)],
                    commit_group=False,
                )
                pl.when((row < num_k) & (column < num_n) & (next_group > 0))(copy)
                plgpu.commit_smem_to_gmem_group()

            def compute_tile(index, place, step, pending):
                _, group, m, n, *_ = place
                next_place, step, value = pl.run_scoped(
                    lambda acc: multiply(index, place, step, pending, acc),
                    plgpu.ACC((wg_m, block_n), jnp.float32),
                )
                return next_place, step, (value.astype(dtype), group + 1, m, n)

            nothing = plgpu.layout_cast(jnp.zeros((wg_m, block_n), dtype), plgpu.Layout.WGMMA)
            zero = jnp.int32(0)
            pending = (nothing, zero, zero, zero)
            _, pending = for_tiles(numbers, total, locate, compute_tile, zero, pending)
            for block in range(num_blocks):
                store(block, *pending)
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_groups, num_k, num_n), dtype),
        grid=(num_ctas,),
        grid_names=("sm",),
        num_threads=COMPUTE_WARPGROUPS + 1,
        thread_name="wg",
        scratch_types=[
            tiled_smem((stages, LANE, block_m), dtype),
            tiled_smem((stages, LANE, block_n), dtype),
            tiled_smem((COMPUTE_WARPGROUPS, 2, 64, LANE), dtype),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS, num_barriers=stages),
            plgpu.Barrier(num_arrivals=COMPUTE_WARPGROUPS),
            *Tickets.scratch(COMPUTE_WARPGROUPS + 1),
        ],
        compiler_params=LANE_COMPILER_PARAMS,
    )
    d_rhs_GKN = kernel(start_G, size_G, order_G, lhs_MK, d_out_MN)
    return vary_like(d_rhs_GKN, lhs_MK)
