"""Products with a quantised matrix in plain XLA: it is widened within the product."""

from jax import Array
from jax.typing import DTypeLike

from pallas_kernels.quantised import QuantisedWeights, widened_products


def products(lhs: Array, rhs: QuantisedWeights, out_dtype: DTypeLike) -> Array:
    """Rows [..., K] times a matrix, [..., N]."""
    return widened_products(lhs, rhs).astype(out_dtype)
