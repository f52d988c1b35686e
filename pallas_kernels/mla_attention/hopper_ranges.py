"""Which blocks of keys the queries see, and which blocks of queries a block of keys."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyRanges:
    """The blocks that query block i (or, transposed, key block i) is computed with.

    Blocks from `start_BI` to before `stop_BI` are visited, of which those from `full_start_BI` to
    before `full_stop_BI` need no mask. Both bounds of what is visited grow with i. All are int32
    arrays, in a kernel references to them.
    """

    start_BI: Any
    stop_BI: Any
    full_start_BI: Any
    full_stop_BI: Any


def key_ranges(
    num_queries: int,
    num_keys: int,
    q_size: int,
    k_size: int,
    q_segment_ids_BT: Array | None,
    kv_segment_ids_BS: Array | None,
    q_offset_B: Array | None,
    *,
    causal: bool,
    batch: int,
) -> tuple[KeyRanges, KeyRanges]:
    """Returns the key blocks of each query block, and the query blocks of each key block.

    Every query block gets one key block at least, so that its results are written.

    Args:
        num_queries: Number of the queries, padding included; a multiple of `q_size`.
        num_keys: Number of the real keys.
        q_size: Queries of a block.
        k_size: Keys of a block.
        q_segment_ids_BT: int32, or None.
        kv_segment_ids_BS: int32 of the real keys, or None.
        q_offset_B: int32, or None.
        causal: Whether keys after a query's position are hidden.
        batch: B.
    """
    num_q, num_k = num_queries // q_size, -(-num_keys // k_size)
    k_first_J = jnp.arange(num_k) * k_size
    visible_BIJ = jnp.ones((batch, num_q, num_k), bool)
    full_BIJ = visible_BIJ & (k_first_J + k_size <= num_keys)
    if causal:
        q_first_BI = jnp.broadcast_to(jnp.arange(num_q) * q_size, (batch, num_q))
        if q_offset_B is not None:
            q_first_BI = q_first_BI + q_offset_B[:, None]
        visible_BIJ &= k_first_J <= q_first_BI[..., None] + q_size - 1
        full_BIJ &= k_first_J + k_size - 1 <= q_first_BI[..., None]
    if q_segment_ids_BT is not None and kv_segment_ids_BS is not None:
        q_least_BI, q_most_BI = _extremes(q_segment_ids_BT, q_size, num_q)
        k_least_BJ, k_most_BJ = _extremes(kv_segment_ids_BS, k_size, num_k)
        visible_BIJ &= q_least_BI[..., None] <= k_most_BJ[:, None]
        visible_BIJ &= k_least_BJ[:, None] <= q_most_BI[..., None]
        full_BIJ &= (q_least_BI == q_most_BI)[..., None] & (k_least_BJ == k_most_BJ)[:, None]
        full_BIJ &= q_least_BI[..., None] == k_least_BJ[:, None]
    start_BI, stop_BI, _ = _span(visible_BIJ)
    # Growing bounds make the query blocks of a key block a range, too.
    start_BI = jax.lax.cummin(start_BI, axis=1, reverse=True)
    stop_BI = jnp.maximum(jax.lax.cummax(stop_BI, axis=1), start_BI + 1)
    j_J = jnp.arange(num_k)
    first_BJ = (stop_BI[..., None] <= j_J).sum(axis=1, dtype=jnp.int32)
    last_BJ = (start_BI[..., None] <= j_J).sum(axis=1, dtype=jnp.int32)
    keys_of_queries = KeyRanges(start_BI, stop_BI, *_full_span(full_BIJ))
    queries_of_keys = KeyRanges(first_BJ, last_BJ, *_full_span(full_BIJ.swapaxes(1, 2)))
    return keys_of_queries, queries_of_keys


def _extremes(ids_BT: Array, size: int, num_blocks: int) -> tuple[Array, Array]:
    widths = ((0, 0), (0, num_blocks * size - ids_BT.shape[1]))
    blocks = jnp.pad(ids_BT, widths, mode="edge").reshape(ids_BT.shape[0], num_blocks, size)
    return blocks.min(axis=-1), blocks.max(axis=-1)


def _span(some_BIJ: Array) -> tuple[Array, Array, Array]:
    """Returns the first true index, the one after the last, and the number of true ones."""
    num_k = some_BIJ.shape[-1]
    count = some_BIJ.sum(axis=-1, dtype=jnp.int32)
    start = jnp.argmax(some_BIJ, axis=-1).astype(jnp.int32)
    stop = num_k - jnp.argmax(some_BIJ[..., ::-1], axis=-1).astype(jnp.int32)
    return jnp.where(count > 0, start, num_k - 1), jnp.where(count > 0, stop, 0), count


def _full_span(full_BIJ: Array) -> tuple[Array, Array]:
    """Returns a range whose blocks are all full; an empty one where they are not in one run."""
    start, stop, count = _span(full_BIJ)
    one_run = (count > 0) & (stop - start == count)
    return jnp.where(one_run, start, 0), jnp.where(one_run, stop, 0)
