"""What a product with a quantised matrix means, in plain jax.numpy."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.quantised import QuantisedWeights


def products(lhs: Array, rhs: QuantisedWeights) -> Array:
    """Rows [..., K] times a matrix, float32 [..., N]."""
    weights = rhs.dequantised(jnp.float32)
    lhs = lhs.astype(jnp.float32)
    return jnp.einsum("...K,NK->...N", lhs, weights, precision=lax.Precision.HIGHEST)
