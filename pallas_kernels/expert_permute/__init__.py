"""Tokens copied to rows sorted by expert, and summed back (DeepSeekMoE, arXiv 2405.04434, 2.2).

This is what happens on one device; `expert_exchange` is what happens between devices.

Three implementations have one meaning: "reference" (plain jax.numpy, small sizes), "xla" (portable,
gathers both ways) and "hopper" (Pallas, Mosaic GPU, sm_90: reads each token once where XLA reads it
K times). Shape letters: N tokens, K experts of a token, D width, E experts, M rows.

Each implementation is a module with three functions, in whose terms both ops and their gradients
are written here: `spread_rows` (each token to its rows), `sum_rows` (each token's rows added) and
`dot_rows` (each of a token's rows times the token).
"""

import functools

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float

from pallas_kernels.expert_permute.limits import IMPLEMENTATIONS, supported
from pallas_kernels.expert_permute.order import ExpertOrder, sort_by_expert, take_rows
from pallas_kernels.implementations import check_supported, load

__all__ = [
    "IMPLEMENTATIONS",
    "ExpertOrder",
    "combine_rows",
    "gather_rows",
    "sort_by_expert",
    "supported",
    "take_rows",
]


def gather_rows(
    x_ND: Float[Array, "N D"], order: ExpertOrder, *, implementation: str
) -> Float[Array, "M D"]:
    """Copies each token to its rows.

    The gradient of a token is a sum over its K rows, found by a gather: no scatter-add.

    Args:
        x_ND: tokens.
        order: where they go, from sort_by_expert.
        implementation: one of IMPLEMENTATIONS.

    Returns:
        Rows of x_ND's dtype, sorted by expert.

    Raises:
        ValueError: an unknown implementation, or what it does not take (see `supported`).
    """
    _check(x_ND, implementation)
    return _gather_rows(implementation, x_ND, order)


def combine_rows(
    rows_MD: Float[Array, "M D"],
    weights_NK: Float[Array, "N K"],
    order: ExpertOrder,
    *,
    implementation: str,
) -> Float[Array, "N D"]:
    """Sums each token's rows, weighted, in float32.

    Args:
        rows_MD: the experts' results.
        weights_NK: float32 gates.
        order: where the tokens' rows are, from sort_by_expert.
        implementation: one of IMPLEMENTATIONS.

    Returns:
        Tokens of rows_MD's dtype.

    Raises:
        ValueError: an unknown implementation, or what it does not take (see `supported`).
    """
    _check(rows_MD, implementation)
    return _combine_rows(implementation, rows_MD, weights_NK, order)


def _check(array: Array, implementation: str) -> None:
    reason = supported(implementation, width=array.shape[1], dtype=array.dtype)
    check_supported(implementation, reason)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _gather_rows(implementation: str, x_ND: Array, order: ExpertOrder) -> Array:
    return load(__name__, implementation).spread_rows(x_ND, order)


def _gather_rows_forward(
    implementation: str, x_ND: Array, order: ExpertOrder
) -> tuple[Array, ExpertOrder]:
    return _gather_rows(implementation, x_ND, order), order


def _gather_rows_backward(
    implementation: str, order: ExpertOrder, d_rows_MD: Array
) -> tuple[Array, None]:
    # Rows after the last group take part in nothing, so their cotangent is 0 by construction.
    d_x_ND = load(__name__, implementation).sum_rows(d_rows_MD, order)
    return d_x_ND.astype(d_rows_MD.dtype), None


_gather_rows.defvjp(_gather_rows_forward, _gather_rows_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _combine_rows(
    implementation: str, rows_MD: Array, weights_NK: Array, order: ExpertOrder
) -> Array:
    out_ND = load(__name__, implementation).sum_rows(rows_MD, order, weights_NK)
    return out_ND.astype(rows_MD.dtype)


def _combine_forward(
    implementation: str, rows_MD: Array, weights_NK: Array, order: ExpertOrder
) -> tuple[Array, tuple[Array, Array, ExpertOrder]]:
    out_ND = _combine_rows(implementation, rows_MD, weights_NK, order)
    return out_ND, (rows_MD, weights_NK, order)


def _combine_backward(
    implementation: str, residuals: tuple[Array, Array, ExpertOrder], d_out_ND: Array
) -> tuple[Array, Array, None]:
    rows_MD, weights_NK, order = residuals
    module = load(__name__, implementation)
    d_rows_MD = module.spread_rows(d_out_ND, order, weights_NK)
    d_weights_NK = module.dot_rows(rows_MD, order, d_out_ND.astype(jnp.float32))
    return d_rows_MD, d_weights_NK.astype(weights_NK.dtype), None


_combine_rows.defvjp(_combine_forward, _combine_backward)
