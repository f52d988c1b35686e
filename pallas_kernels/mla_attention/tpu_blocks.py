"""How the TPU kernels cut attention into blocks: sizes, the table of steps, masks, operands."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import pallas as pl

from pallas_kernels.chips import TPU_LANES
from pallas_kernels.mla_attention.limits import ROPE
from pallas_kernels.mla_attention.tiles import TpuTile
from pallas_kernels.softmax import MASKED

# What a grid step does with its block: the low bits of the table's `info`.
SKIP, FULL, DIAGONAL, MASK = range(4)
KIND_BITS = 3
# Whether a step is the first or the last one of its block of the outer or of the inner loop.
OUTER_FIRST, OUTER_LAST, INNER_FIRST, INNER_LAST = 4, 8, 16, 32


@dataclasses.dataclass(frozen=True)
class BlockTable:
    """The steps of a kernel's last grid dim.

    Attributes:
        scalars: int32 vectors of rows * steps: the step's block of queries, its block of keys, what
            to do with them (`info`), and the next block of the inner loop that is completed.
        rows: 1 where all sequences share the steps, else the number of sequences.
        steps: steps per sequence; those that a sequence does not need are `SKIP`.
        kinds: the kinds of block that can occur, except `SKIP`.
    """

    scalars: tuple[Any, ...]
    rows: int
    steps: int
    kinds: tuple[int, ...]

    def row(self, batch: Any) -> Any:
        """Returns where a sequence's steps start."""
        return batch * self.steps if self.rows > 1 else 0

    def spec(self, shape: Sequence[int], index: Callable[..., tuple[Any, ...]]) -> pl.BlockSpec:
        """Makes the spec of an operand from `index(grid ids but the last, q, k, completed)`."""

        def index_map(*args: Any) -> tuple[Any, ...]:
            *ids, step, q_ref, k_ref, _, completed_ref, _ = args
            at = self.row(ids[0]) + step
            return index(*ids, q_ref[at], k_ref[at], completed_ref[at])

        return pl.BlockSpec(tuple(shape), index_map)


def make_table(
    num_queries: int,
    num_keys: int,
    block_q: int,
    block_k: int,
    masks: tuple[Array | None, Array | None, Array | None],
    *,
    causal: bool,
    keys_outer: bool,
) -> BlockTable:
    """Lists the visible blocks, with the queries' blocks (or the keys') as the outer loop.

    Every block of queries and, with `keys_outer`, of keys occurs at least once, so that its output
    is written.

    Args:
        num_queries: queries before padding to blocks.
        num_keys: keys before padding to blocks.
        block_q: queries per block.
        block_k: keys per block.
        masks: segment ids of queries and of keys [B, T], [B, S] and query offsets [B], or None.
        causal: whether later keys are hidden.
        keys_outer: whether the outer loop is the one over keys.

    Returns:
        The table; its scalars are NumPy arrays where they depend on shapes only.
    """
    q_ids, k_ids, offset_B = masks
    dynamic = q_ids is not None or offset_B is not None
    xp: Any = jnp if dynamic else np
    blocks_q, blocks_k = -(-num_queries // block_q), -(-num_keys // block_k)
    i, j = np.arange(blocks_q)[None, :, None], np.arange(blocks_k)[None, None]
    q_first, q_last = i * block_q, np.minimum((i + 1) * block_q, num_queries) - 1
    k_first, k_last = j * block_k, (j + 1) * block_k - 1
    if offset_B is not None:
        q_first, q_last = (x + offset_B[:, None, None] for x in (q_first, q_last))

    shape = (1, blocks_q, blocks_k)
    visible, cut = xp.ones(shape, bool), xp.zeros(shape, bool)
    diagonal: Any = xp.zeros(shape, bool)
    edge = k_last >= num_keys
    if causal:
        visible = visible & (k_first <= q_last)
        cut = cut | (k_last > q_first)
        diagonal = (q_first == k_first) & (block_q == block_k)
        edge = edge & (q_last >= num_keys)
    if q_ids is not None and k_ids is not None:
        q_low, q_high = _block_range(q_ids, block_q)
        k_low, k_high = (x[:, None] for x in _block_range(k_ids, block_k))
        q_low, q_high = q_low[:, :, None], q_high[:, :, None]
        visible = visible & (q_low <= k_high) & (q_high >= k_low)
        mixed = (q_low != q_high) | (k_low != k_high) | (q_low != k_low)
        edge = edge | mixed
    masked = xp.where(diagonal & ~edge, DIAGONAL, MASK)
    kind = xp.where(visible, xp.where(cut | edge, masked, FULL), SKIP)

    run = visible | (j == 0)
    if keys_outer:
        run = run | (i == blocks_q - 1)
    run, kind = xp.broadcast_arrays(run, kind)
    if keys_outer:
        run, kind = xp.swapaxes(run, 1, 2), xp.swapaxes(kind, 1, 2)

    if not dynamic:
        steps = int(run.sum())
    elif causal and offset_B is None:
        steps = make_table(
            num_queries,
            num_keys,
            block_q,
            block_k,
            (None, None, None),
            causal=causal,
            keys_outer=keys_outer,
        ).steps
    else:
        steps = blocks_q * blocks_k
    squares = causal and block_q == block_k
    return _listed(xp, run, kind, steps, keys_outer, dynamic, squares)


def _listed(
    xp: Any, run: Any, kind: Any, steps: int, keys_outer: bool, dynamic: bool, squares: bool
) -> BlockTable:
    rows, _, inner = run.shape
    info = kind + OUTER_FIRST * _is_first(xp, run, 2) + OUTER_LAST * _is_last(xp, run, 2)
    last_of_inner = _is_last(xp, run, 1)
    info = info + INNER_FIRST * _is_first(xp, run, 1) + INNER_LAST * last_of_inner

    run, info = run.reshape(rows, -1), info.reshape(rows, -1)
    order = xp.argsort(~run, axis=1, stable=True)[:, :steps]
    # The steps that are left over repeat the last one's blocks, so they fetch nothing.
    count = run.sum(axis=1)[:, None]
    step = np.arange(steps)[None]
    order = xp.take_along_axis(order, xp.minimum(step, count - 1), axis=1)
    info = xp.where(step < count, xp.take_along_axis(info, order, axis=1), SKIP)
    outer_index, inner_index = order // inner, order % inner

    completes = (info & INNER_LAST) != 0
    at = xp.where(completes, step, steps)
    if dynamic:
        upcoming: Any = jax.lax.cummin(at, axis=1, reverse=True)
    else:
        upcoming = np.minimum.accumulate(at[:, ::-1], axis=1)[:, ::-1]
    final = xp.where(completes, step, -1).max(axis=1)[:, None]
    upcoming = xp.minimum(upcoming, final)
    completed = xp.take_along_axis(inner_index, upcoming, axis=1)

    q_index, k_index = (inner_index, outer_index) if keys_outer else (outer_index, inner_index)
    scalars = tuple(
        xp.asarray(x, dtype=np.int32).reshape(-1) for x in (q_index, k_index, info, completed)
    )
    if dynamic:
        # Code for a kind that cannot occur would be cut for blocks that are no squares.
        kinds: tuple[int, ...] = (FULL, DIAGONAL, MASK) if squares else (FULL, MASK)
    else:
        kinds = tuple(sorted({*np.unique(info & KIND_BITS).tolist()} - {SKIP}))
    return BlockTable(scalars, rows, steps, kinds)


def _is_first(xp: Any, run: Any, axis: int) -> Any:
    return run & (xp.cumsum(run, axis=axis) == 1)


def _is_last(xp: Any, run: Any, axis: int) -> Any:
    return run & (xp.cumsum(run, axis=axis) == run.sum(axis=axis, keepdims=True))


def _block_range(ids: Array, block: int) -> tuple[Array, Array]:
    """Returns the least and greatest id of each block, [B, blocks]."""
    padding = -ids.shape[1] % block
    ids = jnp.pad(ids, ((0, 0), (0, padding)), mode="edge").reshape(ids.shape[0], -1, block)
    return ids.min(axis=2), ids.max(axis=2)


@dataclasses.dataclass(frozen=True)
class BlockShape:
    """How the arguments are cut into blocks."""

    queries: int
    keys: int
    block_q: int
    block_k: int
    heads: int  # Per grid step.
    rope_lanes: int  # Of a step's rotary queries.

    @classmethod
    def of(cls, queries: int, keys: int, num_heads: int, block: int) -> "BlockShape":
        heads = 2 if num_heads % 2 == 0 else 1
        # One head of many cannot take 64 of 128 lanes, so its rotary part is padded.
        rope_lanes = ROPE if num_heads == 1 else TPU_LANES
        sizes = (_block_size(queries, block), _block_size(keys, block))
        return cls(queries, keys, *sizes, heads, rope_lanes)

    @property
    def padded_queries(self) -> int:
        return -(-self.queries // self.block_q) * self.block_q

    @property
    def padded_keys(self) -> int:
        return -(-self.keys // self.block_k) * self.block_k

    def widen(self, q_rope_BTHR: Array) -> Array:
        """Pads the rotary queries where a step's would not fill the lanes."""
        return pad(q_rope_BTHR, 3, self.rope_lanes // self.heads)


@dataclasses.dataclass(frozen=True)
class BlockMask:
    """Which scores of a block are computed, and which of those are hidden.

    Attributes:
        kind: what the table says of the block.
        size: its queries and its keys.
        first: the position among the keys of its first query and of its first key.
        num_keys: keys before padding.
        causal: whether keys after a query are hidden from it.
        segment_refs: none, or the block's segment ids of queries and of keys, [1, 1, size].
        keys_in_lanes: whether the scores are [queries, keys] and not [keys, queries].
    """

    kind: int
    size: tuple[int, int]
    first: tuple[Any, Any]
    num_keys: int
    causal: bool
    segment_refs: Sequence[Any]
    keys_in_lanes: bool

    def tiles(self, tile: TpuTile, heads: int) -> list[tuple[int, slice, slice]]:
        """Returns (head, queries, keys) within the block, without what a diagonal block hides."""
        work = []
        for head, q, k in tile.order(heads, *self.size):
            queries, keys = q, k
            if self.kind == DIAGONAL:
                queries = slice(max(q.start, k.start), q.stop)
                keys = slice(k.start, min(k.stop, q.stop))
            if queries.start < queries.stop and keys.start < keys.stop:
                work.append((head, queries, keys))
        return work

    def apply(self, scores: Array, queries: slice, keys: slice) -> Array:
        """Returns the scores with `MASKED` where a key is not visible."""
        if self.kind == FULL:
            return scores
        q_dim, k_dim = (0, 1) if self.keys_in_lanes else (1, 0)
        k_pos = jax.lax.broadcasted_iota(jnp.int32, scores.shape, k_dim)
        q_pos = jax.lax.broadcasted_iota(jnp.int32, scores.shape, q_dim)
        if self.kind == DIAGONAL:
            if keys.stop - 1 <= queries.start:
                return scores
            return jnp.where(k_pos - q_pos <= queries.start - keys.start, scores, MASKED)
        q_first, k_first = self.first[0] + queries.start, self.first[1] + keys.start
        visible = k_pos < self.num_keys - k_first
        if self.causal:
            visible = visible & (k_pos - q_pos <= q_first - k_first)
        if self.segment_refs:
            q_ids_ref, k_ids_ref = self.segment_refs
            q_ids, k_ids = q_ids_ref[0, :, queries], k_ids_ref[0, :, keys]
            if self.keys_in_lanes:
                q_ids = jnp.broadcast_to(q_ids, (TPU_LANES, q_ids.shape[1])).T[:, :1]
            else:
                k_ids = jnp.broadcast_to(k_ids, (TPU_LANES, k_ids.shape[1])).T[:, :1]
            visible = visible & (q_ids == k_ids)
        return jnp.where(visible, scores, MASKED)


def pipeline(
    work: list[tuple[int, slice, slice]],
    first: Callable[..., Any],
    middle: Callable[..., Any],
    last: Callable[..., None],
) -> None:
    """Runs three stages over the tiles, a tile's first before the middle one of the tile before."""
    ready = first(*work[0])
    pending: tuple[Any, ...] = ()
    for n, item in enumerate(work):
        current = ready
        if n + 1 < len(work):
            ready = first(*work[n + 1])
        results = middle(*item, current)
        if pending:
            last(*pending)
        pending = (*item, *results)
    last(*pending)


def make_operands(
    shape: BlockShape,
    table: BlockTable,
    *,
    queries: tuple[Array, ...],
    keys: tuple[Array, ...],
    k_rope_BSR: Array,
    segment_ids: tuple[Array | None, ...],
    pairs: int = 0,
) -> tuple[list[Array], list[pl.BlockSpec]]:
    """Pads the arrays to whole blocks and merges heads into columns; returns them and their specs.

    `pairs` is the size of the grid's third dim, 0 where the second one counts the pairs of heads.
    """
    operands, specs = [], []

    def add(array: Array, block: tuple[int, ...], index: Callable[..., tuple[Any, ...]]) -> None:
        def at(b: Any, *ids: Any) -> tuple[Any, ...]:
            *group, q, k, _ = ids
            return index(b, group[0] * pairs + group[1] if pairs else group[0], q, k)

        operands.append(array)
        specs.append(table.spec(block, at))

    pairs_of_heads = queries[0].shape[2] // shape.heads
    for array in queries:
        array = pad(array, 1, shape.padded_queries)
        array = array.reshape(*array.shape[:2], -1)
        block = (1, shape.block_q, array.shape[2] // pairs_of_heads)
        add(array, block, lambda b, g, q, k: (b, q, g))
    for array in keys:
        array = pad(array, 1, shape.padded_keys)
        array = array.reshape(*array.shape[:2], -1)
        block = (1, shape.block_k, array.shape[2] // pairs_of_heads)
        add(array, block, lambda b, g, q, k: (b, k, g))
    add(
        pad(k_rope_BSR, 1, shape.padded_keys),
        (1, shape.block_k, ROPE),
        lambda b, g, q, k: (b, k, 0),
    )
    if segment_ids[0] is not None and segment_ids[1] is not None:
        q_ids = pad(segment_ids[0].astype(jnp.int32), 1, shape.padded_queries)
        k_ids = pad(segment_ids[1].astype(jnp.int32), 1, shape.padded_keys)
        add(q_ids[:, None], (1, 1, shape.block_q), lambda b, g, q, k: (b, 0, q))
        add(k_ids[:, None], (1, 1, shape.block_k), lambda b, g, q, k: (b, 0, k))
    return operands, specs


def _block_size(length: int, block: int) -> int:
    """Returns the largest size that pads little; a short sequence is one block."""
    if length <= block // 2:
        return -(-length // TPU_LANES) * TPU_LANES
    while block > 2 * TPU_LANES and -length % block > length // 8:
        block //= 2
    return block


def pad(array: Array, dim: int, size: int) -> Array:
    """Pads a dim with zeros up to a size."""
    if array.shape[dim] == size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[dim] = (0, size - array.shape[dim])
    return jnp.pad(array, widths)


def offsets(q_offset_B: Array | None, batch: int) -> Array:
    """Returns the offsets as a kernel takes them, int32 [B]; 0 where none are given."""
    return jnp.zeros(batch, jnp.int32) if q_offset_B is None else q_offset_B.astype(jnp.int32)
