"""The backward pass of latent attention as one Pallas kernel for TPUs (Mosaic); see `tpu`."""

import functools
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import TPU_LANES
from pallas_kernels.manual_axes import output_like
from pallas_kernels.mla_attention import tpu_blocks as blocks
from pallas_kernels.mla_attention.arguments import Inputs, Masks
from pallas_kernels.mla_attention.limits import NOPE, ROPE, VALUE
from pallas_kernels.mla_attention.tiles import (
    TPU_RESIDENT_TOKENS,
    TPU_VMEM_BYTES,
    TpuTile,
    tpu_backward_tile,
)
from pallas_kernels.mla_attention.tpu_blocks import BlockShape, BlockTable
from pallas_kernels.softmax import LOG2E, MASKED
from pallas_kernels.tpu_parts import dot


def backward(
    inputs: Inputs,
    masks: Masks,
    out_BTHV: Array,
    lse_BHT: Array,
    d_out_BTHV: Array,
    *,
    scale: float,
    causal: bool,
    tile: TpuTile | None = None,
    resident_tokens: int = TPU_RESIDENT_TOKENS,
    interpret: Any = False,
) -> Inputs:
    """Returns the gradients of the five float inputs; the rotary keys' is summed over the heads.

    The gradient of the queries stays in VMEM. So sequences of more than `resident_tokens` are taken
    in pieces, whose gradients are summed in float32.
    """
    q_nope_BTHN, q_rope_BTHR, k_nope_BSHN, k_rope_BSR, v_BSHV = inputs
    q_segment_ids_BT, kv_segment_ids_BS, q_offset_B = masks
    T, S = q_nope_BTHN.shape[1], k_nope_BSHN.shape[1]
    delta_BHT = jnp.einsum(
        "BTHV,BTHV->BHT", out_BTHV, d_out_BTHV, preferred_element_type=jnp.float32
    )
    tile, piece = tile or tpu_backward_tile(), resident_tokens
    queries = (q_nope_BTHN, q_rope_BTHR, d_out_BTHV)
    keys = (k_nope_BSHN, v_BSHV, k_rope_BSR)
    if max(T, S) <= piece:
        return _backward_piece(
            queries, keys, lse_BHT, delta_BHT, masks, q_nope_BTHN.dtype,
            scale=scale, causal=causal, tile=tile, interpret=interpret,
        )  # fmt: skip
    f32 = jnp.float32
    dq = [jnp.zeros(x.shape, f32) for x in (q_nope_BTHN, q_rope_BTHR)]
    dk = [jnp.zeros(x.shape, f32) for x in (k_nope_BSHN, k_rope_BSR, v_BSHV)]
    for t in range(0, T, piece):
        for s in range(0, S, piece):
            if causal and q_offset_B is None and s > t:
                continue
            # Keys before the queries' piece are all visible, but for an offset that hides some.
            cut = causal and (q_offset_B is not None or s == t)
            rows, columns = slice(t, t + piece), slice(s, s + piece)
            piece_masks = Masks(
                None if q_segment_ids_BT is None else q_segment_ids_BT[:, rows],
                None if kv_segment_ids_BS is None else kv_segment_ids_BS[:, columns],
                None if q_offset_B is None else q_offset_B + (t - s),
            )
            grads = _backward_piece(
                tuple(x[:, rows] for x in queries), tuple(x[:, columns] for x in keys),
                lse_BHT[:, :, rows], delta_BHT[:, :, rows], piece_masks, f32,
                scale=scale, causal=cut, tile=tile, interpret=interpret,
            )  # fmt: skip
            dq = [x.at[:, rows].add(grad) for x, grad in zip(dq, grads[:2], strict=True)]
            dk = [x.at[:, columns].add(grad) for x, grad in zip(dk, grads[2:], strict=True)]
    return Inputs(*(x.astype(q_nope_BTHN.dtype) for x in (*dq, *dk)))


def _backward_piece(
    queries: tuple[Array, ...],
    keys: tuple[Array, ...],
    lse_BHT: Array,
    delta_BHT: Array,
    masks: Masks,
    out_dtype: Any,
    *,
    scale: float,
    causal: bool,
    tile: TpuTile,
    interpret: Any,
) -> Inputs:
    q_nope_BTHN, q_rope_BTHR, d_out_BTHV = queries
    k_nope_BSHN, v_BSHV, k_rope_BSR = keys
    B, T, H, _ = q_nope_BTHN.shape
    S = k_nope_BSHN.shape[1]
    dtype, f32 = q_nope_BTHN.dtype, jnp.float32
    shape = BlockShape.of(T, S, H, tile.block)
    heads, block_q, block_k = shape.heads, shape.block_q, shape.block_k
    table = blocks.make_table(T, S, block_q, block_k, masks, causal=causal, keys_outer=True)
    # Two groups of heads, for chips whose two cores share a kernel's parallel grid dims.
    pairs = H // heads
    groups = 2 if pairs % 2 == 0 else 1
    pairs = pairs // groups
    operands, specs = blocks.make_operands(
        shape,
        table,
        queries=(q_nope_BTHN, shape.widen(q_rope_BTHR), d_out_BTHV),
        keys=(k_nope_BSHN, v_BSHV),
        k_rope_BSR=k_rope_BSR,
        segment_ids=masks[:2],
        pairs=pairs,
    )

    def rows(x_BHT: Array) -> Array:
        return blocks.pad(x_BHT, 2, shape.padded_queries).reshape(B, H // heads, heads, -1)

    # A query that saw no key: exp2(score - inf) is 0.
    lse_BHT = jnp.where(lse_BHT == -jnp.inf, -MASKED, lse_BHT * LOG2E)

    def pair(p: Any, g: Any) -> Any:
        return p * pairs + g

    row_spec = table.spec((1, 1, heads, block_q), lambda b, p, g, q, k, c: (b, pair(p, g), 0, q))
    key_spec = table.spec((1, block_k, heads * NOPE), lambda b, p, g, q, k, c: (b, k, pair(p, g)))
    padded_queries, padded_keys = shape.padded_queries, shape.padded_keys
    wide = NOPE + shape.rope_lanes
    dq_nope, dq_rope, dk_nope, dv, dk_rope = pl.pallas_call(
        functools.partial(
            _backward_kernel, shape=shape, table=table, tile=tile, scale=scale, causal=causal
        ),
        out_shape=(
            output_like(q_nope_BTHN, (B, padded_queries, H * NOPE), out_dtype),
            output_like(q_nope_BTHN, (B, padded_queries, H // heads * shape.rope_lanes), out_dtype),
            output_like(q_nope_BTHN, (B, padded_keys, H * NOPE), out_dtype),
            output_like(q_nope_BTHN, (B, padded_keys, H * VALUE), out_dtype),
            output_like(q_nope_BTHN, (B, groups, ROPE, padded_keys), f32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=5,
            grid=(B, groups, pairs, table.steps),
            in_specs=[*specs[:6], row_spec, row_spec, *specs[6:]],
            out_specs=(
                table.spec((1, block_q, heads * NOPE), lambda b, p, g, q, k, c: (b, c, pair(p, g))),
                table.spec(
                    (1, block_q, shape.rope_lanes), lambda b, p, g, q, k, c: (b, c, pair(p, g))
                ),
                key_spec,
                key_spec,
                table.spec((1, 1, ROPE, padded_keys), lambda b, p, g, q, k, c: (b, p, 0, 0)),
            ),
            scratch_shapes=[
                pltpu.VMEM((heads, wide, block_k), dtype),
                pltpu.VMEM((heads, block_k, wide), dtype),
                pltpu.VMEM((heads, VALUE, block_k), dtype),
                pltpu.VMEM((heads, NOPE + ROPE, block_k), f32),
                pltpu.VMEM((heads, VALUE, block_k), f32),
                pltpu.VMEM((padded_queries, heads * NOPE + shape.rope_lanes), f32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary", "arbitrary"),
            vmem_limit_bytes=TPU_VMEM_BYTES,
        ),
        interpret=interpret,
        name="mla_attention_backward",
    )(
        *table.scalars,
        blocks.offsets(masks[2], B),
        *operands[:6],
        rows(lse_BHT),
        rows(delta_BHT),
        *operands[6:],
    )
    dk_rope_BSR = dk_rope.sum(axis=1).swapaxes(1, 2)[:, :S].astype(out_dtype)
    return Inputs(
        dq_nope[:, :T].reshape(B, T, H, NOPE),
        dq_rope[:, :T].reshape(B, T, H, -1)[..., :ROPE],
        dk_nope[:, :S].reshape(B, S, H, NOPE),
        dk_rope_BSR,
        dv[:, :S].reshape(B, S, H, VALUE),
    )


def _backward_kernel(
    q_index_ref: Any,
    k_index_ref: Any,
    info_ref: Any,
    completed_ref: Any,
    offset_ref: Any,
    q_nope_ref: Any,
    q_rope_ref: Any,
    d_out_ref: Any,
    k_nope_ref: Any,
    v_ref: Any,
    k_rope_ref: Any,
    lse_ref: Any,
    delta_ref: Any,
    *refs: Any,
    shape: BlockShape,
    table: BlockTable,
    tile: TpuTile,
    scale: float,
    causal: bool,
) -> None:
    del completed_ref
    *segment_refs, dq_nope_ref, dq_rope_ref, dk_nope_ref, dv_ref, dk_rope_ref = refs[:-6]
    k_cols_ref, k_rows_ref, v_cols_ref, dk_acc_ref, dv_acc_ref, dq_acc_ref = refs[-6:]
    batch = pl.program_id(0)
    step = pl.program_id(3)
    at = table.row(batch) + step
    info = info_ref[at]
    heads, block_q, block_k = shape.heads, shape.block_q, shape.block_k
    q_index, k_index = q_index_ref[at], k_index_ref[at]
    q_rows = pl.ds(pl.multiple_of(q_index * block_q, TPU_LANES), block_q)

    @pl.when((pl.program_id(2) == 0) & (step == 0))
    def _start_group() -> None:
        dk_rope_ref[...] = jnp.zeros_like(dk_rope_ref)

    @pl.when((info & blocks.INNER_FIRST) != 0)
    def _start_queries() -> None:
        dq_acc_ref[q_rows] = jnp.zeros((block_q, dq_acc_ref.shape[1]), jnp.float32)

    @pl.when((info & blocks.OUTER_FIRST) != 0)
    def _start_keys() -> None:
        dk_acc_ref[...] = jnp.zeros_like(dk_acc_ref)
        dv_acc_ref[...] = jnp.zeros_like(dv_acc_ref)
        k_rope_RS = k_rope_ref[0].T
        for h in range(heads):
            k_nope_SN = k_nope_ref[0, :, h * NOPE : (h + 1) * NOPE]
            # Each head's rotary part meets its own half of the queries' 128 rotary lanes.
            halves = [jnp.zeros_like(k_rope_RS) for _ in range(shape.rope_lanes // ROPE)]
            halves[h] = k_rope_RS
            rope_RS = jnp.concatenate(halves)
            k_cols_ref[h, :NOPE], k_cols_ref[h, NOPE:] = k_nope_SN.T, rope_RS
            k_rows_ref[h, :, :NOPE], k_rows_ref[h, :, NOPE:] = k_nope_SN, rope_RS.T
            v_cols_ref[h] = v_ref[0, :, h * VALUE : (h + 1) * VALUE].T

    part_q, part_k = (tile.part if n % tile.part == 0 else n for n in (block_q, block_k))

    def attend(kind: int, q_start: Any, k_start: Any) -> None:
        q_here, k_here = pl.ds(q_start, part_q), pl.ds(k_start, part_k)
        q_nope, q_rope, d_out = (ref.at[0, q_here] for ref in (q_nope_ref, q_rope_ref, d_out_ref))
        lse, delta = (ref.at[0, 0, :, q_here] for ref in (lse_ref, delta_ref))
        k_cols, v_cols, dk_acc, dv_acc = (
            ref.at[:, :, k_here] for ref in (k_cols_ref, v_cols_ref, dk_acc_ref, dv_acc_ref)
        )
        k_rows = k_rows_ref.at[:, k_here]
        dq_start = pl.multiple_of(q_index * block_q + q_start, TPU_LANES)
        dq_acc = dq_acc_ref.at[pl.ds(dq_start, part_q)]
        mask = blocks.BlockMask(
            kind=kind,
            size=(part_q, part_k),
            first=(q_index * block_q + q_start + offset_ref[batch], k_index * block_k + k_start),
            num_keys=shape.keys,
            causal=causal,
            segment_refs=[
                ref.at[:, :, here]
                for ref, here in zip(segment_refs, (q_here, k_here), strict=False)
            ],
            keys_in_lanes=True,
        )
        cache: dict[Any, Array] = {}

        def once(name: str, h: int, queries: slice, make: Callable[[], Array]) -> Array:
            key = (name, h, queries.start, queries.stop)
            if key not in cache:
                cache[key] = make()
            return cache[key]

        def column(ref: Any, h: int, queries: slice) -> Array:
            row_1T = ref[h : h + 1, queries]
            return jnp.broadcast_to(row_1T, (TPU_LANES, row_1T.shape[1])).T[:, :1]

        def transposed(h: int, queries: slice) -> Array:
            q_nope_NT = q_nope[queries, h * NOPE : (h + 1) * NOPE].T
            return jnp.concatenate([q_nope_NT, q_rope[queries].T[h * ROPE : (h + 1) * ROPE]])

        def matmuls(h: int, queries: slice, keys: slice) -> tuple[Array, Array]:
            q_nope_TN = q_nope[queries, h * NOPE : (h + 1) * NOPE]
            q_TK = jnp.concatenate([q_nope_TN, q_rope[queries]], axis=1)
            scores_TS = dot(q_TK, k_cols[h, :, keys])
            d_out_TV = d_out[queries, h * VALUE : (h + 1) * VALUE]
            return scores_TS, dot(d_out_TV, v_cols[h, :, keys])

        def elementwise(
            h: int, queries: slice, keys: slice, products: tuple[Array, Array]
        ) -> tuple[Array, Array]:
            scores_TS, d_weights_TS = products
            scores_TS = mask.apply(scores_TS, queries, keys)
            lse_T1 = once("lse", h, queries, lambda: column(lse, h, queries))
            delta_T1 = once("delta", h, queries, lambda: column(delta, h, queries))
            weights_TS = jnp.exp2(scores_TS * (scale * LOG2E) - lse_T1)
            d_scores_TS = weights_TS * (d_weights_TS - delta_T1)
            return weights_TS.astype(v_ref.dtype), d_scores_TS.astype(v_ref.dtype)

        def accumulate(
            h: int, queries: slice, keys: slice, weights_TS: Array, d_scores_TS: Array
        ) -> None:
            head = slice(h * NOPE, (h + 1) * NOPE)
            d_out_VT = once("d_out", h, queries, lambda: d_out[queries, head].T)
            q_KT = once("q", h, queries, lambda: transposed(h, queries))
            dv_acc[h, :, keys] += dot(d_out_VT, weights_TS)
            dk_acc[h, :, keys] += dot(q_KT, d_scores_TS)
            dq_TK = dot(d_scores_TS, k_rows[h, keys])
            dq_acc[queries, head] += dq_TK[:, :NOPE]
            dq_acc[queries, heads * NOPE :] += dq_TK[:, NOPE:]

        blocks.pipeline(mask.tiles(tile, heads), matmuls, elementwise, accumulate)

    # The code below is a part's, run over the block's parts: a block's would be too long.
    kinds = table.kinds
    if block_q > part_q and blocks.DIAGONAL in kinds:
        kinds = tuple({blocks.FULL, *kinds})

    @pl.when((info & blocks.KIND_BITS) != blocks.SKIP)
    def _attend() -> None:
        @pl.loop(0, block_k // part_k)
        def _keys(part_of_keys: Any) -> None:
            @pl.loop(0, block_q // part_q)
            def _queries(part_of_queries: Any) -> None:
                kind = info & blocks.KIND_BITS
                below = jnp.where(part_of_queries > part_of_keys, blocks.FULL, blocks.SKIP)
                on_it = jnp.where(part_of_queries == part_of_keys, blocks.DIAGONAL, below)
                kind = jnp.where(kind == blocks.DIAGONAL, on_it, kind)
                starts = (
                    pl.multiple_of(part_of_queries * part_q, TPU_LANES),
                    pl.multiple_of(part_of_keys * part_k, TPU_LANES),
                )
                for body in kinds:
                    pl.when(kind == body)(functools.partial(attend, body, *starts))

    @pl.when((info & blocks.INNER_LAST) != 0)
    def _finish_queries() -> None:
        dq_TK = dq_acc_ref[q_rows] * scale
        dq_nope_ref[0] = dq_TK[:, : heads * NOPE].astype(dq_nope_ref.dtype)
        dq_rope_ref[0] = dq_TK[:, heads * NOPE :].astype(dq_rope_ref.dtype)

    @pl.when((info & blocks.OUTER_LAST) != 0)
    def _finish_keys() -> None:
        columns = pl.ds(pl.multiple_of(k_index * block_k, TPU_LANES), block_k)
        for h in range(heads):
            dk_KS = dk_acc_ref[h] * scale
            dk_nope_SN = dk_KS[:NOPE].T
            dk_nope_ref[0, :, h * NOPE : (h + 1) * NOPE] = dk_nope_SN.astype(dk_nope_ref.dtype)
            dv_SV = dv_acc_ref[h].T
            dv_ref[0, :, h * VALUE : (h + 1) * VALUE] = dv_SV.astype(dv_ref.dtype)
            dk_rope_ref[0, 0, :, columns] += dk_KS[NOPE:]
