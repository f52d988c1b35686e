"""Moving rows between the shards of a mesh axis: transports of one meaning.

Rows lie sorted by the shard they go to, and arrive sorted by the shard they come from, without
gaps; what comes after the last is 0. The same exchange with the sizes transposed brings them back.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int, Shaped

from pallas_kernels.expert_exchange.limits import TRANSPORTS
from pallas_kernels.implementations import check_choice

# Pieces that a GPU's rows are sent in: on two H200s 320 take 0.38 of the time of 64, 1,024 as much.
PIECES = 320


def exchange_rows(
    rows_S: Shaped[Array, "S ..."],
    sizes_PQ: Int[Array, "P P"],
    *,
    send_starts_PQ: Int[Array, "P P"] | None = None,
    receive_starts_PQ: Int[Array, "P P"] | None = None,
    num_rows: int,
    max_size: int,
    axis_name: str,
    transport: str,
    pieces: int = PIECES,
) -> Shaped[Array, "R ..."]:
    """Sends each shard its rows; to be called within shard_map.

    Args:
        rows_S: what this shard sends, sorted by the shard it goes to.
        sizes_PQ: int32, rows that shard p sends to shard q; the same on every shard.
        send_starts_PQ: int32, the first of shard p's rows for shard q; None where they lie one
            after another, without gaps.
        receive_starts_PQ: int32, where on shard q the rows of shard p go, in the order of the
            shards; None for one after another.
        num_rows: R, room for what is received.
        max_size: a bound on every size.
        axis_name: the mesh axis of the shards.
        transport: one of TRANSPORTS.
        pieces: pieces that "ragged_parts" sends a shard's rows in.

    Returns:
        The rows received, sorted by the shard they come from; 0 where none goes.

    Raises:
        ValueError: an unknown transport.
    """
    check_choice("transport", transport, TRANSPORTS)
    if send_starts_PQ is None:
        send_starts_PQ = jnp.cumsum(sizes_PQ, axis=1) - sizes_PQ
    if receive_starts_PQ is None:
        receive_starts_PQ = jnp.cumsum(sizes_PQ, axis=0) - sizes_PQ
    segments = Segments(sizes_PQ, send_starts_PQ, receive_starts_PQ)
    if transport == "fixed":
        return _fixed(rows_S, segments, num_rows, max_size, axis_name)
    parts = 1 if transport == "ragged" else -(-pieces // sizes_PQ.shape[0])
    return _ragged(rows_S, segments, num_rows, axis_name, parts)


class Segments(NamedTuple):
    """What shard p sends to shard q: how many rows, from where on and to where."""

    sizes_PQ: Array
    send_starts_PQ: Array
    receive_starts_PQ: Array


def _ragged(rows_S: Array, segments: Segments, num_rows: int, axis_name: str, parts: int) -> Array:
    """Sends the rows that there are, in so many parts for each shard.

    XLA copies each part by one block of a GPU's threads.
    """
    me = jax.lax.axis_index(axis_name)
    sizes_PQ = segments.sizes_PQ
    offsets_QP = _split(sizes_PQ[me], parts)[:, :-1]
    begin_QP = segments.send_starts_PQ[me][:, None] + offsets_QP
    place_QP = segments.receive_starts_PQ[me][:, None] + offsets_QP
    return jax.lax.ragged_all_to_all(
        rows_S,
        jnp.zeros((num_rows, *rows_S.shape[1:]), rows_S.dtype),
        input_offsets=begin_QP.reshape(-1),
        send_sizes=jnp.diff(_split(sizes_PQ[me], parts)).reshape(-1),
        output_offsets=place_QP.reshape(-1),
        recv_sizes=jnp.diff(_split(sizes_PQ[:, me], parts)).reshape(-1),
        axis_name=axis_name,
    )


def _split(sizes_P: Array, parts: int) -> Array:
    """Ends of about equal parts of each size, 0 first, [P, parts + 1]."""
    return sizes_P[:, None] * jnp.arange(parts + 1, dtype=jnp.int32) // parts


def _fixed(
    rows_S: Array, segments: Segments, num_rows: int, max_size: int, axis_name: str
) -> Array:
    """Sends blocks of the largest size there can be, for backends that have nothing else."""
    me = jax.lax.axis_index(axis_name)
    block_row = jnp.arange(max_size)
    blocks = rows_S.at[segments.send_starts_PQ[me][:, None] + block_row].get(mode="clip")
    blocks = jax.lax.all_to_all(blocks, axis_name, split_axis=0, concat_axis=0)
    received_P, starts_P = segments.sizes_PQ[:, me], segments.receive_starts_PQ[:, me]
    row_R = jnp.arange(num_rows)
    # Of shards whose rows would begin at one place, the last is the one that has any.
    source_R = jnp.searchsorted(starts_P, row_R, side="right", method="compare_all") - 1
    within_R = row_R - starts_P.at[source_R].get(mode="clip")
    hit_R = (source_R >= 0) & (within_R < received_P.at[source_R].get(mode="clip"))
    place_R = jnp.where(hit_R, source_R * max_size + within_R, blocks.shape[0] * max_size)
    flat = blocks.reshape(-1, *blocks.shape[2:])
    return flat.at[place_R].get(mode="fill", fill_value=0)
