"""What the permutation means, in plain jax.numpy: for tests and small sizes only."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.expert_permute.order import ExpertOrder


def _einsum(letters: str, order: ExpertOrder, *arrays: Array) -> Array:
    """An einsum in float32 whose first operand is 1 where assignment n, k went to row m."""
    member_NKM = order.row_NK[..., None] == jnp.arange(order.token_M.shape[0])
    operands = (x.astype(jnp.float32) for x in (member_NKM, *arrays))
    return jnp.einsum(letters, *operands, precision=lax.Precision.HIGHEST)


def spread_rows(x_ND: Array, order: ExpertOrder, weights_NK: Array | None = None) -> Array:
    """Each token, times its weights where given, copied to its rows."""
    if weights_NK is None:
        weights_NK = jnp.ones(order.row_NK.shape)
    return _einsum("NKM,ND,NK->MD", order, x_ND, weights_NK).astype(x_ND.dtype)


def sum_rows(rows_MD: Array, order: ExpertOrder, weights_NK: Array | None = None) -> Array:
    """Sum of each token's rows, times their weights where given, in float32."""
    if weights_NK is None:
        weights_NK = jnp.ones(order.row_NK.shape)
    return _einsum("NKM,MD,NK->ND", order, rows_MD, weights_NK)


def dot_rows(rows_MD: Array, order: ExpertOrder, x_ND: Array) -> Array:
    """Each of a token's rows times the token, in float32, [N, K]; 0 for one without a row."""
    return _einsum("NKM,MD,ND->NK", order, rows_MD, x_ND)
