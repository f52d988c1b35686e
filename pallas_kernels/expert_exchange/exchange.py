"""Tokens, and what was chosen for them, to the shards of their experts; sums of rows back.

Each direction is the transpose of the other. So the backward passes are exchanges too, with gathers
on either side of them: nothing is scattered.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_exchange.plan import ExchangePlan
from pallas_kernels.expert_exchange.transport import exchange_rows


def _out(rows_S: Array, plan: ExchangePlan) -> Array:
    """Moves sent rows [S, ...] to where they are received [R, ...]."""
    return exchange_rows(
        rows_S,
        plan.sizes_PQ,
        send_starts_PQ=plan.starts_PQ,
        num_rows=plan.room,
        max_size=_max_size(plan),
        axis_name=plan.axis_name,
        transport=plan.transport,
        pieces=plan.pieces,
    )


def _back(rows_R: Array, plan: ExchangePlan) -> Array:
    """Moves received rows [R, ...] to where they came from [S, ...]."""
    return exchange_rows(
        rows_R,
        plan.sizes_PQ.T,
        receive_starts_PQ=plan.starts_PQ.T,
        num_rows=plan.token_S.shape[0],
        max_size=_max_size(plan),
        axis_name=plan.axis_name,
        transport=plan.transport,
        pieces=plan.pieces,
    )


def _max_size(plan: ExchangePlan) -> int:
    """A bound on the rows that one shard sends to another."""
    return min(plan.row_NF.shape[0], plan.room)


def _sum_of_rows(rows_S: Array, plan: ExchangePlan) -> Array:
    """Sums each token's rows in float32, [N, ...]; one after another, so that none are stored."""
    return functools.reduce(
        jnp.add,
        (
            rows_S.at[row_N].get(mode="fill", fill_value=0).astype(jnp.float32)
            for row_N in plan.row_NF.T
        ),
    )


@jax.custom_vjp
def send_tokens(x_ND: Float[Array, "N D"], plan: ExchangePlan) -> Float[Array, "R D"]:
    """Sends each token once to every shard that has experts of it.

    Args:
        x_ND: this shard's tokens.
        plan: from `plan_exchange`, or one of its passes.

    Returns:
        The tokens received, in x_ND's dtype, `plan.num_received` of them, then zeros.
    """
    return _out(x_ND[plan.token_S], plan)


def _send_forward(x_ND: Array, plan: ExchangePlan) -> tuple[Array, ExchangePlan]:
    return send_tokens(x_ND, plan), plan


def _send_backward(plan: ExchangePlan, d_rows_RD: Array) -> tuple[Array, None]:
    return _sum_of_rows(_back(d_rows_RD, plan), plan).astype(d_rows_RD.dtype), None


send_tokens.defvjp(_send_forward, _send_backward)


@jax.custom_vjp
def return_tokens(rows_RD: Float[Array, "R D"], plan: ExchangePlan) -> Float[Array, "N D"]:
    """Returns a row for every token received, and sums each token's in float32.

    Args:
        rows_RD: one row for each token that `send_tokens` brought; those after them are ignored.
        plan: the one they came by.

    Returns:
        This shard's tokens, in rows_RD's dtype; 0 for what the plan, if of one pass, left behind.
    """
    return _sum_of_rows(_back(rows_RD, plan), plan).astype(rows_RD.dtype)


def _return_forward(rows_RD: Array, plan: ExchangePlan) -> tuple[Array, ExchangePlan]:
    return return_tokens(rows_RD, plan), plan


def _return_backward(plan: ExchangePlan, d_out_ND: Array) -> tuple[Array, None]:
    return _out(d_out_ND[plan.token_S], plan), None


return_tokens.defvjp(_return_forward, _return_backward)


@jax.custom_vjp
def send_choices(
    indices_NK: Int[Array, "N K"], weights_NK: Float[Array, "N K"], plan: ExchangePlan
) -> tuple[Int[Array, "R K"], Float[Array, "R K"]]:
    """Sends the experts and gates of the tokens beside them.

    Args:
        indices_NK: int32 experts among those of all shards.
        weights_NK: float32 gates.
        plan: from `plan_exchange`.

    Returns:
        Of every row received: its experts, int32, counted among this shard's own, their number
        for one that is not here; and its gates, 0 there.
    """
    top_k = indices_NK.shape[1]
    # One array of both, so that one exchange brings them.
    bits_NK = jax.lax.bitcast_convert_type(weights_NK, jnp.int32)
    both_RK = _out(jnp.concatenate([indices_NK, bits_NK], axis=1)[plan.token_S], plan)
    indices_RK, bits_RK = both_RK[:, :top_k], both_RK[:, top_k:]
    weights_RK = jax.lax.bitcast_convert_type(bits_RK, jnp.float32)
    first = jax.lax.axis_index(plan.axis_name) * plan.experts_per_shard
    here_RK = (indices_RK >= first) & (indices_RK < first + plan.experts_per_shard)
    here_RK &= (jnp.arange(both_RK.shape[0]) < plan.num_received)[:, None]
    experts_RK = jnp.where(here_RK, indices_RK - first, plan.experts_per_shard)
    return experts_RK, jnp.where(here_RK, weights_RK, 0)


def _choices_forward(
    indices_NK: Array, weights_NK: Array, plan: ExchangePlan
) -> tuple[tuple[Array, Array], tuple[Array, ExchangePlan]]:
    experts_RK, weights_RK = send_choices(indices_NK, weights_NK, plan)
    return (experts_RK, weights_RK), (experts_RK < plan.experts_per_shard, plan)


def _choices_backward(
    residuals: tuple[Array, ExchangePlan], cotangents: tuple[Array, Array]
) -> tuple[None, Array, None]:
    here_RK, plan = residuals
    d_weights_RK = jnp.where(here_RK, cotangents[1], 0)
    return None, _sum_of_rows(_back(d_weights_RK, plan), plan), None


send_choices.defvjp(_choices_forward, _choices_backward)
