"""Absorbed decode for Hopper: Pallas on Mosaic GPU (sm_90a).

A tile of 64 query rows (query tokens times heads) attends to its keys 128 at a time. Two compute
warpgroups each hold one half of the 64 x 512 float32 accumulator; warpgroup 0 computes the scores
of the even block of 64 keys and warpgroup 1 those of the odd one, and both multiply both blocks'
probabilities with their half of the latents. In turns: the even scores come first, so that their
softmax runs under the odd scores' products, and the odd softmax under those of the even
probabilities. A third warpgroup loads the pages through the table with TMA, and asks for the next
ones in the second-level cache.

The work, pairs of pages over all sequences, is cut into equal ranges, one per streaming
multiprocessor (`plan_work`). A sequence that spans several ranges leaves partial results, which a
second kernel merges through their log-sum-exp. Where there is more than one tile of rows, two
thread blocks form a cluster and load each other's keys: half of every block each.

Few query rows, and latents of 8 bits, go to `hopper_narrow`.
"""

import dataclasses
import functools

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from pallas_kernels.chips import num_sms
from pallas_kernels.hopper_parts import COMPILER_PARAMS, finish, tiled_smem
from pallas_kernels.mla_decode.hopper_accumulators import opaque, rescaled
from pallas_kernels.mla_decode.hopper_narrow import attend_narrow
from pallas_kernels.mla_decode.hopper_split import UNIT, merge_pieces, part_bound, plan_work
from pallas_kernels.mla_decode.limits import HOPPER_KEYS as KEYS
from pallas_kernels.mla_decode.limits import KV_RANK, ROPE_DIM
from pallas_kernels.mla_decode.pages import LatentPages
from pallas_kernels.mla_decode.tiles import HOPPER, HopperTile
from pallas_kernels.softmax import LOG2E, MASKED

ROWS = 64  # Rows of a tile: the M of a wgmma.
HALF = KV_RANK // 2
# Powers of 2 that a score may lie above the maximum before that is raised.
MAX_SLACK = 8.0
CLUSTER = 2  # Thread blocks that load keys together.
COMPUTE_REGISTERS, COPY_REGISTERS = 232, 40


def decode(
    q_latent_BTHC: Float[Array, "B T H C"],
    q_rope_BTHR: Float[Array, "B T H R"],
    pages: LatentPages,
    page_table_BP: Int[Array, "B P"],
    lengths_B: Int[Array, " B"],
    *,
    scale: float,
    tile: HopperTile = HOPPER,
) -> tuple[Float[Array, "B T H C"], Float[Array, "B T H"]]:
    """Computes `mla_decode` on a Hopper GPU."""
    batch_size, num_tokens, num_heads, _ = q_latent_BTHC.shape
    num_rows = num_tokens * num_heads
    # Query tokens and heads are one dim of rows: they share the keys.
    q_latent_BMC = q_latent_BTHC.reshape(batch_size, num_rows, KV_RANK)
    q_rope_BMR = q_rope_BTHR.reshape(batch_size, num_rows, ROPE_DIM)

    if num_rows <= tile.narrow_rows or pages.quantised:
        out_BMC, lse_BM = attend_narrow(
            q_latent_BMC,
            q_rope_BMR,
            pages,
            page_table_BP,
            lengths_B,
            scale=scale,
            num_tokens=num_tokens,
            tile=dataclasses.replace(tile, num_sms=min(tile.num_sms, num_sms())),
        )
        lse_BTH = lse_BM.reshape(batch_size, num_tokens, num_heads)
        return out_BMC.reshape(q_latent_BTHC.shape), lse_BTH
    num_parts = max(1, tile.num_sms // pl.cdiv(num_rows, ROWS))
    capacity = page_table_BP.shape[1] * pages.page_size
    plan = plan_work(lengths_B, capacity, num_parts)
    outs = _attend(
        plan,
        lengths_B,
        page_table_BP,
        q_latent_BMC,
        q_rope_BMR,
        pages,
        scale=scale,
        num_tokens=num_tokens,
        num_parts=num_parts,
    )
    out_BMC, lse_BM = merge_pieces(*outs, plan, num_rows, num_parts, tile)
    out_BMC, lse_BM = out_BMC[:, :num_rows], lse_BM[:, :num_rows]
    return out_BMC.reshape(q_latent_BTHC.shape), lse_BM.reshape(batch_size, num_tokens, num_heads)


def _attend(
    plan: tuple[Array, Array],
    lengths_B: Array,
    page_table_BP: Array,
    q_latent_BMC: Array,
    q_rope_BMR: Array,
    pages: LatentPages,
    *,
    scale: float,
    num_tokens: int,
    num_parts: int,
) -> tuple[Array, Array, Array, Array]:
    """Attends; returns (out, lse) of the sequences in one piece and (out, lse) of all pieces."""
    batch_size, num_rows, _ = q_latent_BMC.shape
    num_heads = num_rows // num_tokens
    num_tiles = pl.cdiv(num_rows, ROWS)
    tile_rows = min(num_rows, ROWS)
    # TMA does not keep the last tile's rows out of what follows them, so there is room for all.
    padded_rows = num_tiles * tile_rows
    page_size = pages.page_size
    blocks_per_page = page_size // KEYS
    capacity = page_table_BP.shape[1] * page_size
    dtype = q_latent_BMC.dtype
    # Two tiles of a sequence's rows use the same keys: each block loads half, for both.
    cluster = CLUSTER if num_tiles % CLUSTER == 0 else 1
    peers = ("peer",) if cluster > 1 else None  # The name of the axis within a cluster.
    row_layout = plgpu.Layout.WGMMA.reduce(1)
    log2_scale = scale * LOG2E

    def body(*refs) -> None:
        starts_ref, firsts_ref, lengths_ref, table_ref, *inputs = refs[:8]
        ql_gmem, qr_gmem, latent_gmem, rope_gmem = inputs
        out_gmem, lse_gmem, piece_out_gmem, piece_lse_gmem = refs[8:12]
        (
            (ql_smem, ql_stage),
            (qr_smem, qr_stage),
            q_rope_smem,
            left_smem,
            right_smem,
            rope_smem,
            max_smem,
            sum_smem,
            lse_smem,
            q_full,
            q_empty,
            left_full,
            right_full,
            rope_full,
            left_empty,
            right_empty,
            probs_ready,
            sum_ready,
            even_started,
            scored,
        ) = refs[12:]
        block = lax.axis_index("block")
        if cluster > 1:
            block = block * cluster + lax.axis_index("peer")
        part, tile = lax.div(block, num_tiles), lax.rem(block, num_tiles)
        warpgroup = lax.axis_index("warpgroup")
        tile_row = tile * ROWS
        total = starts_ref[batch_size]
        begin_bound = part_bound(part, total, num_parts)
        end_bound = part_bound(part + 1, total, num_parts)
        first_sequence, end_sequence = firsts_ref[part], firsts_ref[part + 1]
        # One past the last sequence of this part, whose end may lie within a sequence.
        end_sequence += (starts_ref[end_sequence] < end_bound).astype(jnp.int32)
        end_sequence = jnp.where(begin_bound < end_bound, end_sequence, first_sequence)

        def extent(sequence):
            """Returns the units of a sequence that are this part's, and whether that is all."""
            start, end = starts_ref[sequence], starts_ref[sequence + 1]
            begin, stop = jnp.maximum(start, begin_bound), jnp.minimum(end, end_bound)
            return begin - start, stop - start, jnp.logical_and(begin == start, stop == end)

        def start_scores(s_ref, side, half):
            """Starts the products of a block's keys with one half of the queries."""
            here, only = opaque(side), opaque(0)
            full, q_smem, k_smem = (
                (left_full, ql_smem, left_smem),
                (right_full, qr_smem, right_smem),
                (rope_full, q_rope_smem, rope_smem),
            )[half]
            plgpu.barrier_wait(full.at[side])
            plgpu.wgmma(s_ref, q_smem.at[only], k_smem.at[here].transpose((1, 0)))

        def mask(s, side, num_seen, num_keys, unit):
            """Hides the keys that a row does not see."""
            first_key = unit * UNIT + side * KEYS

            def hide(s):
                row = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 0, layout=plgpu.Layout.WGMMA)
                key = plgpu.broadcasted_iota(jnp.int32, (ROWS, KEYS), 1, layout=plgpu.Layout.WGMMA)
                token = lax.div(row + tile_row, jnp.int32(num_heads))
                limit = jnp.minimum(num_seen + token, num_keys)
                return jnp.where(key + first_key < limit, s, -jnp.inf)

            hidden = first_key + KEYS > jnp.minimum(num_seen, num_keys)
            return lax.cond(hidden, hide, lambda s: s, s)

        def clear_uncached(k_smem, side, num_keys, unit):
            """Zeroes the latents after the sequence's end: they may be NaN, and 0 * NaN is NaN."""
            num_cached = num_keys - (unit * UNIT + side * KEYS)

            @pl.when(num_cached < KEYS)
            def _():
                for column in range(0, HALF, 64):
                    chunk = k_smem.at[side, :, pl.ds(column, 64)]
                    key = plgpu.broadcasted_iota(
                        jnp.int32, (KEYS, 64), 0, layout=plgpu.Layout.WGMMA
                    )
                    values = plgpu.load(chunk, layout=plgpu.Layout.WGMMA)
                    chunk[...] = jnp.where(key < num_cached, values, jnp.zeros_like(values))
                plgpu.commit_smem()

        def raised(old_max, block_max):
            """Returns a row's new maximum: the old one, where that is nearly as large.

            Any number of that size will do, and where it stays, nothing need be scaled.
            """
            return jnp.where(block_max > old_max + MAX_SLACK, block_max, old_max)

        def store(side, sequence, acc, row_max, row_sum, whole):
            """Writes this warpgroup's half of the rows, and their log-sum-exp from the second."""
            stage = (ql_smem, qr_smem)[side].at[0]
            wide_stage = (ql_stage, qr_stage)[side]
            sum_smem.at[side][...] = row_sum
            plgpu.barrier_arrive(sum_ready.at[side])
            plgpu.barrier_wait(sum_ready.at[1 - side])
            row_sum += plgpu.load(sum_smem.at[1 - side], layout=row_layout)
            seen = row_sum > 0
            inverse = jnp.where(seen, 1.0 / row_sum, 0.0)
            acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            rows = pl.ds(0, tile_rows)
            slot = part + sequence

            @pl.when(whole)
            def _():
                stage[...] = acc.astype(dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(
                    stage.at[rows],
                    out_gmem.at[sequence, pl.ds(tile_row, tile_rows), pl.ds(side * HALF, HALF)],
                )
                plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            @pl.when(jnp.logical_not(whole))
            def _():
                for quarter in range(2):
                    width = HALF // 2
                    wide_stage[...] = acc[:, quarter * width : (quarter + 1) * width]
                    plgpu.commit_smem()
                    plgpu.copy_smem_to_gmem(
                        wide_stage.at[rows],
                        piece_out_gmem.at[
                            slot,
                            pl.ds(tile_row, tile_rows),
                            pl.ds(side * HALF + quarter * width, width),
                        ],
                    )
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)

            if side == 1:
                lse = jnp.where(seen, row_max * (1 / LOG2E) + jnp.log(row_sum), -jnp.inf)
                lse_smem[...] = lse
                plgpu.commit_smem()

                @pl.when(whole)
                def _():
                    plgpu.copy_smem_to_gmem(
                        lse_smem.at[rows], lse_gmem.at[sequence, pl.ds(tile_row, tile_rows)]
                    )

                @pl.when(jnp.logical_not(whole))
                def _():
                    plgpu.copy_smem_to_gmem(
                        lse_smem.at[rows], piece_lse_gmem.at[slot, pl.ds(tile_row, tile_rows)]
                    )

                plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            plgpu.barrier_arrive(q_empty)

        def attend(side):
            """Takes the blocks of one side and this warpgroup's half of the latents of both."""
            plgpu.set_max_registers(COMPUTE_REGISTERS, action="increase")
            half_smem = (left_smem, right_smem)[side]
            half_empty = (left_empty, right_empty)[side]

            @pl.loop(first_sequence, end_sequence)
            def _sequence(sequence):
                begin, end, whole = extent(sequence)
                length = lengths_ref[sequence]
                num_keys = jnp.clip(length, 0, capacity)
                num_seen = length - (num_tokens - 1)  # Keys that the first query sees.
                plgpu.barrier_wait(q_full)

                def exponentials(s, top):
                    return jnp.exp2(s * log2_scale - lax.broadcast_in_dim(top, s.shape, [0]))

                def publish(p, top):
                    """Shares a block's probabilities, in the place of its rotary keys."""
                    max_smem.at[side][...] = top
                    # All threads have read the rotary keys.
                    plgpu.barrier_wait(scored.at[side])
                    rope_smem.at[side][...] = p
                    plgpu.commit_smem()
                    plgpu.barrier_arrive(probs_ready.at[side])

                def other_max():
                    plgpu.barrier_wait(probs_ready.at[1 - side])
                    return plgpu.load(max_smem.at[1 - side], layout=row_layout)

                def multiply(acc_ref, probs, block):
                    """Starts a product; no probabilities: those that the other warpgroup left."""
                    here = opaque(block)
                    probs = rope_smem.at[here] if probs is None else probs
                    plgpu.wgmma(acc_ref, probs, half_smem.at[here])

                def free(block):
                    plgpu.barrier_arrive(half_empty.at[block])

                def scores(acc_ref=None):
                    """Returns the next scores; gives back the last product's keys meanwhile."""

                    def products(s_ref):
                        start_scores(s_ref, side, side)
                        if acc_ref is not None:
                            finish(acc_ref, 1)
                            free(1)
                        start_scores(s_ref, side, 1 - side)
                        if side == 0:  # What is left keeps the tensor cores until then.
                            plgpu.barrier_arrive(even_started)
                        start_scores(s_ref, side, 2)
                        s = finish(s_ref, 0)
                        plgpu.barrier_arrive(scored.at[side])
                        return s

                    return pl.run_scoped(products, plgpu.ACC((ROWS, KEYS), jnp.float32))

                def masked(s, unit, last):
                    # Only the last unit holds keys that the last query does not see.
                    if last or num_tokens > 1:
                        s = mask(s, side, num_seen, num_keys, unit)
                    return s

                def clear(block, last):
                    """Clears a block whose scores have been computed, so that it is all there."""
                    if last:
                        clear_uncached(half_smem, block, num_keys, end - 1)

                def even(acc_ref, s, old_max, row_sum, last):
                    even_max = raised(old_max, s.max(axis=1) * log2_scale)
                    p = exponentials(s, even_max)
                    probs = p.astype(dtype)
                    publish(probs, even_max)
                    clear(0, last)
                    decay = jnp.exp2(old_max - even_max)
                    acc_ref[...] = rescaled(finish(acc_ref, 0), decay)
                    multiply(acc_ref, probs, 0)
                    row_sum = row_sum * decay + p.sum(axis=1)
                    acc = finish(acc_ref, 0)
                    free(0)
                    odd_max = other_max()
                    clear(1, last)
                    decay = jnp.exp2(even_max - odd_max)
                    acc_ref[...] = rescaled(acc, decay)
                    multiply(acc_ref, None, 1)
                    return odd_max, row_sum * decay

                def odd(acc_ref, s, old_max, row_sum, last):
                    own_max = s.max(axis=1) * log2_scale
                    clear(1, last)
                    even_max = other_max()
                    clear(0, last)
                    acc_ref[...] = rescaled(finish(acc_ref, 0), jnp.exp2(old_max - even_max))
                    multiply(acc_ref, None, 0)
                    odd_max = raised(even_max, own_max)
                    p = exponentials(s, odd_max)
                    probs = p.astype(dtype)
                    publish(probs, odd_max)
                    row_sum = row_sum * jnp.exp2(old_max - odd_max) + p.sum(axis=1)
                    acc = finish(acc_ref, 0)
                    free(0)
                    acc_ref[...] = rescaled(acc, jnp.exp2(even_max - odd_max))
                    multiply(acc_ref, probs, 1)
                    return odd_max, row_sum

                def attend_keys(acc_ref):
                    def even_step(unit, carry):
                        s, row_max, row_sum = carry
                        s = masked(s, unit, last=False)
                        row_max, row_sum = even(acc_ref, s, row_max, row_sum, last=False)
                        return scores(acc_ref), row_max, row_sum

                    def odd_step(unit, carry):
                        row_max, row_sum = carry
                        plgpu.barrier_wait(even_started)
                        s = masked(scores(), unit, last=False)
                        row_max, row_sum = odd(acc_ref, s, row_max, row_sum, last=False)
                        finish(acc_ref, 0)
                        free(1)
                        return row_max, row_sum

                    row_max = plgpu.layout_cast(jnp.full((ROWS,), MASKED, jnp.float32), row_layout)
                    row_sum = plgpu.layout_cast(jnp.zeros((ROWS,), jnp.float32), row_layout)
                    if side == 0:
                        start = scores(), row_max, row_sum
                        s, row_max, row_sum = lax.fori_loop(begin, end - 1, even_step, start)
                    else:
                        sums = row_max, row_sum
                        row_max, row_sum = lax.fori_loop(begin, end - 1, odd_step, sums)
                        plgpu.barrier_wait(even_started)
                        s = scores()
                    s = masked(s, end - 1, last=True)
                    row_max, row_sum = (even, odd)[side](acc_ref, s, row_max, row_sum, last=True)
                    acc = finish(acc_ref, 0)
                    free(1)
                    return acc, row_max, row_sum

                acc, row_max, row_sum = pl.run_scoped(
                    attend_keys, plgpu.ACC((ROWS, HALF), jnp.float32)
                )
                store(side, sequence, acc, row_max, row_sum, whole)

        def copy():
            """Loads the queries of each sequence and its pages, block by block."""
            plgpu.set_max_registers(COPY_REGISTERS, action="decrease")

            @pl.loop(first_sequence, end_sequence)
            def _sequence(sequence):
                begin, end, _ = extent(sequence)
                last_key = jnp.clip(lengths_ref[sequence], 1, capacity) - 1
                last_column = lax.div(last_key, page_size)

                def load_queries():
                    source = (sequence, pl.ds(tile_row, tile_rows))
                    rows = pl.ds(0, tile_rows)
                    for side, q_smem in enumerate((ql_smem, qr_smem)):
                        columns = pl.ds(side * HALF, HALF)
                        plgpu.copy_gmem_to_smem(
                            ql_gmem.at[(*source, columns)], q_smem.at[0, rows], q_full
                        )
                    plgpu.copy_gmem_to_smem(qr_gmem.at[source], q_rope_smem.at[0, rows], q_full)

                def place(unit, side):
                    """Returns the page that a block lies in, and its first row there."""
                    index = unit * 2 + side
                    column = jnp.minimum(lax.div(index, blocks_per_page), last_column)
                    first_row = lax.rem(index, blocks_per_page) * KEYS
                    return table_ref[sequence, column], first_row

                @pl.loop(begin, end)
                def _unit(unit):
                    first = unit == begin
                    not_first = jnp.logical_or(sequence > first_sequence, unit > begin)
                    places = [place(unit, side) for side in range(2)]

                    def load_latent(side, half):
                        smem = (left_smem, right_smem)[half].at[side]
                        full = (left_full, right_full)[half].at[side]
                        empty = (left_empty, right_empty)[half].at[side]

                        @pl.when(not_first)
                        def _():
                            plgpu.barrier_wait(empty)

                        page, row = places[side]
                        source = latent_gmem.at[page, pl.ds(row, KEYS), pl.ds(half * HALF, HALF)]
                        plgpu.copy_gmem_to_smem(source, smem, full, collective_axes=peers)

                    def load_rope(side):
                        page, row = places[side]
                        source, smem = rope_gmem.at[page, pl.ds(row, KEYS)], rope_smem.at[side]
                        full = rope_full.at[side]
                        plgpu.copy_gmem_to_smem(source, smem, full, collective_axes=peers)

                    def prefetch(side):
                        """Brings the next unit's keys into the second-level cache."""

                        # One tile of a sequence reads its keys once, which is soon bound by memory.
                        @pl.when(jnp.logical_and(num_tiles > 1, unit + 1 < end))
                        def _():
                            page, row = place(unit + 1, side)
                            if cluster > 1:
                                row += lax.axis_index("peer") * (KEYS // cluster)
                            rows = pl.ds(row, KEYS // cluster)
                            for half in range(2):
                                columns = pl.ds(half * HALF, HALF)
                                plgpu.async_prefetch(latent_gmem.at[page, rows, columns])

                    # The first queries are not waited for; later ones follow the first pages,
                    # whose buffers are free before the previous queries' is.
                    pl.when(jnp.logical_not(not_first))(load_queries)
                    load_latent(0, 0)
                    load_latent(0, 1)
                    # A block's rotary keys give way to its probabilities, which both halves use.
                    load_rope(0)
                    prefetch(0)
                    load_latent(1, 1)
                    load_latent(1, 0)
                    load_rope(1)
                    prefetch(1)

                    @pl.when(jnp.logical_and(first, not_first))
                    def _():
                        plgpu.barrier_wait(q_empty)
                        load_queries()

            if cluster > 1:
                # A block must not end before its peer has arrived at its barriers.
                @pl.when(first_sequence < end_sequence)
                def _():
                    for empty in (left_empty, right_empty):
                        for side in range(2):
                            plgpu.barrier_wait(empty.at[side])

        pl.when(warpgroup == 0)(lambda: attend(0))
        pl.when(warpgroup == 1)(lambda: attend(1))
        pl.when(warpgroup == 2)(copy)

    def bf16(*shape):
        return tiled_smem(shape, dtype)

    def staged():
        return plgpu.RefUnion(bf16(1, ROWS, HALF), tiled_smem((ROWS, HALF // 2), jnp.float32))

    pair = functools.partial(plgpu.Barrier, num_barriers=2)

    def empty():
        if peers is None:
            return pair()
        return plgpu.ClusterBarrier(collective_axes=peers, num_barriers=2)

    num_slots = num_parts + batch_size
    kernel = plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((batch_size, padded_rows, KV_RANK), dtype),
            jax.ShapeDtypeStruct((batch_size, padded_rows), jnp.float32),
            jax.ShapeDtypeStruct((num_slots, padded_rows, KV_RANK), jnp.float32),
            jax.ShapeDtypeStruct((num_slots, padded_rows), jnp.float32),
        ],
        scratch_types=[
            staged(),
            staged(),
            bf16(1, ROWS, ROPE_DIM),
            bf16(2, KEYS, HALF),
            bf16(2, KEYS, HALF),
            bf16(2, KEYS, ROPE_DIM),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.SMEM((2, ROWS), jnp.float32),
            plgpu.SMEM((ROWS,), jnp.float32),
            plgpu.Barrier(num_arrivals=3),
            plgpu.Barrier(num_arrivals=2),
            *(make() for make in (pair, pair, pair, empty, empty, pair, pair, plgpu.Barrier, pair)),
        ],
        grid=(num_parts * num_tiles // cluster,),
        grid_names=("block",),
        cluster=(cluster,) if cluster > 1 else (),
        cluster_names=peers or (),
        num_threads=3,
        thread_name="warpgroup",
        compiler_params=COMPILER_PARAMS,
    )
    arguments = (*plan, lengths_B, page_table_BP, q_latent_BMC, q_rope_BMR)
    return tuple(kernel(*arguments, pages.latent, pages.rope))
