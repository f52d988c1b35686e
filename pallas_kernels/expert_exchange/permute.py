"""The permutation of tokens into rows sorted by expert: gathers both ways, forward and backward."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


class ExpertOrder(NamedTuple):
    """Assignments as M rows sorted by expert; M is N * K, or less where fewer go anywhere.

    Attributes:
        token_M: int32, the token that each row is a copy of.
        row_NK: int32, the row that each assignment went to; M or more for one that has none.
        group_sizes_E: int32, rows of each expert; rows behind the last belong to none.
    """

    token_M: Int[Array, " M"]
    row_NK: Int[Array, "N K"]
    group_sizes_E: Int[Array, " E"]


def sort_by_expert(
    indices_NK: Int[Array, "N K"], num_experts: int, max_rows: int | None = None
) -> ExpertOrder:
    """Sorts assignments by expert, tokens of one expert in their order.

    Args:
        indices_NK: int32 expert of each assignment; `num_experts` for one that goes nowhere.
        num_experts: experts that rows are for.
        max_rows: M, which the caller knows to be enough for all that go somewhere; None for N * K.
    """
    top_k = indices_NK.shape[1]
    flat_M = indices_NK.reshape(-1)
    order_M = jnp.argsort(flat_M, stable=True)
    row_M = (
        jnp.zeros_like(order_M)
        .at[order_M]
        .set(jnp.arange(order_M.size, dtype=order_M.dtype), unique_indices=True)
    )
    return ExpertOrder(
        token_M=(order_M // top_k)[:max_rows],
        row_NK=row_M.reshape(indices_NK.shape),
        # By comparison: counting by a scatter makes all rows wait for a few counters.
        group_sizes_E=jnp.sum(
            flat_M == jnp.arange(num_experts, dtype=flat_M.dtype)[:, None], axis=1, dtype=jnp.int32
        ),
    )


def _rows_of_choice(rows_MD: Array, order: ExpertOrder, choice: int) -> Array:
    """Row of each token's choice-th assignment in float32, [N, D]; 0 for one that has no row."""
    whole = rows_MD.shape[0] == order.row_NK.size
    mode = "promise_in_bounds" if whole else "fill"
    rows_ND = rows_MD.at[order.row_NK[:, choice]].get(mode=mode, fill_value=None if whole else 0)
    return rows_ND.astype(jnp.float32)


def _sum_rows(rows_MD: Array, order: ExpertOrder, weights_NK: Array | None = None) -> Array:
    """Sum of each token's rows in float32, [N, D].

    One choice after another, so that no array [N, K, D] of float32 need be written.
    """
    parts = [_rows_of_choice(rows_MD, order, k) for k in range(order.row_NK.shape[1])]
    if weights_NK is not None:
        parts = [part_ND * weights_NK[:, k, None] for k, part_ND in enumerate(parts)]
    return functools.reduce(jnp.add, parts)


def _check(name: str, width: int, implementation: str) -> None:
    if implementation not in ("xla", "hopper"):
        raise ValueError(f"implementation: {implementation!r} must be 'xla' or 'hopper'")
    if implementation == "hopper":
        from pallas_kernels.expert_exchange.hopper import THREADS  # as in `_spread`

        if width % THREADS:
            raise ValueError(
                f"{name}: width {width} must be a multiple of {THREADS} for implementation 'hopper'"
            )


def _spread(
    x_ND: Array, order: ExpertOrder, implementation: str, weights_NK: Array | None = None
) -> Array:
    """Each token, times its weights where given, copied to its rows."""
    num_rows = order.token_M.shape[0]
    if implementation == "hopper":
        # Imported when chosen: a host without Mosaic for GPUs can still use the other.
        from pallas_kernels.expert_exchange.hopper import spread_rows

        return spread_rows(x_ND, order.row_NK, num_rows, weights_NK)
    rows_MD = x_ND.at[order.token_M].get(mode="promise_in_bounds")
    if weights_NK is None:
        return rows_MD
    weight_M = jnp.zeros(num_rows, weights_NK.dtype)
    weight_M = weight_M.at[order.row_NK].set(weights_NK, mode="drop", unique_indices=True)
    return (rows_MD.astype(jnp.float32) * weight_M[:, None]).astype(x_ND.dtype)


def gather_rows(
    x_ND: Float[Array, "N D"], order: ExpertOrder, *, implementation: str = "xla"
) -> Float[Array, "M D"]:
    """Copies each token to its rows.

    The gradient of a token is a sum over its K rows, found by a gather: no scatter-add.

    Args:
        x_ND: tokens.
        order: where they go.
        implementation: "xla", or "hopper" for a kernel that reads each token once.

    Raises:
        ValueError: an unknown implementation, or a width that it cannot take.
    """
    _check("x_ND", x_ND.shape[1], implementation)
    return _gather_rows(implementation, x_ND, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_rows(implementation: str, x_ND: Array, order: ExpertOrder) -> Array:
    return _spread(x_ND, order, implementation)


def _gather_rows_forward(
    implementation: str, x_ND: Array, order: ExpertOrder
) -> tuple[Array, ExpertOrder]:
    return _gather_rows(implementation, x_ND, order), order


def _gather_rows_backward(
    implementation: str, order: ExpertOrder, d_rows_MD: Array
) -> tuple[Array, None]:
    del implementation
    # Rows behind the last group take part in nothing, so their cotangent is 0 by construction.
    return _sum_rows(d_rows_MD, order).astype(d_rows_MD.dtype), None


_gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


def combine_rows(
    rows_MD: Float[Array, "M D"],
    weights_NK: Float[Array, "N K"],
    order: ExpertOrder,
    *,
    implementation: str = "xla",
) -> Float[Array, "N D"]:
    """Sums each token's rows, weighted, in float32; returns the rows' dtype.

    Args:
        rows_MD: the experts' results.
        weights_NK: float32 gates.
        order: where the tokens' rows are.
        implementation: of the gradient: "xla", or "hopper" for a kernel that reads each token once.

    Raises:
        ValueError: an unknown implementation, or a width that it cannot take.
    """
    _check("rows_MD", rows_MD.shape[1], implementation)
    return _combine_rows(implementation, rows_MD, weights_NK, order)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine_rows(
    implementation: str, rows_MD: Array, weights_NK: Array, order: ExpertOrder
) -> Array:
    del implementation
    return _sum_rows(rows_MD, order, weights_NK).astype(rows_MD.dtype)


def _combine_forward(
    implementation: str, rows_MD: Array, weights_NK: Array, order: ExpertOrder
) -> tuple[Array, tuple[Array, Array, ExpertOrder]]:
    out_ND = _combine_rows(implementation, rows_MD, weights_NK, order)
    return out_ND, (rows_MD, weights_NK, order)


def _combine_backward(
    implementation: str, residuals: tuple[Array, Array, ExpertOrder], d_out_ND: Array
) -> tuple[Array, Array, None]:
    rows_MD, weights_NK, order = residuals
    d_rows_MD = _spread(d_out_ND, order, implementation, weights_NK)
    d_out_ND = d_out_ND.astype(jnp.float32)
    d_weights_NK = jnp.stack(
        [
            jnp.sum(_rows_of_choice(rows_MD, order, choice) * d_out_ND, axis=1)
            for choice in range(weights_NK.shape[1])
        ],
        axis=1,
    )
    return d_rows_MD, d_weights_NK.astype(weights_NK.dtype), None


_combine_rows.defvjp(_combine_forward, _combine_backward)
