"""Forward kernel of latent attention for Hopper.

A block computes 128 queries of one head. Two warpgroups compute 64 queries each. A third one loads
keys and values through TMA, from the diagonal backwards.

The two take turns, which the barriers `turn` keep. One has the tensor cores multiply the weights of
a key block with its values and the queries with the next block's keys, while the other computes its
softmax.
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
from pallas_kernels.mla_attention.tiles import HopperForwardTile
from pallas_kernels.softmax import LOG2E

Q_SIZE = 64  # Queries of a warpgroup: the rows of one wgmma.
NUM_COMPUTE = 2
BLOCK_Q = NUM_COMPUTE * Q_SIZE


def attend(
    inputs: Inputs,
    masks: Masks,
    ranges: KeyRanges | None,
    *,
    scale: float,
    causal: bool,
    num_keys: int,
    tile: HopperForwardTile,
) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp of lengths that are multiples of the blocks.

    Args:
        inputs: As in `mla_attention`, T a multiple of 128 and S of the key block.
        masks: As in `mla_attention`, int32.
        ranges: Which key blocks each 128 queries see; None if each query sees all keys or, when
          `causal`, all up to its own position, and every one of the S keys is real.
        scale: Factor on the scores.
        causal: Whether keys after a query's position are hidden.
        num_keys: Number of the real keys; those after it are padding.
        tile: Block sizes.
    """
    B, T, H, N = inputs.q_nope_BTHN.shape
    S, R, V = inputs.k_nope_BSHN.shape[1], inputs.q_rope_BTHR.shape[3], inputs.v_BSHV.shape[3]
    dtype = inputs.q_nope_BTHN.dtype
    block_q, block_k, stages = BLOCK_Q, tile.block_k, tile.stages
    num_q, num_k = T // block_q, S // block_k
    group = math.gcd(tile.heads_per_group, B * H)
    log2_scale = scale * LOG2E
    with_ids = masks.q_segment_ids_BT is not None
    operands, operand_tree = jax.tree.flatten((inputs, masks, ranges))

    def kernel(refs: Sequence[Any], scratch: Sequence[Any]) -> None:
        *input_refs, out_ref, lse_ref = refs
        main_refs, mask_refs, range_refs = jax.tree.unflatten(operand_tree, input_refs)
        q_nope_ref, q_rope_ref, k_nope_ref, k_rope_ref, v_ref = main_refs
        q_ids_ref, k_ids_ref, offset_ref = mask_refs
        q_nope_smems, q_rope_smems, k_nope_smem, k_rope_smem, v_smem, lse_smems = scratch[:6]
        q_ids_smem, k_ids_smem = scratch[6]
        q_ready, k_ready, v_ready, k_free, v_free, turn = scratch[7:]

        # Long rows of blocks first, so that short ones fill the end; a few heads at a time, so that
        # their keys and values stay in the cache.
        block = lax.axis_index("tile")
        i = num_q - 1 - lax.rem(lax.div(block, group), num_q)
        head = lax.div(block, group * num_q) * group + lax.rem(block, group)
        h, b = lax.rem(head, H), lax.div(head, H)
        if range_refs is not None:
            start, stop = range_refs.start_BI[b, i], range_refs.stop_BI[b, i]
        elif causal:
            start, stop = 0, lax.div((i + 1) * block_q + (block_k - 1), block_k)
        else:
            start, stop = 0, num_k
        num_steps = stop - start

        wg = lax.axis_index("wg")

        @pl.when(wg == NUM_COMPUTE)
        def _load() -> None:
            plgpu.set_max_registers(24, action="decrease")

            @pl.loop(0, num_steps)
            def _(step: Array) -> None:
                slot = lax.rem(step, stages)
                keys = pl.ds((stop - 1 - step) * block_k, block_k)
                k_copies = [
                    (k_nope_ref.at[b, keys, h], k_nope_smem.at[slot]),
                    (k_rope_ref.at[b, keys], k_rope_smem.at[slot]),
                ]
                if with_ids:
                    k_copies.append((k_ids_ref.at[b, keys], k_ids_smem.at[slot]))

                @pl.when(step >= stages)
                def _() -> None:
                    plgpu.barrier_wait(k_free.at[slot])

                for source, target in k_copies:
                    plgpu.copy_gmem_to_smem(source, target, k_ready.at[slot])

                @pl.when(step >= stages)
                def _() -> None:
                    plgpu.barrier_wait(v_free.at[slot])

                plgpu.copy_gmem_to_smem(v_ref.at[b, keys, h], v_smem.at[slot], v_ready.at[slot])

        @pl.when(wg < NUM_COMPUTE)
        def _compute() -> None:
            plgpu.set_max_registers(240, action="increase")
            q_nope_smem, q_rope_smem = q_nope_smems.at[wg], q_rope_smems.at[wg]
            q_start = i * block_q + wg * Q_SIZE
            rows = pl.ds(q_start, Q_SIZE)
            q_copies = [
                (q_nope_ref.at[b, rows, h], q_nope_smem),
                (q_rope_ref.at[b, rows, h], q_rope_smem),
            ]
            if with_ids:
                q_copies.append((q_ids_ref.at[b, rows], q_ids_smem.at[wg]))
            for source, target in q_copies:
                plgpu.copy_gmem_to_smem(source, target, q_ready.at[wg])
            plgpu.barrier_wait(q_ready.at[wg])

            def mask(scores: Array, step: Array, slot: Array) -> Array:
                shape = (Q_SIZE, block_k)
                q_positions = plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=MATRIX) + q_start
                k_positions = plgpu.broadcasted_iota(jnp.int32, shape, 1, layout=MATRIX)
                k_positions = k_positions + (stop - 1 - step) * block_k
                if causal:
                    if offset_ref is not None:
                        q_positions = q_positions + offset_ref[b]
                    scores = jnp.where(k_positions <= q_positions, scores, -jnp.inf)
                if num_keys != S:
                    scores = jnp.where(k_positions < num_keys, scores, -jnp.inf)
                if with_ids:
                    q_ids = plgpu.load(q_ids_smem.at[wg], layout=PER_ROW)
                    k_ids = plgpu.load(k_ids_smem.at[slot], layout=PER_COLUMN)
                    q_ids = lax.broadcast_in_dim(q_ids, shape, [0])
                    k_ids = lax.broadcast_in_dim(k_ids, shape, [1])
                    scores = jnp.where(q_ids == k_ids, scores, -jnp.inf)
                return scores

            def mask_where_needed(scores: Array, step: Array, slot: Array) -> Array:
                if range_refs is None:
                    return scores  # Only the diagonal is masked, and that is the first step.
                j = stop - 1 - step
                full = (j >= range_refs.full_start_BI[b, i]) & (j < range_refs.full_stop_BI[b, i])
                return lax.cond(full, lambda s: s, lambda s: mask(s, step, slot), scores)

            def softmax(
                scores: Array, top: Array, total: Array
            ) -> tuple[Array, Array, Array, Array]:
                """Returns weights, the rows' new maximum and sum, and the factor on what was."""
                new_top = jnp.maximum(top, scores.max(axis=1) * log2_scale)
                base = new_top
                if range_refs is not None:  # A row may have seen no key: -inf - -inf is NaN.
                    base = jnp.where(new_top == -jnp.inf, 0.0, new_top)
                decay = jnp.exp2(top - base)
                base = lax.broadcast_in_dim(base, scores.shape, [0])
                weights = jnp.exp2(scores * log2_scale - base)
                return weights, new_top, total * decay + weights.sum(axis=1), decay

            def start_scores(scores_ref: Any, slot: Array | int) -> None:
                k_nope, k_rope = k_nope_smem.at[slot], k_rope_smem.at[slot]
                plgpu.wgmma(scores_ref, q_nope_smem, k_nope.transpose((1, 0)))
                plgpu.wgmma(scores_ref, q_rope_smem, k_rope.transpose((1, 0)))

            def attend_keys(acc_ref: Any) -> tuple[Array, Array, Array]:
                top = plgpu.layout_cast(jnp.full((Q_SIZE,), -jnp.inf, jnp.float32), PER_ROW)
                total = plgpu.layout_cast(jnp.full((Q_SIZE,), 0, jnp.float32), PER_ROW)

                plgpu.barrier_wait(k_ready.at[0])
                pl.when(wg == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
                plgpu.barrier_wait(turn.at[wg])

                def first_scores(scores_ref: Any) -> Array:
                    start_scores(scores_ref, 0)
                    plgpu.barrier_arrive(turn.at[1 - wg])
                    return finish(scores_ref, 0)

                zero = jnp.int32(0)
                scores = pl.run_scoped(first_scores, plgpu.ACC((Q_SIZE, block_k), jnp.float32))
                if range_refs is not None or causal:
                    scores = mask(scores, zero, zero)
                plgpu.barrier_arrive(k_free.at[0])
                weights, top, total, _ = softmax(scores, top, total)

                def next_keys(step: Array, carry: tuple) -> tuple:
                    top, total, weights = carry
                    slot, last_slot = lax.rem(step, stages), lax.rem(step - 1, stages)
                    plgpu.barrier_wait(k_ready.at[slot])
                    plgpu.barrier_wait(turn.at[wg])

                    def next_scores(scores_ref: Any) -> Array:
                        start_scores(scores_ref, slot)
                        plgpu.barrier_wait(v_ready.at[last_slot])
                        plgpu.wgmma(acc_ref, weights, v_smem.at[last_slot])
                        plgpu.barrier_arrive(turn.at[1 - wg])
                        return finish(scores_ref, 1)

                    scores = pl.run_scoped(next_scores, plgpu.ACC((Q_SIZE, block_k), jnp.float32))
                    scores = mask_where_needed(scores, step, slot)
                    plgpu.barrier_arrive(k_free.at[slot])
                    new_weights, top, total, decay = softmax(scores, top, total)
                    acc = finish(acc_ref, 0)
                    plgpu.barrier_arrive(v_free.at[last_slot])
                    acc_ref[...] = acc * lax.broadcast_in_dim(decay, acc.shape, [0])
                    return top, total, new_weights.astype(dtype)

                carry = (top, total, weights.astype(dtype))
                top, total, weights = lax.fori_loop(1, num_steps, next_keys, carry)
                slot = lax.rem(num_steps - 1, stages)
                plgpu.barrier_wait(v_ready.at[slot])
                plgpu.wgmma(acc_ref, weights, v_smem.at[slot])
                return acc_ref[...], top, total

            acc, top, total = pl.run_scoped(attend_keys, plgpu.ACC((Q_SIZE, V), jnp.float32))
            if range_refs is None:
                inverse = 1 / total
            else:
                inverse = jnp.where(total == 0, 0.0, 1 / jnp.where(total == 0, 1.0, total))
            acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            q_nope_smem[...] = acc.astype(dtype)  # The queries are no longer needed.
            lse_smems[wg] = (top + jnp.log2(total)) * (1 / LOG2E)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(q_nope_smem, out_ref.at[b, rows, h])
            plgpu.copy_smem_to_gmem(lse_smems.at[wg], lse_ref.at[b, h, rows])
            plgpu.wait_smem_to_gmem(0)

    def scoped(*refs: Any) -> None:
        ids_smem: tuple[Any, Any] = (None, None)
        if with_ids:
            ids_smem = (
                plgpu.SMEM((NUM_COMPUTE, Q_SIZE), jnp.int32),
                plgpu.SMEM((stages, block_k), jnp.int32),
            )
        pl.run_scoped(
            lambda *scratch: kernel(refs, scratch),
            tiled_smem((NUM_COMPUTE, Q_SIZE, N), dtype),
            tiled_smem((NUM_COMPUTE, Q_SIZE, R), dtype),
            tiled_smem((stages, block_k, N), dtype),
            tiled_smem((stages, block_k, R), dtype),
            tiled_smem((stages, block_k, V), dtype),
            plgpu.SMEM((NUM_COMPUTE, Q_SIZE), jnp.float32),
            ids_smem,
            plgpu.Barrier(num_arrivals=2 + with_ids, num_barriers=NUM_COMPUTE),
            plgpu.Barrier(num_arrivals=2 + with_ids, num_barriers=stages),
            plgpu.Barrier(num_barriers=stages),
            plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_arrivals=NUM_COMPUTE, num_barriers=stages),
            plgpu.Barrier(num_barriers=NUM_COMPUTE),
            collective_axes="wg",
        )

    return plgpu.kernel(
        scoped,
        out_type=(
            jax.ShapeDtypeStruct((B, T, H, V), dtype),
            jax.ShapeDtypeStruct((B, H, T), jnp.float32),
        ),
        grid=(B * H * num_q,),
        grid_names=("tile",),
        num_threads=NUM_COMPUTE + 1,
        thread_name="wg",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        kernel_name="mla_attention_forward",
    )(*operands)
