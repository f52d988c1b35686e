"""The weights' gradients on Hopper: for each group, its rows of lhs^T times those of d_out."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels.grouped_matmul.groups import local_groups
from pallas_kernels.grouped_matmul.hopper_blocks import (
    COMPILER_PARAMS,
    LANE,
    PIECES,
    give_registers,
    raster,
    vary_like,
)
from pallas_kernels.grouped_matmul.tiles import (
    HopperTile,
    num_multiprocessors,
    weight_gradient_tile,
)

COMPUTE_WARPGROUPS = 2


def _deal(index: Array | int, num_ctas: int) -> Array:
    """This block's tile of a round, when odd rounds go through the blocks backwards."""
    block = lax.axis_index("sm")
    backwards = lax.rem(jnp.int32(index), jnp.int32(2)) == 1
    return index * num_ctas + jnp.where(backwards, num_ctas - 1 - block, block)


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


def weight_gradient_kernel(
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
    others; there lhs is zeroed in shared memory. d_out is too where such rows belong to no held
    group and may hold anything; between groups, one that is not finite reaches its neighbour.
    """
    if pad := -lhs_MK.shape[0] % 8:
        lhs_MK, d_out_MN = (jnp.pad(array, ((0, pad), (0, 0))) for array in (lhs_MK, d_out_MN))
    num_k, num_n = lhs_MK.shape[1], d_out_MN.shape[1]
    tile = tile or weight_gradient_tile(num_k)
    num_ctas = num_ctas or num_multiprocessors()
    block_m, block_n, stages = tile.block_m, tile.block_n, tile.stages
    wg_m = block_m // COMPUTE_WARPGROUPS
    rows, columns = pl.cdiv(num_k, block_m), pl.cdiv(num_n, block_n)
    dtype = jnp.bfloat16
    start_G, size_G = local_groups(group_sizes_G, group_offset, num_groups)
    order_G = _largest_first(size_G)

    def body(start_ref, size_ref, order_ref, lhs_ref, d_out_ref, out_ref, *scratch):
        lhs_smem, d_out_smem, out_smem, loaded, free, zeroed = scratch
        wg = lax.axis_index("wg")
        total = num_groups * rows * columns
        held_start = start_ref[0]
        held_end = start_ref[num_groups - 1] + size_ref[num_groups - 1]

        # Dealt out there and back, the block that had the larger tile of one round has the smaller
        # of the next.
        rounds = total // num_ctas
        my_tiles = rounds + (_deal(rounds, num_ctas) < total).astype(jnp.int32)

        def locate(index):
            linear = _deal(index, num_ctas)
            group = order_ref[lax.div(linear, rows * columns)]
            m, n = raster(lax.rem(linear, rows * columns), rows, columns, tile.band)
            start, size = start_ref[group], size_ref[group]
            base = lax.div(start, 8) * 8
            steps = jnp.where(size > 0, lax.div(start - base + size + LANE - 1, LANE), 0)
            return group, m, n, base, start - base, start - base + size, steps

        @pl.when(wg == COMPUTE_WARPGROUPS)
        def _load() -> None:
            give_registers(40, "decrease", COMPUTE_WARPGROUPS)

            def load_tile(index, step):
                _, m, n, base, _, _, steps = locate(index)

                def load_step(k, step):
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
            give_registers(232, "increase", COMPUTE_WARPGROUPS)

            def multiply(step, steps, base, first, end, pending, acc):
                def k_step(k, step, may_be_shared=True, release=True):
                    slot = lax.rem(step, stages)
                    plgpu.barrier_wait(loaded.at[slot])
                    a = lhs_smem.at[slot, :, pl.ds(wg * wg_m, wg_m)]
                    b = d_out_smem.at[slot]
                    if may_be_shared:
                        low, high = first - k * LANE, end - k * LANE

                        @pl.when((low > 0) | (high < LANE))
                        def _() -> None:
                            # Each warpgroup has its own rows of lhs^T.
                            _zero_rows(a, low, high)
                            plgpu.commit_smem()

                        # A row of no held group may hold anything, and 0 * nan is nan.
                        row = base + k * LANE

                        @pl.when((row < held_start) | (row + LANE > held_end))
                        def _() -> None:
                            half = block_n // COMPUTE_WARPGROUPS
                            _zero_rows(b.at[:, pl.ds(wg * half, half)], low, high)
                            plgpu.commit_smem()
                            plgpu.barrier_arrive(zeroed)
                            plgpu.barrier_wait(zeroed)

                    plgpu.wgmma(acc, a.transpose((1, 0)), b)
                    if release:
                        plgpu.wgmma_wait(1)
                        plgpu.barrier_arrive(free.at[lax.rem(step - 1, stages)])
                    return step + 1

                # While the first step multiplies, the tile before leaves the registers.
                first_step = functools.partial(k_step, release=False)
                step = lax.fori_loop(0, jnp.minimum(steps, 1), first_step, step)
                store(*pending)
                last = jnp.maximum(steps - 1, 1)
                own_step = functools.partial(k_step, may_be_shared=False)
                step = lax.fori_loop(1, last, own_step, step)
                step = lax.fori_loop(last, steps, k_step, step)
                plgpu.wgmma_wait(0)
                pl.when(steps > 0)(lambda: plgpu.barrier_arrive(free.at[lax.rem(step - 1, stages)]))
                return acc[...]

            def store(value, next_group, m, n):
                """A tile's results from registers to memory; next_group is 0 before the first."""
                blocks = [(i, j) for i in range(wg_m // 64) for j in range(block_n // LANE)]
                for count, (i, j) in enumerate(blocks):
                    slot = count % 2
                    # The copy before the last has left this slot.
                    plgpu.wait_smem_to_gmem(1, wait_read_only=True)
                    block = value[i * 64 : (i + 1) * 64, j * LANE : (j + 1) * LANE]
                    out_smem[wg, slot] = block
                    plgpu.commit_smem()
                    row = m * block_m + wg * wg_m + i * 64
                    column = n * block_n + j * LANE
                    copy = functools.partial(
                        plgpu.copy_smem_to_gmem,
                        out_smem.at[wg, slot],
                        out_ref.at[next_group - 1, pl.ds(row, 64), pl.ds(column, LANE)],
                        commit_group=False,
                    )
                    pl.when((row < num_k) & (column < num_n) & (next_group > 0))(copy)
                    plgpu.commit_smem_to_gmem_group()

            def compute_tile(index, carry):
                step, pending = carry
                group, m, n, base, first, end, steps = locate(index)
                value = pl.run_scoped(
                    lambda acc: multiply(step, steps, base, first, end, pending, acc),
                    plgpu.ACC((wg_m, block_n), jnp.float32),
                )
                return step + steps, (value.astype(dtype), group + 1, m, n)

            nothing = plgpu.layout_cast(jnp.zeros((wg_m, block_n), dtype), plgpu.Layout.WGMMA)
            zero = jnp.int32(0)
            _, pending = lax.fori_loop(
                0, my_tiles, compute_tile, (zero, (nothing, zero, zero, zero))
            )
            store(*pending)
            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((num_groups, num_k, num_n), dtype),
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
    d_rhs_GKN = kernel(start_G, size_G, order_G, lhs_MK, d_out_MN)
    return vary_like(d_rhs_GKN, lhs_MK)
