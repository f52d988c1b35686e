"""Absorbed decode over the paged latent cache as a Pallas kernel for TPUs (Mosaic).

How it is laid out, and why:

- All heads of all query tokens of a sequence are the rows of one matmul: the latent is fetched once
  for them, and the kernel is bound by that read.
- Pages are copied by hand, several blocks of pages ahead and across the sequences' borders, so that
  the memory never waits for a sequence to begin. Pages past a sequence's end are not fetched.
- Scores of a block are computed while the block before it is weighted and summed.
- A chip whose two cores share a kernel (v5p) takes a part of every sequence on each core; the parts
  are merged by their log-sum-exp.
- The 64 rotary lanes of a page lie in memory as 128, so a token is read as 1,280 bytes of bfloat16
  and not as 1,152. Scales of quantised latents are gathered outside; they apply to the scores and
  to the weights, so the latents themselves are only widened.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from pallas_kernels.chips import TPU_LANES
from pallas_kernels.manual_axes import output_like
from pallas_kernels.mla_decode.limits import TPU_MAX_TABLE
from pallas_kernels.mla_decode.merge import merge_partial_attention
from pallas_kernels.mla_decode.pages import LatentPages
from pallas_kernels.mla_decode.tiles import TPU, TPU_VMEM_BYTES, TpuTile
from pallas_kernels.softmax import LOG2E, MASKED
from pallas_kernels.tpu_parts import dot

ROWS = 16  # Rows of a register of bfloat16.


def decode(
    q_latent_BTHC: Array,
    q_rope_BTHR: Array,
    pages: LatentPages,
    page_table_BP: Array,
    lengths_B: Array,
    *,
    scale: float,
    tile: TpuTile = TPU,
    max_table: int = TPU_MAX_TABLE,
    interpret: Any = False,
) -> tuple[Array, Array]:
    """Attends from the last tokens to the cached latents; the arguments are `mla_decode`'s.

    Scalar memory holds `max_table` entries of the page table, so of more sequences a kernel takes
    as many as fit.
    """
    most = max(1, max_table // page_table_BP.shape[1])
    if most < page_table_BP.shape[0]:
        arrays = (q_latent_BTHC, q_rope_BTHR, page_table_BP, lengths_B)
        results = []
        for first in range(0, page_table_BP.shape[0], most):
            q_latent, q_rope, table, lengths = (x[first : first + most] for x in arrays)
            results.append(
                decode(
                    q_latent, q_rope, pages, table, lengths,
                    scale=scale, tile=tile, max_table=max_table, interpret=interpret,
                )
            )  # fmt: skip
        out, lse = (jnp.concatenate(x) for x in zip(*results, strict=True))
        return out, lse
    B, T, H, C = q_latent_BTHC.shape
    # A pool made for TPUs holds rotary keys of 128 lanes, of which those past the query's are 0.
    R = max(q_rope_BTHR.shape[-1], pages.rope.shape[-1])
    rows = -(-T * H // ROWS) * ROWS
    table_tokens = page_table_BP.shape[1] * pages.page_size
    block_pages = max(1, min(tile.block_tokens // pages.page_size, page_table_BP.shape[1]))
    splits = (
        tile.splits
        if tile.splits * tile.min_split_blocks * block_pages <= page_table_BP.shape[1]
        else 1
    )
    geometry = _Geometry(B, T, H, page_table_BP.shape[1], pages.page_size, block_pages, splits)

    def flat(q_BTHX: Array, width: int) -> Array:
        q_BMX = q_BTHX.reshape(B, T * H, -1)
        return jnp.pad(q_BMX, ((0, 0), (0, rows - T * H), (0, width - q_BMX.shape[-1])))

    operands = [flat(q_latent_BTHC, C), flat(q_rope_BTHR, R), pages.latent, pages.rope]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    specs = [
        pl.BlockSpec((1, rows, C), lambda s, b, *_: (b, 0, 0)),
        pl.BlockSpec((1, rows, R), lambda s, b, *_: (b, 0, 0)),
        anywhere,
        anywhere,
    ]
    if pages.scale is not None:
        padded = geometry.blocks * geometry.block_tokens
        scale_BS = pages.scale[page_table_BP].reshape(B, table_tokens)
        # Those after the end may be anything, NaN too, and 0 * NaN is NaN.
        cached_BS = jnp.arange(table_tokens) < lengths_B[:, None]
        scale_BS = jnp.where(cached_BS, scale_BS, 0.0)[:, None]
        operands.append(jnp.pad(scale_BS, ((0, 0), (0, 0), (0, padded - table_tokens))))
        specs.append(pl.BlockSpec((1, 1, padded), lambda s, b, *_: (b, 0, 0)))
    f32 = jnp.float32
    out_XBMC, lse_XBM = pl.pallas_call(
        functools.partial(_kernel, geometry=geometry, tile=tile, scale=scale),
        out_shape=(
            output_like(q_latent_BTHC, (splits, B, rows, C), q_latent_BTHC.dtype),
            output_like(q_latent_BTHC, (splits, B, 1, rows), f32),
        ),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(splits, B),
            in_specs=specs,
            out_specs=(
                pl.BlockSpec((1, 1, rows, C), lambda s, b, *_: (s, b, 0, 0)),
                pl.BlockSpec((1, 1, 1, rows), lambda s, b, *_: (s, b, 0, 0)),
            ),
            scratch_shapes=[
                pltpu.VMEM((tile.buffers, geometry.block_tokens, C), pages.latent.dtype),
                pltpu.VMEM((tile.buffers, geometry.block_tokens, R), pages.rope.dtype),
                pltpu.SemaphoreType.DMA((tile.buffers,)),
                pltpu.SMEM((3,), jnp.int32),
                pltpu.VMEM((rows, TPU_LANES), f32),
                pltpu.VMEM((rows, TPU_LANES), f32),
                pltpu.VMEM((rows, C), f32),
            ],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"), vmem_limit_bytes=TPU_VMEM_BYTES
        ),
        interpret=interpret,
        name="mla_decode",
    )(page_table_BP.reshape(-1), lengths_B, *operands)
    out_XBTHC = out_XBMC[:, :, : T * H].reshape(splits, B, T, H, C)
    lse_XBTH = lse_XBM[:, :, 0, : T * H].reshape(splits, B, T, H)
    if splits == 1:
        return out_XBTHC[0], lse_XBTH[0]
    return merge_partial_attention(out_XBTHC, lse_XBTH)


@dataclasses.dataclass(frozen=True)
class _Geometry:
    """The sizes that the kernel's loops depend on."""

    batch: int
    num_tokens: int
    num_heads: int
    table_pages: int
    page_size: int
    block_pages: int
    splits: int

    @property
    def block_tokens(self) -> int:
        return self.block_pages * self.page_size

    @property
    def blocks(self) -> int:
        """Blocks in the page table of a sequence."""
        return -(-self.table_pages // self.block_pages)

    def split_blocks(self, length: Any, split: Any) -> tuple[Any, Any]:
        """Returns the first block and the number of blocks, one at least, of a sequence's part."""
        tokens = jnp.minimum(length, self.table_pages * self.page_size)
        total = jnp.maximum(pl.cdiv(tokens, self.block_tokens), 1)
        part = pl.cdiv(total, self.splits)
        first = split * part
        return first, jnp.clip(total - first, 1, part)


def _kernel(
    table_ref: Any,
    lengths_ref: Any,
    q_latent_ref: Any,
    q_rope_ref: Any,
    latent_hbm_ref: Any,
    rope_hbm_ref: Any,
    *refs: Any,
    geometry: _Geometry,
    tile: TpuTile,
    scale: float,
) -> None:
    *scale_refs, out_ref, lse_ref, latent_ref, rope_ref, semaphores = refs[:-4]
    cursor_ref, max_ref, sum_ref, acc_ref = refs[-4:]
    split, batch = pl.program_id(0), pl.program_id(1)
    block_tokens, page_size = geometry.block_tokens, geometry.page_size
    num_tokens, num_heads = geometry.num_tokens, geometry.num_heads
    rows = q_latent_ref.shape[1]
    # The cursor: the sequence and its block to be fetched next, and blocks taken so far.
    SEQUENCE, BLOCK, TAKEN = range(3)

    def copies(sequence: Any, page: Any, p: int, slot: Any) -> list[Any]:
        """Returns the copies that bring a sequence's page to the p-th place of a slot."""
        index = table_ref[sequence * geometry.table_pages + page]
        here = pl.ds(p * page_size, page_size)
        return [
            pltpu.make_async_copy(source.at[index], target.at[slot, here], semaphores.at[slot])
            for source, target in ((latent_hbm_ref, latent_ref), (rope_hbm_ref, rope_ref))
        ]

    def each_page(sequence: Any, block: Any, slot: Any, act: Any, act_on_all: Any) -> None:
        """Applies `act` to the copies of a block's pages, or `act_on_all` where it needs all."""
        length = lengths_ref[sequence]
        first_block, _ = geometry.split_blocks(length, split)
        first_page = (first_block + block) * geometry.block_pages
        end = jnp.minimum(pl.cdiv(length, page_size), geometry.table_pages)
        needs_all = first_page + geometry.block_pages <= end
        pl.when(needs_all)(functools.partial(act_on_all, sequence, first_page, slot))

        @pl.when(~needs_all)
        def _some() -> None:
            for p in range(geometry.block_pages):

                @pl.when(first_page + p < end)
                def _one(p: int = p) -> None:
                    for copy in copies(sequence, first_page + p, p, slot):
                        act(copy)

    def start_all(sequence: Any, first_page: Any, slot: Any) -> None:
        for p in range(geometry.block_pages):
            for copy in copies(sequence, first_page + p, p, slot):
                copy.start()

    def wait_all(sequence: Any, first_page: Any, slot: Any) -> None:
        # One wait for as many bytes as all the pages have.
        del sequence, first_page
        for ref in (latent_ref, rope_ref):
            pltpu.make_async_copy(ref.at[slot], ref.at[slot], semaphores.at[slot]).wait()

    def fetch_next(slot: Any) -> None:
        sequence, block = cursor_ref[SEQUENCE], cursor_ref[BLOCK]

        @pl.when(sequence < geometry.batch)
        def _fetch() -> None:
            each_page(sequence, block, slot, lambda copy: copy.start(), start_all)
            _, count = geometry.split_blocks(lengths_ref[sequence], split)
            done = block + 1 == count
            cursor_ref[SEQUENCE] = jnp.where(done, sequence + 1, sequence)
            cursor_ref[BLOCK] = jnp.where(done, 0, block + 1)

    @pl.when(batch == 0)
    def _start() -> None:
        for n in range(3):
            cursor_ref[n] = 0
        for slot in range(tile.buffers - 1):
            fetch_next(slot)

    max_ref[...] = jnp.full_like(max_ref, MASKED)
    sum_ref[...] = jnp.zeros_like(sum_ref)
    acc_ref[...] = jnp.zeros_like(acc_ref)
    length = lengths_ref[batch]
    # The table may end before the sequence does, and within a block.
    num_keys = jnp.minimum(length, geometry.table_pages * page_size)
    first_block, num_blocks = geometry.split_blocks(length, split)
    q_latent_MC, q_rope_MR = q_latent_ref[0], q_rope_ref[0]
    compute_dtype = q_latent_MC.dtype

    def attend(block: Any, slot: Any, *, edge: bool) -> None:
        first_token = (first_block + block) * block_tokens

        def latents(start: int, stop: int) -> Array:
            latent_SC = latent_ref[slot, start:stop].astype(compute_dtype)
            # Slots after the end may hold anything, NaN too.
            return jnp.where(cached(start, stop), latent_SC, 0) if edge else latent_SC

        def cached(start: int, stop: int) -> Array:
            token_S1 = jax.lax.broadcasted_iota(jnp.int32, (stop - start, 1), 0)
            return token_S1 + (first_token + start) < num_keys

        def key_scale(start: int, stop: int) -> list[Array]:
            here = pl.ds(pl.multiple_of(first_token + start, page_size), stop - start)
            return [scale_ref[0, :, here] for scale_ref in scale_refs]

        def scores(start: int, stop: int) -> Array:
            rope_SR = rope_ref[slot, start:stop].astype(compute_dtype)
            if edge:
                rope_SR = jnp.where(cached(start, stop), rope_SR, 0)
            scores_MS = dot(q_latent_MC, latents(start, stop), transpose_rhs=True)
            for scale_1S in key_scale(start, stop):
                scores_MS = scores_MS * scale_1S
            return scores_MS + dot(q_rope_MR, rope_SR, transpose_rhs=True)

        def softmax(start: int, stop: int, scores_MS: Array) -> tuple[Array, Array]:
            if edge:
                row_M1 = jax.lax.broadcasted_iota(jnp.int32, (rows, 1), 0)
                query_M1 = jnp.zeros_like(row_M1)
                for t in range(1, num_tokens):
                    query_M1 = query_M1 + (row_M1 >= t * num_heads).astype(jnp.int32)
                token_MS = jax.lax.broadcasted_iota(jnp.int32, scores_MS.shape, 1)
                last_M1 = jnp.minimum(length - num_tokens + query_M1, num_keys - 1)
                last_M1 = last_M1 - (first_token + start)
                scores_MS = jnp.where(token_MS <= last_M1, scores_MS, MASKED)
            old_M1 = max_ref[:, :1]
            new_M1 = jnp.maximum(old_M1, scores_MS.max(axis=1, keepdims=True))
            weights_MS = jnp.exp2((scores_MS - new_M1) * (scale * LOG2E))
            decay_M1 = jnp.exp2((old_M1 - new_M1) * (scale * LOG2E))
            sum_M1 = sum_ref[:, :1] * decay_M1 + weights_MS.sum(axis=1, keepdims=True)
            max_ref[...] = jnp.broadcast_to(new_M1, max_ref.shape)
            sum_ref[...] = jnp.broadcast_to(sum_M1, sum_ref.shape)
            for scale_1S in key_scale(start, stop):
                weights_MS = weights_MS * scale_1S
            return weights_MS.astype(compute_dtype), decay_M1

        def accumulate(start: int, stop: int, weights_MS: Array, decay_M1: Array) -> None:
            acc_ref[...] = acc_ref[...] * decay_M1 + dot(weights_MS, latents(start, stop))

        # The next chunk's scores are issued before this one's softmax, to overlap with it.
        starts = range(0, block_tokens, tile.chunk_tokens)
        chunks = [(start, min(start + tile.chunk_tokens, block_tokens)) for start in starts]
        ready = scores(*chunks[0])
        for n, chunk in enumerate(chunks):
            current = ready
            if n + 1 < len(chunks):
                ready = scores(*chunks[n + 1])
            accumulate(*chunk, *softmax(*chunk, current))

    @pl.loop(0, num_blocks)
    def _block(block: Any) -> None:
        taken = cursor_ref[TAKEN]
        slot = jax.lax.rem(taken, tile.buffers)
        fetch_next(jax.lax.rem(taken + tile.buffers - 1, tile.buffers))
        each_page(batch, block, slot, lambda copy: copy.wait(), wait_all)
        last_token = (first_block + block + 1) * block_tokens - 1
        whole = last_token <= jnp.minimum(length - num_tokens, geometry.table_pages * page_size - 1)
        pl.when(whole)(functools.partial(attend, block, slot, edge=False))
        pl.when(~whole)(functools.partial(attend, block, slot, edge=True))
        cursor_ref[TAKEN] = taken + 1

    seen_ML = max_ref[...] > MASKED / 2
    sum_ML = jnp.where(seen_ML, sum_ref[...], 1.0)
    out_MC = jnp.where(seen_ML[:, :1], acc_ref[...] / sum_ML[:, :1], 0.0)
    out_ref[0, 0] = out_MC.astype(out_ref.dtype)
    lse_ML = jnp.where(seen_ML, max_ref[...] * scale + jnp.log(sum_ML), -jnp.inf)
    lse_ref[0, 0] = lse_ML.T[:1]
