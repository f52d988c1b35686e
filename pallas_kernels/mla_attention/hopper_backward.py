"""Backward kernel of latent attention for Hopper: all five gradients in one pass over the scores.

A block owns 128 keys of one head, 64 for each of two computing warpgroups. Their gradients stay in
registers while the queries that see these keys go by, 64 at a time. Scores are computed transposed
(keys by queries), so that the weights and the scores' gradient feed the products for the values
and the keys from registers.

The queries' gradient needs the keys of both warpgroups. So the scores' gradient is exchanged
through shared memory, each warpgroup multiplies half of the columns, and a warp of the third
warpgroup adds the result to float32 in device memory. It waits on a counter of each query block, so
that the key blocks are added in their order: all sums are the same in every run.

Registers are the limit: 160 of the 240 that a thread may have hold the keys' and values' gradients.
If the compiler runs out it makes the products wait for each other, at half of the speed. After any
change of the computing part, look for "serialized" in its report (MOSAIC_GPU_DUMP_PTXAS=1).

A block waits only for blocks with a smaller number, which the hardware starts earlier.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.hopper_parts import MATRIX, PER_COLUMN, PER_ROW, finish, tiled_smem
from pallas_kernels.mla_attention.arguments import Inputs, Masks
from pallas_kernels.mla_attention.hopper_ranges import KeyRanges
from pallas_kernels.mla_attention.tiles import HopperBackwardTile
from pallas_kernels.softmax import LOG2E

SIZE = 64  # Keys of a warpgroup, and queries of a step: rows and columns of its scores.
NUM_COMPUTE = 2
BLOCK_K = NUM_COMPUTE * SIZE


def differentiate(
    inputs: Inputs,
    masks: Masks,
    ranges: tuple[KeyRanges, KeyRanges] | None,
    d_out_BTHV: Array,
    lse_BHT: Array,
    delta_BHT: Array,
    *,
    scale: float,
    causal: bool,
    tile: HopperBackwardTile,
) -> tuple[Array, Array, Array, Array]:
    """Returns gradients of queries (float32, unscaled), keys, rotary keys of each head, and values.

    Args:
        inputs: As in `mla_attention`, T a multiple of 64 and S of 128.
        masks: As in `mla_attention`, int32.
        ranges: Of `key_ranges`, for blocks of 64 queries and 128 keys; None if each query sees all
          keys or, when `causal`, all up to its own position.
        d_out_BTHV: Gradient of the output.
        lse_BHT: float32 log-sum-exp in base 2, +inf where a query sees no key or is padding.
        delta_BHT: float32 product of the output and its gradient, summed over the values' dim.
        scale: Factor on the scores.
        causal: Whether keys after a query's position are hidden.
        tile: Sizes.
    """
    B, T, H, N = inputs.q_nope_BTHN.shape
    S, R, V = inputs.k_nope_BSHN.shape[1], inputs.q_rope_BTHR.shape[3], inputs.v_BSHV.shape[3]
    K = N + R
    dtype = inputs.q_nope_BTHN.dtype
    f32 = jnp.float32
    stages = tile.stages
    num_q, num_k = T // SIZE, S // BLOCK_K
    group = math.gcd(tile.heads_per_group, B * H)
    half = K // NUM_COMPUTE  # Columns of the queries' gradient that a warpgroup computes.
    log2_scale = scale * LOG2E
    with_ids = masks.q_segment_ids_BT is not None
    rows = (d_out_BTHV, lse_BHT, delta_BHT)
    operands, operand_tree = jax.tree.flatten((inputs, masks, ranges, rows))
    tile_shape = (SIZE, SIZE)

    def kernel(refs: Sequence[Any], scratch: Sequence[Any]) -> None:
        *input_refs, dq_ref, dk_nope_ref, dk_rope_ref, dv_ref = refs
        main_refs, mask_refs, range_refs, row_refs = jax.tree.unflatten(operand_tree, input_refs)
        q_nope_ref, q_rope_ref, k_nope_ref, k_rope_ref, v_ref = main_refs
        q_ids_ref, k_ids_ref, offset_ref = mask_refs
        d_out_ref, lse_ref, delta_ref = row_refs
        k_smem, v_smem, q_nope_smem, q_rope_smem, d_out_smem, d_scores_smem = scratch[:6]
        dq_smem, rows_smem, ids_smem = scratch[6:9]
        kv_ready, q_ready, d_out_ready, q_free, d_out_free = scratch[9:14]
        d_scores_ready, d_scores_free, dq_ready, dq_free = scratch[14:]
        num_added = pl.get_global(plgpu.SemaphoreType.REGULAR((B * H * num_q,)))

        # Early key blocks, seen by most queries, first; a few heads at a time, so that the key
        # blocks of a head, one step apart, find its queries in the cache.
        block = lax.axis_index("tile")
        j = lax.rem(lax.div(block, group), num_k)
        head = lax.div(block, group * num_k) * group + lax.rem(block, group)
        h, b = lax.rem(head, H), lax.div(head, H)
        if range_refs is not None:
            of_queries, of_keys = range_refs
            start, stop = of_keys.start_BI[b, j], of_keys.stop_BI[b, j]
        else:
            start = jnp.minimum(j * (BLOCK_K // SIZE), num_q) if causal else 0
            stop = jnp.int32(num_q)
        num_steps = stop - start

        def load() -> None:
            # Both parts of a key side by side, as the products need them: a copy takes 8 keys, for
            # which the parts are contiguous in shared memory.
            for row in range(0, BLOCK_K, 8):
                source, target = pl.ds(j * BLOCK_K + row, 8), slice(row, row + 8)
                k_nope_target, k_rope_target = k_smem.at[target, 0:N], k_smem.at[target, N:K]
                plgpu.copy_gmem_to_smem(k_nope_ref.at[b, source, h], k_nope_target, kv_ready)
                plgpu.copy_gmem_to_smem(k_rope_ref.at[b, source], k_rope_target, kv_ready)
            keys = pl.ds(j * BLOCK_K, BLOCK_K)
            plgpu.copy_gmem_to_smem(v_ref.at[b, keys, h], v_smem, kv_ready)
            if with_ids:
                plgpu.copy_gmem_to_smem(k_ids_ref.at[b, keys], ids_smem.at[0:BLOCK_K], kv_ready)

            @pl.loop(0, num_steps)
            def _(step: Array) -> None:
                slot = lax.rem(step, stages)
                rows = pl.ds((stop - 1 - step) * SIZE, SIZE)
                q_copies = [
                    (q_nope_ref.at[b, rows, h], q_nope_smem.at[slot]),
                    (q_rope_ref.at[b, rows, h], q_rope_smem.at[slot]),
                    (lse_ref.at[b, h, rows], rows_smem.at[0, slot]),
                ]
                if with_ids:
                    ids_target = ids_smem.at[pl.ds(BLOCK_K + slot * SIZE, SIZE)]
                    q_copies.append((q_ids_ref.at[b, rows], ids_target))
                d_out_copies = [
                    (d_out_ref.at[b, rows, h], d_out_smem.at[slot]),
                    (delta_ref.at[b, h, rows], rows_smem.at[1, slot]),
                ]
                for copies, ready, free in (
                    (q_copies, q_ready, q_free),
                    (d_out_copies, d_out_ready, d_out_free),
                ):
                    wait = lambda free=free: plgpu.barrier_wait(free.at[slot])  # noqa: E731
                    pl.when(step >= stages)(wait)
                    for source, target in copies:
                        plgpu.copy_gmem_to_smem(source, target, ready.at[slot])

        def add() -> None:
            """Adds the queries' gradients in device memory, in the order of the key blocks."""
            plgpu.barrier_arrive(dq_free)

            @pl.loop(0, num_steps)
            def _(step: Array) -> None:
                i = stop - 1 - step
                added = num_added.at[head * num_q + i]
                rank = j if range_refs is None else j - of_queries.start_BI[b, i]
                plgpu.barrier_wait(dq_ready)

                def copy(**reduction: Any) -> None:
                    for w in range(NUM_COMPUTE):
                        columns = pl.ds(w * half, half)
                        target = dq_ref.at[b, pl.ds(i * SIZE, SIZE), h, columns]
                        plgpu.copy_smem_to_gmem(
                            dq_smem.at[w], target, commit_group=False, **reduction
                        )

                def copy_after_others() -> None:
                    plgpu.semaphore_wait(added, rank, decrement=False, memory_scope="gpu")
                    copy(reduction_op="add")

                pl.when(rank == 0)(copy)
                pl.when(rank > 0)(copy_after_others)
                plgpu.commit_smem_to_gmem_group()
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                plgpu.barrier_arrive(dq_free)
                plgpu.wait_smem_to_gmem(0)
                plgpu.semaphore_signal(added, 1, memory_scope="gpu")

        def move() -> None:
            plgpu.set_max_registers(24, action="decrease")

            @plgpu.warp_map
            def _(warp: Array) -> None:
                pl.when(warp == 0)(load)
                pl.when(warp == 1)(add)

        def per_query(values: Array) -> Array:
            return lax.broadcast_in_dim(values, tile_shape, [1])

        def mask(scores: Array, step: Array, w: Array) -> Array:
            k_positions = plgpu.broadcasted_iota(jnp.int32, tile_shape, 0, layout=MATRIX)
            q_positions = plgpu.broadcasted_iota(jnp.int32, tile_shape, 1, layout=MATRIX)
            k_positions = k_positions + (j * BLOCK_K + w * SIZE)
            q_positions = q_positions + (stop - 1 - step) * SIZE
            if causal:
                if offset_ref is not None:
                    q_positions = q_positions + offset_ref[b]
                scores = jnp.where(k_positions <= q_positions, scores, -jnp.inf)
            if with_ids:
                q_ids_slot = ids_smem.at[pl.ds(BLOCK_K + lax.rem(step, stages) * SIZE, SIZE)]
                k_ids = plgpu.load(ids_smem.at[pl.ds(w * SIZE, SIZE)], layout=PER_ROW)
                q_ids = plgpu.load(q_ids_slot, layout=PER_COLUMN)
                same = lax.broadcast_in_dim(k_ids, tile_shape, [0]) == per_query(q_ids)
                scores = jnp.where(same, scores, -jnp.inf)
            return scores

        def mask_where_needed(scores: Array, step: Array, w: Array) -> Array:
            if range_refs is not None:
                i = stop - 1 - step
                full = (i >= of_keys.full_start_BI[b, j]) & (i < of_keys.full_stop_BI[b, j])
            elif causal:
                full = step < num_steps - BLOCK_K // SIZE
            else:
                return scores
            return lax.cond(full, lambda s: s, lambda s: mask(s, step, w), scores)

        def compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            wg = lax.axis_index("wg")
            plgpu.barrier_wait(kv_ready)

            def accumulate(dk_nope_acc: Any, dk_rope_acc: Any, dv_acc: Any) -> tuple[Array, ...]:
                plgpu.barrier_arrive(d_scores_free)

                @pl.loop(0, num_steps)
                def _(step: Array) -> None:
                    # Addresses made of an opaque value are computed in each step; the compiler
                    # would hold dozens of them in registers, which the accumulators need.
                    w = lax.optimization_barrier(wg)
                    mine = pl.ds(w * SIZE, SIZE)
                    all_keys = pl.ds((w - wg) * SIZE, BLOCK_K)
                    slot = lax.rem(step, stages)
                    q_nope, q_rope = q_nope_smem.at[slot], q_rope_smem.at[slot]
                    d_out = d_out_smem.at[slot]
                    plgpu.barrier_wait(q_ready.at[slot])

                    def weigh(acc: Any) -> Array:
                        plgpu.wgmma(acc, k_smem.at[mine, 0:N], q_nope.transpose((1, 0)))
                        plgpu.wgmma(acc, k_smem.at[mine, N:K], q_rope.transpose((1, 0)))
                        scores = mask_where_needed(finish(acc, 0), step, w) * log2_scale
                        lse = plgpu.load(rows_smem.at[0, slot], layout=PER_COLUMN)
                        return jnp.exp2(scores - per_query(lse)).astype(dtype)

                    weights = pl.run_scoped(weigh, plgpu.ACC(tile_shape, f32))
                    # Else the compiler rounds them one by one, which the unit of the exponentials
                    # does at a quarter of the speed of pairs.
                    weights = lax.optimization_barrier(weights)

                    def differentiate_scores(acc: Any) -> Array:
                        # Waiting here, after the accumulator is made, costs the fewest registers.
                        plgpu.barrier_wait(d_out_ready.at[slot])
                        plgpu.wgmma(acc, v_smem.at[mine], d_out.transpose((1, 0)))
                        plgpu.wgmma(dv_acc, weights, d_out)
                        d_weights = finish(acc, 1)
                        delta = plgpu.load(rows_smem.at[1, slot], layout=PER_COLUMN)
                        # Rounded weights: their float32 form would not fit into the registers.
                        d_scores = weights.astype(f32) * (d_weights - per_query(delta))
                        return d_scores.astype(dtype)

                    d_scores = pl.run_scoped(differentiate_scores, plgpu.ACC(tile_shape, f32))
                    plgpu.barrier_wait(d_scores_free)  # Both have read those of the last step.
                    d_scores_smem[mine] = d_scores
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(d_scores_ready)
                    plgpu.wgmma(dk_nope_acc, d_scores, q_nope)
                    plgpu.wgmma(dk_rope_acc, d_scores, q_rope)
                    plgpu.wgmma_wait(0)
                    plgpu.barrier_arrive(q_free.at[slot])
                    plgpu.barrier_arrive(d_out_free.at[slot])
                    plgpu.barrier_wait(d_scores_ready)

                    def differentiate_queries(acc: Any) -> Array:
                        d_scores_all = d_scores_smem.at[all_keys].transpose((1, 0))
                        plgpu.wgmma(acc, d_scores_all, k_smem.at[:, pl.ds(w * half, half)])
                        return finish(acc, 0)

                    dq = pl.run_scoped(differentiate_queries, plgpu.ACC((SIZE, half), f32))
                    plgpu.barrier_arrive(d_scores_free)
                    plgpu.barrier_wait(dq_free)
                    dq_smem[w] = dq
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(dq_ready)

                return dk_nope_acc[...], dk_rope_acc[...], dv_acc[...]

            dk_nope, dk_rope, dv = pl.run_scoped(
                accumulate,
                plgpu.ACC((SIZE, N), f32),
                plgpu.ACC((SIZE, R), f32),
                plgpu.ACC((SIZE, V), f32),
            )
            # Nothing reads shared memory any more: not the other warpgroup, nor the last copy.
            plgpu.barrier_wait(d_scores_free)
            plgpu.barrier_wait(dq_free)
            mine = pl.ds(wg * SIZE, SIZE)
            rows = pl.ds(j * BLOCK_K + wg * SIZE, SIZE)
            v_smem[mine] = dv.astype(dtype)
            q_nope_smem[wg] = (dk_nope * scale).astype(dtype)
            copies = [
                (v_smem.at[mine], dv_ref.at[b, rows, h]),
                (q_nope_smem.at[wg], dk_nope_ref.at[b, rows, h]),
            ]
            plgpu.commit_smem()
            for source, target in copies:
                plgpu.copy_smem_to_gmem(source, target)
            dk_rope_ref.at[b, rows, h][...] = dk_rope * scale
            plgpu.wait_smem_to_gmem(0)

        lax.cond(lax.axis_index("wg") < NUM_COMPUTE, compute, move)

    def scoped(*refs: Any) -> None:
        # wgmma wants both of its operands swizzled alike. 64 bytes, so that half of a key's 192
        # columns is a whole number of tiles.
        pl.run_scoped(
            lambda *scratch: kernel(refs, scratch),
            tiled_smem((BLOCK_K, K), dtype, swizzle=64),
            tiled_smem((BLOCK_K, V), dtype),
            tiled_smem((stages, SIZE, N), dtype, swizzle=64),
            tiled_smem((stages, SIZE, R), dtype, swizzle=64),
            tiled_smem((stages, SIZE, V), dtype),
            tiled_smem((BLOCK_K, SIZE), dtype, swizzle=64),
            tiled_smem((NUM_COMPUTE, SIZE, half), f32),
            plgpu.SMEM((2, stages, SIZE), f32),
            plgpu.SMEM((BLOCK_K + stages * SIZE,), jnp.int32) if with_ids else None,
            plgpu.Barrier(num_arrivals=2 * BLOCK_K // 8 + 1 + with_ids),
            plgpu.Barrier(num_arrivals=3 + with_ids, num_barriers=stages),
            plgpu.Barrier(num_arrivals=2, num_barriers=stages),
            plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=NUM_COMPUTE),
            plgpu.Barrier(num_arrivals=NUM_COMPUTE),
            plgpu.Barrier(num_arrivals=NUM_COMPUTE),
            plgpu.Barrier(),
            collective_axes="wg",
        )

    return plgpu.kernel(
        scoped,
        out_type=(
            jax.ShapeDtypeStruct((B, T, H, K), f32),
            jax.ShapeDtypeStruct((B, S, H, N), dtype),
            jax.ShapeDtypeStruct((B, S, H, R), f32),
            jax.ShapeDtypeStruct((B, S, H, V), dtype),
        ),
        grid=(B * H * num_k,),
        grid_names=("tile",),
        num_threads=NUM_COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True, reduction_scratch_bytes=0),
        kernel_name="mla_attention_backward",
    )(*operands)
