"""The permutation in plain XLA: gathers both ways, forward and backward."""

import functools

import jax.numpy as jnp
from jax import Array

from pallas_kernels.expert_permute.order import ExpertOrder


def spread_rows(x_ND: Array, order: ExpertOrder, weights_NK: Array | None = None) -> Array:
    """Each token, times its weights where given, copied to its rows."""
    rows_MD = x_ND.at[order.token_M].get(mode="promise_in_bounds")
    if weights_NK is None:
        return rows_MD
    weight_M = jnp.zeros(order.token_M.shape[0], weights_NK.dtype)
    weight_M = weight_M.at[order.row_NK].set(weights_NK, mode="drop", unique_indices=True)
    return (rows_MD.astype(jnp.float32) * weight_M[:, None]).astype(x_ND.dtype)


def sum_rows(rows_MD: Array, order: ExpertOrder, weights_NK: Array | None = None) -> Array:
    """Sum of each token's rows, times their weights where given, in float32.

    One choice after another, so that no array [N, K, D] of float32 need be written.
    """
    parts = [_rows_of_choice(rows_MD, order, k) for k in range(order.row_NK.shape[1])]
    if weights_NK is not None:
        parts = [part_ND * weights_NK[:, k, None] for k, part_ND in enumerate(parts)]
    return functools.reduce(jnp.add, parts)


def dot_rows(rows_MD: Array, order: ExpertOrder, x_ND: Array) -> Array:
    """Each of a token's rows times the token, in float32, [N, K]; 0 for one without a row."""
    choices = range(order.row_NK.shape[1])
    return jnp.stack(
        [jnp.sum(_rows_of_choice(rows_MD, order, k) * x_ND, axis=1) for k in choices], axis=1
    )


def _rows_of_choice(rows_MD: Array, order: ExpertOrder, choice: int) -> Array:
    """Row of each token's choice-th assignment in float32, [N, D]; 0 for one that has no row."""
    whole = rows_MD.shape[0] == order.row_NK.size
    mode = "promise_in_bounds" if whole else "fill"
    rows_ND = rows_MD.at[order.row_NK[:, choice]].get(mode=mode, fill_value=None if whole else 0)
    return rows_ND.astype(jnp.float32)
