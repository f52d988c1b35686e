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
- The matmuls of the next tiles are issued before the elementwise work of this one: the compiler
  schedules within a window of the program's order and would otherwise leave the MXU waiting.
- A forward step does not finish its last tiles: their scores and weights are held in VMEM, and the
  next step of the same queries goes on with them while the MXU computes its own first scores.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.manual_axes import output_like
from pallas_kernels.mla_attention import tpu_blocks as blocks
from pallas_kernels.mla_attention.arguments import Inputs, Masks
from pallas_kernels.mla_attention.limits import NOPE, ROPE, VALUE
from pallas_kernels.mla_attention.tiles import TPU_VMEM_BYTES, TpuTile, tpu_forward_tile
from pallas_kernels.mla_attention.tpu_backward import backward
from pallas_kernels.mla_attention.tpu_blocks import BlockShape, BlockTable
from pallas_kernels.softmax import LOG2E, MASKED
from pallas_kernels.tpu_parts import dot

__all__ = ["backward", "forward"]

SUM_ROWS = 16  # Of bfloat16, the fewest that fill registers.


def forward(
    inputs: Inputs,
    masks: Masks,
    *,
    scale: float,
    causal: bool,
    tile: TpuTile | None = None,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; the arguments are those of `mla_attention`."""
    q_nope_BTHN, q_rope_BTHR, k_nope_BSHN, k_rope_BSR, v_BSHV = inputs
    B, T, H, _ = q_nope_BTHN.shape
    S = k_nope_BSHN.shape[1]
    dtype = q_nope_BTHN.dtype
    tile = tile or tpu_forward_tile()
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
    held = _Held.of(tile, shape)
    out_BTW, lse_BGHT = pl.pallas_call(
        functools.partial(
            _forward_kernel,
            shape=shape,
            table=table,
            tile=tile,
            held=held,
            scale=scale,
            causal=causal,
        ),
        out_shape=(
            output_like(q_nope_BTHN, (B, shape.padded_queries, H * VALUE), dtype),
            output_like(q_nope_BTHN, (B, H // heads, heads, shape.padded_queries), jnp.float32),
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
                *held.scratch(dtype, VALUE + SUM_ROWS if tile.sum_on_mxu else VALUE),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel", "arbitrary"),
            vmem_limit_bytes=TPU_VMEM_BYTES,
        ),
        interpret=interpret,
        name="mla_attention_forward",
    )(*table.scalars, blocks.offsets(masks.q_offset_B, B), *operands)
    out_BTHV = out_BTW[:, :T].reshape(B, T, H, VALUE)
    return out_BTHV, lse_BGHT.reshape(B, H, shape.padded_queries)[:, :, :T]


@dataclasses.dataclass(frozen=True)
class _Held:
    """What a step leaves to the next one: tiles with scores only, and as many with weights.

    Attributes:
        lag: tiles whose scores, and as many whose weights, are under way within a step.
        items: head and queries of the tiles that are held, the earliest first; they are the same
            after every kind of block. Empty where a step finishes all its tiles.
        size: keys and queries of such a tile.
    """

    lag: int
    items: list[tuple[int, slice]]
    size: tuple[int, int]

    @classmethod
    def of(cls, tile: TpuTile, shape: BlockShape) -> "_Held":
        order = tile.order(shape.heads, shape.block_q, shape.block_k)
        *_, queries, keys = order[-1]
        size = (keys.stop - keys.start, queries.stop - queries.start)
        # The tiles of a step's last keys, which a block on the diagonal does not cut.
        last = sum(item[2] == keys for item in order)
        lag = min(tile.lag, last // 2)
        items = [(h, queries) for h, queries, _ in order[-2 * lag :]] if lag else []
        return cls(max(lag, 1), items, size)

    def scratch(self, dtype: Any, rows: int) -> list[Any]:
        """Returns the memory of scores, weights, decays and, for both kinds of tile, values."""
        if not self.items:
            return []
        keys, queries = self.size
        return [
            pltpu.VMEM((self.lag, keys, queries), jnp.float32),
            pltpu.VMEM((self.lag, keys, queries), dtype),
            pltpu.VMEM((self.lag, 1, queries), jnp.float32),
            pltpu.VMEM((2 * self.lag, rows, keys), dtype),
        ]


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
    tile: TpuTile,
    held: _Held,
    scale: float,
    causal: bool,
) -> None:
    del completed_ref
    num_refs = len(refs) - (4 if held.items else 0)
    held_refs = refs[num_refs:]
    *segment_refs, out_ref, lse_ref, q_ref, max_ref, acc_ref = refs[:num_refs]
    batch = pl.program_id(0)
    at = table.row(batch) + pl.program_id(2)
    info = info_ref[at]

    @pl.when((info & blocks.OUTER_FIRST) != 0)
    def _start() -> None:
        max_ref[...] = jnp.full_like(max_ref, MASKED)
        acc_ref[...] = jnp.zeros_like(acc_ref)
        # Hidden keys, whose values are 0, are held to begin with.
        for n, ref in enumerate(held_refs):
            ref[...] = jnp.full_like(ref, MASKED if n == 0 else 0)
        rope_RT = q_rope_ref[0].T
        for h in range(shape.heads):
            q_ref[h, :NOPE] = q_nope_ref[0, :, h * NOPE : (h + 1) * NOPE].T
            q_ref[h, NOPE:] = rope_RT[h * ROPE : (h + 1) * ROPE]

    def softmax(h: int, queries: slice, scores_ST: Array, v_VS: Array) -> tuple[Any, ...]:
        old_1T = max_ref[h, :, queries]
        new_1T = jnp.maximum(old_1T, scores_ST.max(axis=0, keepdims=True))
        weights_ST = jnp.exp2(scores_ST - new_1T)
        decay_1T = jnp.exp2(old_1T - new_1T)
        max_ref[h, :, queries] = new_1T
        if not tile.sum_on_mxu:
            sum_1T = weights_ST.sum(axis=0, keepdims=True)
            acc_ref[h, VALUE:, queries] = acc_ref[h, VALUE:, queries] * decay_1T + sum_1T
        return h, queries, weights_ST.astype(v_ref.dtype), decay_1T, v_VS

    def accumulate(h: int, queries: slice, weights_ST: Array, decay_1T: Array, v_VS: Array) -> None:
        rows = slice(0, v_VS.shape[0])
        acc_VT = acc_ref[h, rows, queries] * decay_1T
        acc_ref[h, rows, queries] = acc_VT + dot(v_VS, weights_ST)

    def take_held() -> tuple[list[Any], list[Any]]:
        """Returns the tiles that the step before has left: with scores, and with weights."""
        if not held.items:
            return [], []
        scores_ref, weights_ref, decay_ref, values_ref = held_refs
        lag = held.lag
        return (
            [(*held.items[lag + n], scores_ref[n], values_ref[lag + n]) for n in range(lag)],
            [(*held.items[n], weights_ref[n], decay_ref[n], values_ref[n]) for n in range(lag)],
        )

    def hold(scored: list[Any], weighted: list[Any]) -> None:
        assert [item[:2] for item in weighted + scored] == held.items
        scores_ref, weights_ref, decay_ref, values_ref = held_refs
        for n in range(held.lag):
            *_, scores_ref[n], values_ref[held.lag + n] = scored[n]
            *_, weights_ref[n], decay_ref[n], values_ref[n] = weighted[n]

    def drain(scored: list[Any], weighted: list[Any]) -> None:
        for item in scored:
            weighted.append(softmax(*item))
            accumulate(*weighted.pop(0))
        for item in weighted:
            accumulate(*item)

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
            # The scale is the scores', not the queries': rounding it into these would make an error
            # that grows with the scores, and that the backward pass does not make.
            scores_ST = dot(k_SK, q_ref[h, :, queries]) * (scale * LOG2E)
            return mask.apply(scores_ST, queries, keys)

        scored, weighted = take_held()
        for h, queries, keys in mask.tiles(tile, shape.heads):
            v_VS = values(h, keys.start, keys.stop)
            scored.append((h, queries, scores(h, queries, keys), v_VS))
            if len(scored) > held.lag:
                weighted.append(softmax(*scored.pop(0)))
            if len(weighted) > held.lag:
                accumulate(*weighted.pop(0))
        if held.items:
            hold(scored, weighted)
        else:
            drain(scored, weighted)

    for kind in table.kinds:
        pl.when((info & blocks.KIND_BITS) == kind)(functools.partial(attend, kind))

    @pl.when((info & blocks.OUTER_LAST) != 0)
    def _finish() -> None:
        drain(*take_held())
        for h in range(shape.heads):
            seen_1T = max_ref[h] > MASKED / 2
            sum_1T = jnp.where(seen_1T, acc_ref[h, VALUE : VALUE + 1], 1.0)
            out_VT = jnp.where(seen_1T, acc_ref[h, :VALUE] / sum_1T, 0.0)
            out_ref[0, :, h * VALUE : (h + 1) * VALUE] = out_VT.T.astype(out_ref.dtype)
            lse_1T = max_ref[h] / LOG2E + jnp.log(sum_1T)
            lse_ref[0, 0, h : h + 1] = jnp.where(seen_1T, lse_1T, -jnp.inf)
