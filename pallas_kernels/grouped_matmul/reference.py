"""What a grouped matmul means, in plain jax.numpy: for tests and small sizes only."""

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import portable
from pallas_kernels.grouped_matmul.portable import Weights
from pallas_kernels.quantised import BlockScaledWeights, QuantisedWeights, dequantise


def _weights(rhs: Weights, dtype: DTypeLike) -> Array:
    if isinstance(rhs, QuantisedWeights):
        return rhs.dequantised(dtype).swapaxes(1, 2)
    if isinstance(rhs, BlockScaledWeights):
        return dequantise(rhs.values, rhs.scales, dtype)
    return rhs


def _membership(group_sizes_G: Array, group_offset: Array, num_rows: int, num_groups: int) -> Array:
    """1.0 where row m belongs to the held group g, float32 [M, G]."""
    group_M = jnp.searchsorted(jnp.cumsum(group_sizes_G), jnp.arange(num_rows), side="right")
    return jax.nn.one_hot(group_M - group_offset, num_groups, dtype=jnp.float32)


def row_products(
    lhs: tuple[Array, ...],
    rhs: tuple[Weights, ...],
    group_sizes_G: Array,
    group_offset: Array,
    *,
    transpose_rhs: bool = False,
    activation: bool = False,
    keep_products: bool = False,
) -> tuple[Array, ...]:
    """Rows times their group's matrices; the arguments are those of `portable.row_products`."""

    def multiply(lhs_MK: Array, rhs_GKN: Weights) -> Array:
        weights = _weights(rhs_GKN, lhs_MK.dtype).astype(jnp.float32)
        member_MG = _membership(group_sizes_G, group_offset, lhs_MK.shape[0], weights.shape[0])
        letters = "MG,MK,GNK->MN" if transpose_rhs else "MG,MK,GKN->MN"
        lhs_MK = lhs_MK.astype(jnp.float32)
        return jnp.einsum(letters, member_MG, lhs_MK, weights, precision=lax.Precision.HIGHEST)

    def matmul(lhs_MK: Array, rhs_GKN: Weights) -> Array:
        return multiply(lhs_MK, rhs_GKN).astype(lhs_MK.dtype)

    def swiglu(lhs_MK: Array, gate_GKN: Weights, up_GKN: Weights) -> Array:
        gate_MN, up_MN = multiply(lhs_MK, gate_GKN), multiply(lhs_MK, up_GKN)
        return (jax.nn.silu(gate_MN) * up_MN).astype(lhs_MK.dtype)

    return portable.row_products(
        matmul, swiglu, lhs, rhs, activation=activation, keep_products=keep_products
    )


def weight_gradient(
    lhs_MK: Array, d_out_MN: Array, group_sizes_G: Array, group_offset: Array, num_groups: int
) -> Array:
    """Sums lhs^T d_out over the rows of each held group.

    Args:
        lhs_MK: rows.
        d_out_MN: gradient of their outputs.
        group_sizes_G: int32 rows of every group.
        group_offset: int32, the first group held.
        num_groups: number of groups held.

    Returns:
        Gradients [num_groups, K, N] of lhs_MK's dtype.
    """
    member_MG = _membership(group_sizes_G, group_offset, lhs_MK.shape[0], num_groups)
    d_rhs_GKN = jnp.einsum(
        "MG,MK,MN->GKN",
        member_MG,
        lhs_MK.astype(jnp.float32),
        d_out_MN.astype(jnp.float32),
        precision=lax.Precision.HIGHEST,
    )
    return d_rhs_GKN.astype(lhs_MK.dtype)
