"""What a product with a quantised matrix means, in plain jax.numpy."""

import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.quantised import QuantisedWeights


def products(lhs: Array, rhs: QuantisedWeights, out_dtype: DTypeLike) -> Array:
    """Rows [..., K] times a matrix, [..., N]."""
    weights = rhs.dequantised(jnp.float32)
    lhs = lhs.astype(jnp.float32)
    out = jnp.einsum("...K,NK->...N", lhs, weights, precision=lax.Precision.HIGHEST)
    return out.astype(out_dtype)
