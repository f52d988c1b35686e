"""Which tokens go to which shard: each once, whatever the number of its experts there."""

from __future__ import annotations

import dataclasses
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

    A shard has room for R rows. Where one gets more, they come in passes, R by R, and each pass is
    a plan of its own, from `of_pass`.

    Attributes:
        token_S: int32, the token that each sent row is a copy of; rows are sorted by the shard
            they go to, and those after the last are sent nowhere.
        row_NF: int32, the rows of each token; S where it goes to fewer than F shards.
        starts_PQ: int32, the first of shard p's rows that go to shard q.
        sizes_PQ: int32, rows that shard p sends to shard q; the same on every shard.
        room: R, rows that a shard has room for.
        experts_per_shard: experts of each shard, in the order of the shards.
        axis_name: the mesh axis of the shards.
        transport: one of TRANSPORTS.
        pieces: as of plan_exchange.
    """

    # Any: a pytree's leaves may also be placeholders while jax transforms it.
    token_S: Any
    row_NF: Any
    starts_PQ: Any
    sizes_PQ: Any
    room: int = field(metadata={"static": True})
    experts_per_shard: int = field(metadata={"static": True})
    axis_name: str = field(metadata={"static": True})
    transport: str = field(metadata={"static": True})
    pieces: int = field(metadata={"static": True})

    @property
    def num_received(self) -> Int[Array, ""]:
        """Rows that this shard receives: they come first among the R there is room for."""
        return jnp.sum(self.sizes_PQ[:, jax.lax.axis_index(self.axis_name)])

    @property
    def num_passes(self) -> Int[Array, ""]:
        """Passes that the fullest shard takes: all shards know it, and take as many."""
        return -(-jnp.max(jnp.sum(self.sizes_PQ, axis=0)) // self.room)

    def of_pass(self, index: Int[Array, ""] | int) -> ExchangePlan:
        """Returns the plan of one pass: of what each shard receives, the index-th R rows."""
        before_PQ = jnp.cumsum(self.sizes_PQ, axis=0) - self.sizes_PQ
        first_PQ = jnp.clip(index * self.room - before_PQ, 0, self.sizes_PQ)
        last_PQ = jnp.clip((index + 1) * self.room - before_PQ, 0, self.sizes_PQ)
        return dataclasses.replace(
            self, starts_PQ=self.starts_PQ + first_PQ, sizes_PQ=last_PQ - first_PQ
        )


def plan_exchange(
    indices_NK: Int[Array, "N K"],
    *,
    num_experts: int,
    max_shards: int,
    axis_name: str,
    transport: str,
    room: int | None = None,
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
        room: R, rows that a shard has room for; None for all that there might be, P N, which one
            pass brings.
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

    sent_NP = _experts_of_shards(indices_NK, num_shards, experts_per_shard) > 0
    sizes_P = jnp.sum(sent_NP, axis=0, dtype=jnp.int32)
    starts_P = jnp.cumsum(sizes_P) - sizes_P
    rank_NP = jnp.cumsum(sent_NP, axis=0, dtype=jnp.int32) - 1
    row_NP = jnp.where(sent_NP, starts_P + rank_NP, num_rows)
    # Sorting the pairs there are lists the tokens by shard: no scatter.
    pair_PN = jnp.arange(num_shards * num_tokens, dtype=jnp.int32).reshape(num_shards, -1)
    pair_PN = jnp.where(sent_NP.T, pair_PN, num_shards * num_tokens)
    token_S = jnp.sort(pair_PN.reshape(-1))[:num_rows] % num_tokens
    sizes_PQ = jax.lax.all_gather(sizes_P, axis_name)
    return ExchangePlan(
        token_S=token_S,
        row_NF=jnp.sort(row_NP, axis=1)[:, :max_shards],
        starts_PQ=jnp.cumsum(sizes_PQ, axis=1) - sizes_PQ,
        sizes_PQ=sizes_PQ,
        room=num_shards * num_tokens if room is None else room,
        experts_per_shard=experts_per_shard,
        axis_name=axis_name,
        transport=transport,
        pieces=pieces,
    )


def most_assignments(indices_NK: Int[Array, "N K"], plan: ExchangePlan) -> Int[Array, ""]:
    """Counts the assignments that come with the rows of a pass, of the fullest shard and pass.

    Args:
        indices_NK: the experts that the exchange was planned by.
        plan: the plan of all passes.

    Returns:
        int32, the same on every shard.
    """
    num_shards, num_tokens = plan.sizes_PQ.shape[0], indices_NK.shape[0]
    count_NP = _experts_of_shards(indices_NK, num_shards, plan.experts_per_shard)
    before_PQ = jnp.cumsum(plan.sizes_PQ, axis=0) - plan.sizes_PQ
    rank_NP = jnp.cumsum(count_NP > 0, axis=0, dtype=jnp.int32) - 1
    pass_NP = (before_PQ[jax.lax.axis_index(plan.axis_name)] + rank_NP) // plan.room
    passes = jnp.arange(-(-num_shards * num_tokens // plan.room))
    in_pass_NPE = pass_NP[..., None] == passes
    rows_PE = jnp.sum(jnp.where(in_pass_NPE, count_NP[..., None], 0), axis=0, dtype=jnp.int32)
    return jnp.max(jax.lax.psum(rows_PE, plan.axis_name))


def _experts_of_shards(indices_NK: Array, num_shards: int, experts_per_shard: int) -> Array:
    """Counts each token's experts on each shard, [N, P]."""
    shard_NK = indices_NK // experts_per_shard
    return jnp.sum(shard_NK[..., None] == jnp.arange(num_shards), axis=1, dtype=jnp.int32)
