"""Absorbed decode for Hopper with few query rows: keys are the rows of the tensor core products.

A wgmma takes 64 rows, of which 16 heads fill a quarter. Here the scores are computed transposed,
keys x queries, and so are the latents' sums: a block of 64 keys fills the rows, the queries are
the columns, and nothing is wasted. What the queries no longer take of the shared memory holds more
keys in flight, so that the kernel is bound by reading the cache once.

One compute warpgroup takes block after block; a second one copies them, each in three parts, into
a ring. Latents of 8 bits are widened to bfloat16 in shared memory first, without their scales:
these multiply the scores and the probabilities.

A call is one launch. Each thread block finds its share of the work from the lengths (`find_share`).
Where a sequence lies in several pieces, its thread blocks leave them in device memory, wait for
each other and merge a share of its rows each. All are running then: there are no more of them than
multiprocessors.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental.mosaic import gpu as mgpu
from jaxtyping import Array

from pallas_kernels.hopper_parts import COMPILER_PARAMS, store_global, tiled_smem
from pallas_kernels.mla_decode.hopper_accumulators import opaque
from pallas_kernels.mla_decode.hopper_split import find_share, num_units, part_of
from pallas_kernels.mla_decode.limits import HOPPER_KEYS as KEYS
from pallas_kernels.mla_decode.limits import KV_RANK
from pallas_kernels.mla_decode.pages import LatentPages
from pallas_kernels.mla_decode.tiles import HopperTile
from pallas_kernels.softmax import LOG2E, MASKED

TILE = 64  # Columns of a tile in shared memory: 128 bytes.
LATENT_TILES = KV_RANK // TILE
NUM_TILES = LATENT_TILES + 1  # The last one holds the rotary keys.
PARTS = 3  # Parts of a block, each with a place in the ring; 8-bit blocks are not divided.
SHARED_BYTES = 232_448 - 4_096  # Less what barriers and reductions take.


def narrow_rows(num_rows: int) -> int:
    """Returns the query rows of a tile: the columns of the products."""
    return 16 if num_rows <= 16 else 32


def attend_narrow(
    q_latent_BMC: Array,
    q_rope_BMR: Array,
    pages: LatentPages,
    page_table_BP: Array,
    lengths_B: Array,
    *,
    scale: float,
    num_tokens: int,
    tile: HopperTile,
) -> tuple[Array, Array]:
    """Returns (out_BMC, lse_BM) of `mla_decode` over rows that are query tokens times heads."""
    batch_size, num_rows, _ = q_latent_BMC.shape
    num_heads = num_rows // num_tokens
    width = narrow_rows(num_rows)
    num_tiles = pl.cdiv(num_rows, width)
    tile_rows = min(num_rows, width)
    padded_rows = num_tiles * width
    num_parts = max(1, tile.num_sms // num_tiles)
    page_size = pages.page_size
    blocks_per_page = page_size // KEYS
    capacity = page_table_BP.shape[1] * page_size
    dtype = q_latent_BMC.dtype
    narrow_type = pages.latent.dtype if pages.quantised else None
    parts = 1 if pages.quantised else PARTS
    part_tiles = NUM_TILES // parts
    fixed_bytes, part_bytes = (NUM_TILES + 1) * width * TILE * 2, part_tiles * KEYS * TILE * 2
    if pages.quantised:
        fixed_bytes += LATENT_TILES * KEYS * TILE * 2
        part_bytes = (LATENT_TILES + 2) * KEYS * TILE + KEYS * 4
    num_places = (SHARED_BYTES - fixed_bytes) // part_bytes
    column_layout = plgpu.Layout.WGMMA.reduce(0)
    # How a sequence's pieces are merged: many by few numbers at a time, few by whole rows.
    pieces = pl.cdiv(num_parts, batch_size) + 1
    merge_rows, merge_width = (4, KV_RANK) if pieces <= 8 else (1, 128)
    merge_pieces = min(pieces, 4) if pieces <= 8 else min(pieces, tile.narrow_merge_pieces)
    num_shares = width // merge_rows * (KV_RANK // merge_width)

    def body(*refs) -> None:
        # Blocks may be placed while the launch before this one ends; here they wait for its end.
        plgpu.griddepcontrol_wait()
        lengths_ref, control_ref = refs[:2]
        q_gmem, q_rope_gmem, latent_gmem, rope_gmem, *scale_gmem = refs[2 : 6 + pages.quantised]
        refs = refs[6 + pages.quantised :]
        out_gmem, lse_gmem, piece_out_gmem, piece_lse_gmem = refs[:4]
        q_smem, probs_smem, full, empty, q_full, q_empty, ring_smem = refs[4:11]
        # Of 8-bit latents alone: themselves, their scales, and they as bfloat16.
        narrow_smem, scale_smem, wide_smem = refs[11:] or (None,) * 3
        done = control_ref.at[pl.ds(page_table_BP.size, batch_size * num_tiles)]
        block = lax.axis_index("block")
        part, tile = lax.div(block, num_tiles), lax.rem(block, num_tiles)
        tile_row = tile * width
        share = find_share(lengths_ref, batch_size, capacity, KEYS, part, num_parts)

        def each_sequence(body):
            """Calls body(sequence, its first unit, one past its last) for those of this part."""

            def step(sequence, start):
                end = start + num_units(lengths_ref[sequence], capacity, KEYS)
                body(sequence, start, end)
                return end

            lax.fori_loop(share.first_sequence, share.end_sequence, step, share.first_start)

        def extent(start, end):
            """Returns the units of a sequence that are this part's, and whether that is all."""
            begin, stop = jnp.maximum(start, share.begin), jnp.minimum(end, share.end)
            return begin - start, stop - start, jnp.logical_and(begin == start, stop == end)

        def place(start, unit, piece):
            """Returns a block's part's number in the order of loads, and its place in the ring."""
            order = (start + unit - share.begin) * parts + piece
            return order, lax.rem(order, num_places)

        def tile_of(start, unit, n):
            """Returns a tile of a block in bfloat16, the last one the rotary keys."""
            piece, j = divmod(n, part_tiles)
            _, slot = place(start, unit, piece)
            if narrow_smem is None:
                return ring_smem.at[slot, j]
            return ring_smem.at[slot, 0] if n == LATENT_TILES else wide_smem.at[opaque(0) + n]

        def over_rows(columns, shape):
            return lax.broadcast_in_dim(columns, shape, [1])

        def attend():
            @each_sequence
            def _sequence(sequence, start, stop):
                begin, end, whole = extent(start, stop)
                length = lengths_ref[sequence]
                num_keys = jnp.clip(length, 0, capacity)
                num_seen = length - (num_tokens - 1)  # Keys that the first query sees.
                plgpu.barrier_wait(q_full)

                def widen(unit):
                    """Awaits a block of 8-bit latents, makes them bfloat16; returns the scales."""
                    _, slot = place(start, unit, 0)
                    plgpu.barrier_wait(full.at[slot])
                    # All threads have left the block before.
                    plgpu.commit_smem()
                    for n in range(LATENT_TILES):
                        values = plgpu.load(
                            narrow_smem.at[slot, n], layout=plgpu.Layout.WGMMA_UPCAST_2X
                        )
                        if narrow_type != jnp.int8:
                            values = values.astype(jnp.float32)  # There is no direct conversion.
                        wide_smem.at[n][...] = values.astype(dtype)
                    plgpu.commit_smem()
                    row_layout = plgpu.Layout.WGMMA.reduce(1)
                    scales = plgpu.load(scale_smem.at[slot], layout=row_layout)
                    key = plgpu.broadcasted_iota(
                        jnp.int32, (KEYS, width), 0, layout=plgpu.Layout.WGMMA
                    )
                    scales = lax.broadcast_in_dim(scales, key.shape, [0])
                    # After the end they may be NaN, and 0 * NaN is NaN.
                    return jnp.where(key < num_keys - unit * KEYS, scales, 0.0)

                def scores(unit, key_scales):
                    """Returns a block's scaled scores in units of log 2, keys x queries."""

                    def products(tiles, acc_ref):
                        only = opaque(0)
                        for n in tiles:
                            if narrow_smem is None and n % part_tiles == 0:
                                _, slot = place(start, unit, n // part_tiles)
                                plgpu.barrier_wait(full.at[slot])
                            q = q_smem.at[only + n].transpose((1, 0))
                            plgpu.wgmma(acc_ref, tile_of(start, unit, n), q)
                        return acc_ref[...]

                    def product(*tiles):
                        acc = plgpu.ACC((KEYS, width), jnp.float32)
                        return pl.run_scoped(functools.partial(products, tiles), acc)

                    if key_scales is None:
                        s = product(*range(NUM_TILES))
                    else:
                        s = product(*range(LATENT_TILES)) * key_scales + product(LATENT_TILES)
                    s *= scale * LOG2E
                    first_key = unit * KEYS

                    def mask(s):
                        key, row = (
                            plgpu.broadcasted_iota(
                                jnp.int32, (KEYS, width), dim, layout=plgpu.Layout.WGMMA
                            )
                            for dim in range(2)
                        )
                        token = lax.div(row + tile_row, jnp.int32(num_heads))
                        limit = jnp.minimum(num_seen + token, num_keys)
                        return jnp.where(key + first_key < limit, s, -jnp.inf)

                    hidden = first_key + KEYS > jnp.minimum(num_seen, num_keys)
                    return lax.cond(hidden, mask, lambda s: s, s)

                def clear_uncached(unit):
                    """Zeroes latents after the end: they may be NaN, and 0 * NaN is NaN."""
                    num_cached = num_keys - unit * KEYS

                    @pl.when(num_cached < KEYS)
                    def _():
                        for n in range(LATENT_TILES):
                            chunk = tile_of(start, unit, n)
                            key = plgpu.broadcasted_iota(
                                jnp.int32, (KEYS, TILE), 0, layout=plgpu.Layout.WGMMA
                            )
                            values = plgpu.load(chunk, layout=plgpu.Layout.WGMMA)
                            zeros = jnp.zeros_like(values)
                            chunk[...] = jnp.where(key < num_cached, values, zeros)
                        plgpu.commit_smem()

                def step(unit, carry):
                    accs, old_max, p_sum = carry
                    key_scales = None if narrow_smem is None else widen(unit)
                    s = scores(unit, key_scales)
                    new_max = jnp.maximum(old_max, s.max(axis=0))
                    p = jnp.exp2(s - over_rows(new_max, s.shape))
                    decay = jnp.exp2(old_max - new_max)
                    weights = p if key_scales is None else p * key_scales
                    probs_smem.at[0].transpose((1, 0))[...] = _turned(weights.astype(dtype))
                    clear_uncached(unit)
                    plgpu.commit_smem()
                    decay = over_rows(decay, s.shape)

                    def product(acc_refs):
                        only = opaque(0)
                        probs = probs_smem.at[only].transpose((1, 0))
                        for n, acc_ref in enumerate(acc_refs):
                            k = tile_of(start, unit, n).transpose((1, 0))
                            plgpu.wgmma(acc_ref, k, probs)

                    accs = [plgpu.ACC.init(acc * decay) for acc in accs]
                    accs = pl.run_state(product)(tuple(accs))
                    for piece in range(parts):
                        _, slot = place(start, unit, piece)
                        plgpu.barrier_arrive(empty.at[slot])
                    return accs, new_max, p_sum * decay + p

                def initial():
                    zeros = jnp.zeros((TILE, width), jnp.float32)
                    zeros = plgpu.layout_cast(zeros, plgpu.Layout.WGMMA)
                    lowest = jnp.full((width,), MASKED, jnp.float32)
                    return (
                        (zeros,) * LATENT_TILES,
                        plgpu.layout_cast(lowest, column_layout),
                        zeros,
                    )

                accs, top, p_sum = lax.fori_loop(begin, end, step, initial())
                plgpu.barrier_arrive(q_empty)
                row_sum = p_sum.sum(axis=0)
                seen = row_sum > 0
                inverse = over_rows(jnp.where(seen, 1.0 / row_sum, 0.0), (TILE, width))
                lse = jnp.where(seen, top * (1 / LOG2E) + jnp.log(row_sum), -jnp.inf)
                slot = part + sequence
                rows = pl.ds(tile_row, width)

                @pl.when(whole)
                def _():
                    store_global(lse_gmem.at[sequence, rows], lse)
                    for n, acc in enumerate(accs):
                        target = out_gmem.at[sequence, rows, pl.ds(n * TILE, TILE)]
                        value = (acc * inverse).astype(dtype)
                        store_global(target.transpose((1, 0)), _turned(value))

                @pl.when(jnp.logical_not(whole))
                def _():
                    store_global(piece_lse_gmem.at[slot, rows], lse)
                    for n, acc in enumerate(accs):
                        target = piece_out_gmem.at[slot, rows, pl.ds(n * TILE, TILE)]
                        store_global(target.transpose((1, 0)), _turned(acc * inverse))
                    # All threads have written before one of them says so.
                    plgpu.commit_smem()
                    _count(done.at[pl.ds(sequence * num_tiles + tile, 1)])

        def merge():
            """Merges this block's share of the sequences of which it has a piece."""

            @each_sequence
            def _sequence(sequence, start, stop):
                whole = extent(start, stop)[2]

                @pl.when(jnp.logical_not(whole))
                def _():
                    first_part = part_of(start, share.total, num_parts)
                    last_part = part_of(stop - 1, share.total, num_parts)
                    num_pieces = last_part - first_part + 1
                    _await_count(done.at[pl.ds(sequence * num_tiles + tile, 1)], num_pieces)
                    num_mine = lax.div(
                        num_shares - 1 - (part - first_part) + num_pieces, num_pieces
                    )

                    @pl.loop(0, num_mine)
                    def _mine(i):
                        index = i * num_pieces + part - first_part
                        merge_rows_of(sequence, first_part + sequence, num_pieces, index)

        def merge_rows_of(sequence, first_slot, num_pieces, index):
            columns = KV_RANK // merge_width
            first_row = tile_row + lax.div(index, columns) * merge_rows
            here = pl.ds(lax.rem(index, columns) * merge_width, merge_width)
            layout = plgpu.Layout.WG_STRIDED((merge_width,), vec_size=merge_width // 128)

            def step(i, carry):
                loaded = []
                for j in range(merge_pieces):
                    index = i * merge_pieces + j
                    slot = first_slot + jnp.minimum(index, num_pieces - 1)
                    for r in range(merge_rows):
                        lse = piece_lse_gmem[slot, first_row + r] * LOG2E
                        lse = jnp.where(index < num_pieces, lse, -jnp.inf)
                        source = piece_out_gmem.at[slot, first_row + r, here]
                        loaded.append((lse, plgpu.load(source, layout=layout)))
                result = []
                for r in range(merge_rows):
                    acc, top, total = carry[r]
                    mine = loaded[r::merge_rows]
                    new_top = functools.reduce(jnp.maximum, [lse for lse, _ in mine], top)
                    decay = jnp.exp2(top - new_top)
                    acc, total = acc * decay, total * decay
                    for lse, value in mine:
                        weight = jnp.exp2(lse - new_top)
                        acc, total = acc + value * weight, total + weight
                    result.append((acc, new_top, total))
                return tuple(result)

            zeros = plgpu.layout_cast(jnp.zeros((merge_width,), jnp.float32), layout)
            start = ((zeros, jnp.float32(MASKED), jnp.float32(0)),) * merge_rows
            steps = lax.div(num_pieces + (merge_pieces - 1), merge_pieces)
            for r, (acc, top, total) in enumerate(lax.fori_loop(0, steps, step, start)):
                seen = total > 0
                acc *= jnp.where(seen, 1 / total, 0.0)
                store_global(out_gmem.at[sequence, first_row + r, here], acc.astype(dtype))
                lse = top * (1 / LOG2E) + jnp.log(total)
                lse_gmem[sequence, first_row + r] = jnp.where(seen, lse, -jnp.inf)

        def copy():
            """Loads the queries of each sequence and its pages, part by part."""

            @each_sequence
            def _sequence(sequence, start, stop):
                begin, end, _ = extent(start, stop)
                last_key = jnp.clip(lengths_ref[sequence], 1, capacity) - 1
                last_column = lax.div(last_key, page_size)

                def load_queries():
                    rows = pl.ds(0, tile_rows)
                    source = (sequence, pl.ds(tile_row, tile_rows))
                    for n in range(LATENT_TILES):
                        columns = pl.ds(n * TILE, TILE)
                        plgpu.copy_gmem_to_smem(
                            q_gmem.at[(*source, columns)], q_smem.at[n, rows], q_full
                        )
                    plgpu.copy_gmem_to_smem(
                        q_rope_gmem.at[source], q_smem.at[LATENT_TILES, rows], q_full
                    )

                # The first queries are not waited for; later ones follow the first pages,
                # whose places are free before the previous queries' is.
                pl.when(sequence == share.first_sequence)(load_queries)

                @pl.loop(begin, end)
                def _unit(unit):
                    column = jnp.minimum(lax.div(unit, blocks_per_page), last_column)
                    first_row = lax.rem(unit, blocks_per_page) * KEYS
                    page, keys = (
                        control_ref[sequence * page_table_BP.shape[1] + column],
                        pl.ds(first_row, KEYS),
                    )
                    for piece in range(parts):
                        order, slot = place(start, unit, piece)

                        @pl.when(order >= num_places)
                        def _(slot=slot):
                            plgpu.barrier_wait(empty.at[slot])

                        for j in range(part_tiles):
                            n = piece * part_tiles + j
                            if n == LATENT_TILES:
                                source = rope_gmem.at[page, keys]
                                target = ring_smem.at[slot, 0 if pages.quantised else j]
                            else:
                                source = latent_gmem.at[page, keys, pl.ds(n * TILE, TILE)]
                                ring = ring_smem if narrow_smem is None else narrow_smem
                                target = ring.at[slot, j]
                            plgpu.copy_gmem_to_smem(source, target, full.at[slot])
                        for source in scale_gmem:
                            plgpu.copy_gmem_to_smem(
                                source.at[page, keys], scale_smem.at[slot], full.at[slot]
                            )

                    @pl.when(jnp.logical_and(unit == begin, sequence > share.first_sequence))
                    def _():
                        plgpu.barrier_wait(q_empty)
                        load_queries()

        warpgroup = lax.axis_index("warpgroup")

        @pl.when(warpgroup == 0)
        def _():
            attend()
            merge()

        @pl.when(warpgroup == 1)
        def _():
            copy()

    def shared(*shape, dtype=dtype):
        return tiled_smem(shape, dtype, swizzle=TILE * jnp.dtype(dtype).itemsize)

    quantised_scratch = []
    if pages.quantised:
        quantised_scratch = [
            shared(num_places, LATENT_TILES, KEYS, TILE, dtype=narrow_type),
            plgpu.SMEM((num_places, KEYS), jnp.float32),
            shared(LATENT_TILES, KEYS, TILE),
        ]
    num_slots = num_parts + batch_size
    f32 = jnp.float32
    scratch = [
        shared(NUM_TILES, width, TILE),
        shared(1, width, TILE),
        plgpu.Barrier(num_arrivals=part_tiles + pages.quantised, num_barriers=num_places),
        plgpu.Barrier(num_barriers=num_places),
        plgpu.Barrier(num_arrivals=NUM_TILES),
        plgpu.Barrier(),
        shared(num_places, 1 if pages.quantised else part_tiles, KEYS, TILE),
        *quantised_scratch,
    ]

    def kernel(*refs) -> None:
        pl.run_scoped(functools.partial(body, *refs), *scratch, collective_axes="warpgroup")

    # The table and, after it, a zeroed counter for each sequence: XLA makes both in one go.
    counters = jnp.zeros(batch_size * num_tiles, jnp.int32)
    control_ref = jax.new_ref(jnp.concatenate([page_table_BP.reshape(-1), counters]))
    pool = (pages.latent, pages.rope, *((pages.scale,) if pages.quantised else ()))
    out_BMC, lse_BM, _, _ = pl.kernel(
        kernel,
        out_type=(
            jax.ShapeDtypeStruct((batch_size, padded_rows, KV_RANK), dtype),
            jax.ShapeDtypeStruct((batch_size, padded_rows), f32),
            jax.ShapeDtypeStruct((num_slots, padded_rows, KV_RANK), f32),
            jax.ShapeDtypeStruct((num_slots, padded_rows), f32),
        ),
        mesh=plgpu.Mesh(
            grid=(num_parts * num_tiles,),
            grid_names=("block",),
            num_threads=2,
            thread_name="warpgroup",
        ),
        compiler_params=COMPILER_PARAMS,
    )(lengths_B, control_ref, q_latent_BMC, q_rope_BMR, *pool)
    return out_BMC[:, :num_rows], lse_BM[:, :num_rows]


def _count(counter_ref: Any) -> None:
    """Adds one to a counter in device memory, after all that the warpgroup has written."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(),))
    def signal(_, counter):
        mgpu.SemaphoreRef(mgpu.utils.memref_ptr(counter)).signal(1, memory_scope="gpu")

    signal(counter_ref)


def _await_count(counter_ref: Any, count: Array) -> None:
    """Waits until a counter has reached a number; what was written before is seen then."""

    @plgpu.inline_mgpu(arg_types=(plgpu.RefType(), plgpu.Layout.WG_SPLAT))
    def wait(_, counter, count):
        semaphore = mgpu.SemaphoreRef(mgpu.utils.memref_ptr(counter))
        semaphore.wait(count.registers.item(), decrement=False, memory_scope="gpu")

    wait(counter_ref, count)


def _turned(array: Array) -> Array:
    """Returns an array whose registers hold neighbours of a column, to store it transposed."""
    return plgpu.layout_cast(array, plgpu.Layout.WGMMA_TRANSPOSED)
