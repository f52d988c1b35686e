"""What row products are, for implementations that keep or add products after rounding them."""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantised import BlockScaledWeights, QuantisedWeights

Weights = Array | BlockScaledWeights | QuantisedWeights


def row_products(
    matmul: Callable[[Array, Weights], Array],
    swiglu: Callable[..., Array],
    lhs: Sequence[Array],
    rhs: Sequence[Weights],
    *,
    activation: bool,
    keep_products: bool,
) -> tuple[Array, ...]:
    """Rows times weights: one product, two with SwiGLU after them, or the sum of two.

    Args:
        matmul: rows [M, N] from rows [M, K] and matrices, in the rows' dtype.
        swiglu: hidden rows from rows, gate and up matrices.
        lhs: one array of rows [M, K], or as many as there are matrices, whose products are added.
        rhs: matrices [G, K, N], or [G, N, K] where an implementation is told `transpose_rhs`: one,
            or a gate and an up matrix, or one for each of `lhs`.
        activation: give silu(gate) * up of the two products.
        keep_products: give the two products as well.

    Returns:
        Rows [M, N]; with keep_products also the gate and the up products.
    """
    if keep_products:
        gate_MN, up_MN = (matmul(lhs[0], matrices) for matrices in rhs)
        hidden_MN = jax.nn.silu(gate_MN.astype(jnp.float32)) * up_MN.astype(jnp.float32)
        return hidden_MN.astype(lhs[0].dtype), gate_MN, up_MN
    if activation:
        return (swiglu(lhs[0], *rhs),)
    return (functools.reduce(jnp.add, map(matmul, lhs, rhs)),)
