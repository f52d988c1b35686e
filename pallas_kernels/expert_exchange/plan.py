"""Which tokens go to which shard: each once, whatever the number of its experts there."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.expert_exchange.limits import supported
from pallas_kernels.expert_exchange.transport import PIECES
from pallas_kernels.implementations import check_supported


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExchangePlan:
    """What one shard sends and receives; S is N tokens times the shards one may go to.

    Attributes:
        token_S: int32, the token that each sent row is a copy of; rows are sorted by the shard
            they go to, and those after the last are sent nowhere.
        row_NF: int32, the rows of each token; S where it goes to fewer than F shards.
        sizes_PQ: int32, rows that shard p sends to shard q; the same on every shard.
        experts_per_shard: experts of each shard, in the order of the shards.
        axis_name: the mesh axis of the shards.
        transport: one of TRANSPORTS.
        pieces: as of plan_exchange.
    """

    # Any: a pytree's leaves may also be placeholders while jax transforms it.
    token_S: Any
    row_NF: Any
    sizes_PQ: Any
    experts_per_shard: int = field(metadata={"static": True})
    axis_name: str = field(metadata={"static": True})
    transport: str = field(metadata={"static": True})
    pieces: int = field(metadata={"static": True})

    @property
    def num_received(self) -> Int[Array, ""]:
        """Rows that this shard receives: they come first among the R there is room for."""
        return jnp.sum(self.sizes_PQ[:, jax.lax.axis_index(self.axis_name)])


def plan_exchange(
    indices_NK: Int[Array, "N K"],
    *,
    num_experts: int,
    max_shards: int,
    axis_name: str,
    transport: str,
    pieces: int = PIECES,
) -> ExchangePlan:
    """Plans the exchange of this shard's tokens; to be called within shard_map.

    Args:
        indices_NK: int32 experts of each token; `num_experts` for one that goes nowhere.
        num_experts: experts on all shards.
        max_shards: F, a bound on the shards that any token goes to, which the routing gives
            (device-limited routing, arXiv 2405.04434 §2.2.2); it bounds the bytes sent.
        axis_name: the mesh axis whose shards have the experts, in order.
        transport: "ragged" sends the rows that there are, for TPUs; "ragged_parts" the same in many
            pieces, for GPUs; "fixed" sends as many as there might be, for the CPU.
        pieces: pieces that "ragged_parts" sends this shard's rows in.

    Raises:
        ValueError: an unknown transport, or what it does not take (see `supported`).
    """
    num_shards = jax.lax.axis_size(axis_name)
    reason = supported(
        transport, num_experts=num_experts, num_shards=num_shards, max_shards=max_shards
    )
    check_supported(transport, reason, argument="transport")
    num_tokens = indices_NK.shape[0]
    num_rows = num_tokens * max_shards
    experts_per_shard = num_experts // num_shards

    shard_NK = indices_NK // experts_per_shard
    sent_NP = jnp.any(shard_NK[..., None] == jnp.arange(num_shards), axis=1)
    sizes_P = jnp.sum(sent_NP, axis=0, dtype=jnp.int32)
    starts_P = jnp.cumsum(sizes_P) - sizes_P
    rank_NP = jnp.cumsum(sent_NP, axis=0, dtype=jnp.int32) - 1
    row_NP = jnp.where(sent_NP, starts_P + rank_NP, num_rows)
    # Sorting the pairs there are lists the tokens by shard: no scatter.
    pair_PN = jnp.arange(num_shards * num_tokens, dtype=jnp.int32).reshape(num_shards, -1)
    pair_PN = jnp.where(sent_NP.T, pair_PN, num_shards * num_tokens)
    token_S = jnp.sort(pair_PN.reshape(-1))[:num_rows] % num_tokens
    return ExchangePlan(
        token_S=token_S,
        row_NF=jnp.sort(row_NP, axis=1)[:, :max_shards],
        sizes_PQ=jax.lax.all_gather(sizes_P, axis_name),
        experts_per_shard=experts_per_shard,
        axis_name=axis_name,
        transport=transport,
        pieces=pieces,
    )
