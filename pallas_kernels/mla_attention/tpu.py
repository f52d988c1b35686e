"""Latent attention as Pallas kernels for TPUs (Mosaic): forward, and backward in one kernel.

How they are laid out, and why:

- A grid step handles a block of queries, a block of keys and two heads. The shared rotary keys are
  fetched once for both, and the two rotary query parts of 64 fill the 128 lanes of a register:
  nothing is padded in memory and no head is copied, as blocks are column ranges of [B, T, H * N].
- The forward pass keeps scores with keys in sublanes and queries in lanes. The softmax then reduces
  over sublanes, which takes no cross-lane unit, and the output is accumulated transposed, which
  takes half the passes through a 256-wide MXU that [queries, 128] would.
- In the backward pass the loop over keys is the outer one. The gradient of all queries of a head
  pair stays in VMEM, and those of keys and values are accumulated transposed, again for the MXU.
- Which blocks are computed is a table of scalars, so blocks that the mask hides are neither
  computed nor fetched; only blocks that the mask cuts are masked.
- The matmuls of the next tile are issued before the elementwise work of this one: the compiler
  schedules within a window of the program's order and would otherwise leave the MXU waiting.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.mla_attention import blocks, tiles
from pallas_kernels.mla_attention.arguments import Inputs, Masks
from pallas_kernels.mla_attention.blocks import MASKED, NOPE, ROPE, VALUE, BlockShape, BlockTable
from pallas_kernels.mla_attention.tpu_backward import backward

__all__ = ["backward", "forward"]

LOG2_E = math.log2(math.e)
SUM_ROWS = 16  # Of bfloat16, the fewest that fill registers.


def forward(
    inputs: Inputs,
    masks: Masks,
    *,
    scale: float,
    causal: bool,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; the arguments are those of `mla_attention`."""
    q_nope_BTHN, q_rope_BTHR, k_nope_BSHN, k_rope_BSR, v_BSHV = inputs
    blocks.check_dims(q_nope_BTHN, q_rope_BTHR, v_BSHV)
    B, T, H, _ = q_nope_BTHN.shape
    S = k_nope_BSHN.shape[1]
    dtype = q_nope_BTHN.dtype
    tile = tiles.TPU_FORWARD
    shape = BlockShape.of(T, S, H, tile.block)
    table = blocks.make_table(
        T, S, shape.block_q, shape.block_k, masks, causal=causal, keys_outer=False
    )
    operands, specs = blocks.make_operands(
        shape,
        table,
        queries=(q_nope_BTHN, shape.widen(q_rope_BTHR)),
        keys=(k_nope_BSHN, v_BSHV),
        k_rope_BSR=k_rope_BSR,
        segment_ids=masks[:2],
    )
    heads, block_q = shape.heads, shape.block_q
    out_BTW, lse_BGHT = pl.pallas_call(
        functools.partial(
            _forward_kernel, shape=shape, table=table, tile=tile, scale=scale, causal=causal
        ),
        out_shape=(
            blocks.like(q_nope_BTHN, (B, shape.padded_queries, H * VALUE), dtype),
            blocks.like(q_nope_BTHN, (B, H // heads, heads, shape.padded_queries), jnp.float32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(B, H // heads, table.steps),
            in_specs=specs,
            out_specs=(
                table.spec((1, block_q, heads * VALUE), lambda b, g, q, k, c: (b, q, g)),
                table.spec((1, 1, heads, block_q), lambda b, g, q, k, c: (b, g, 0, q)),
            ),
            scratch_shapes=[
                pltpu.VMEM((heads, NOPE + ROPE, block_q), dtype),
                pltpu.VMEM((heads, 1, block_q), jnp.float32),
                pltpu.VMEM((heads, VALUE + SUM_ROWS, block_q), jnp.float32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=tiles.TPU_VMEM_BYTES,
        ),
        interpret=interpret,
        name="mla_attention_forward",
    )(*table.scalars, blocks.offsets(masks.q_offset_B, B), *operands)
    out_BTHV = out_BTW[:, :T].reshape(B, T, H, VALUE)
    return out_BTHV, lse_BGHT.reshape(B, H, shape.padded_queries)[:, :, :T]


def _forward_kernel(
    q_index_ref: Any,
    k_index_ref: Any,
    info_ref: Any,
    completed_ref: Any,
    offset_ref: Any,
    q_nope_ref: Any,
    q_rope_ref: Any,
    k_nope_ref: Any,
    v_ref: Any,
    k_rope_ref: Any,
    *refs: Any,
    shape: BlockShape,
    table: BlockTable,
    tile: tiles.TpuTile,
    scale: float,
    causal: bool,
) -> None:
    del completed_ref
    *segment_refs, out_ref, lse_ref, q_ref, max_ref, acc_ref = refs
    batch = pl.program_id(0)
    at = table.row(batch) + pl.program_id(2)
    info = info_ref[at]

    @pl.when((info & blocks.OUTER_FIRST) != 0)
    def _start() -> None:
        max_ref[...] = jnp.full_like(max_ref, MASKED)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        # The scale goes into the queries: the vector unit has no cycle to spare for the scores.
        rope_TR = (q_rope_ref[0].astype(jnp.float32) * (scale * LOG2_E)).astype(q_ref.dtype)
        rope_RT = rope_TR.T
        for h in range(shape.heads):
            nope_TN = q_nope_ref[0, :, h * NOPE : (h + 1) * NOPE].astype(jnp.float32)
            q_ref[h, :NOPE] = (nope_TN * (scale * LOG2_E)).astype(q_ref.dtype).T
            q_ref[h, NOPE:] = rope_RT[h * ROPE : (h + 1) * ROPE]

    def attend(kind: int) -> None:
        mask = blocks.BlockMask(
            kind=kind,
            size=(shape.block_q, shape.block_k),
            first=(
                q_index_ref[at] * shape.block_q + offset_ref[batch],
                k_index_ref[at] * shape.block_k,
            ),
            num_keys=shape.keys,
            causal=causal,
            segment_refs=segment_refs,
            keys_in_lanes=False,
        )

        @functools.cache
        def values(h: int, start: int, stop: int) -> Array:
            v_VS = v_ref[0, start:stop, h * VALUE : (h + 1) * VALUE].T
            if tile.sum_on_mxu:
                v_VS = jnp.concatenate([v_VS, jnp.ones((SUM_ROWS, stop - start), v_VS.dtype)])
            return v_VS

        def scores(h: int, queries: slice, keys: slice) -> Array:
            k_nope_SN = k_nope_ref[0, keys, h * NOPE : (h + 1) * NOPE]
            k_SK = jnp.concatenate([k_nope_SN, k_rope_ref[0, keys]], axis=1)
            return blocks.dot(k_SK, q_ref[h, :, queries])

        def softmax(h: int, queries: slice, keys: slice, scores_ST: Array) -> tuple[Array, Array]:
            scores_ST = mask.apply(scores_ST, queries, keys)
            old_1T = max_ref[h, :, queries]
            new_1T = jnp.maximum(old_1T, scores_ST.max(axis=0, keepdims=True))
            weights_ST = jnp.exp2(scores_ST - new_1T)
            decay_1T = jnp.exp2(old_1T - new_1T)
            max_ref[h, :, queries] = new_1T
            if not tile.sum_on_mxu:
                sum_1T = weights_ST.sum(axis=0, keepdims=True)
                acc_ref[h, VALUE:, queries] = acc_ref[h, VALUE:, queries] * decay_1T + sum_1T
            return weights_ST.astype(v_ref.dtype), decay_1T

        def accumulate(
            h: int, queries: slice, keys: slice, weights_ST: Array, decay_1T: Array
        ) -> None:
            rows = slice(0, acc_ref.shape[1] if tile.sum_on_mxu else VALUE)
            acc_VT = acc_ref[h, rows, queries] * decay_1T
            product_VT = blocks.dot(values(h, keys.start, keys.stop), weights_ST)
            acc_ref[h, rows, queries] = acc_VT + product_VT

        blocks.pipeline(mask.tiles(tile, shape.heads), scores, softmax, accumulate)

    for kind in table.kinds:
        pl.when((info & blocks.KIND_BITS) == kind)(functools.partial(attend, kind))

    @pl.when((info & blocks.OUTER_LAST) != 0)
    def _finish() -> None:
        for h in range(shape.heads):
            seen_1T = max_ref[h] > MASKED / 2
            sum_1T = jnp.where(seen_1T, acc_ref[h, VALUE : VALUE + 1], 1.0)
            out_VT = jnp.where(seen_1T, acc_ref[h, :VALUE] / sum_1T, 0.0)
            out_ref[0, :, h * VALUE : (h + 1) * VALUE] = out_VT.T.astype(out_ref.dtype)
            lse_1T = max_ref[h] / LOG2_E + jnp.log(sum_1T)
            lse_ref[0, 0, h : h + 1] = jnp.where(seen_1T, lse_1T, -jnp.inf)
