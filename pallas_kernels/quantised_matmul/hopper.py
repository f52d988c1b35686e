"""Products in float8 with a quantised matrix on Hopper: all rows are of one group."""

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import hopper_fp8
from pallas_kernels.fp8_rows import rounded
from pallas_kernels.quantised import QuantisedWeights, widened_products

# Rows up to which what takes time is reading the matrix, which XLA does within its product.
MOST_FEW_ROWS = 64


def products(lhs: Array, rhs: QuantisedWeights, out_dtype: DTypeLike) -> Array:
    """Rows [..., K], rounded to float8, times a matrix: [..., N], bfloat16 or float32."""
    rows = lhs.reshape(-1, lhs.shape[-1])
    if rows.shape[0] <= MOST_FEW_ROWS:
        return widened_products(rounded(lhs), rhs).astype(out_dtype)
    matrix = jax.tree.map(lambda leaf: leaf[None], rhs)
    sizes, first = jnp.full(1, rows.shape[0], jnp.int32), jnp.int32(0)
    out = hopper_fp8.row_products(rows, [matrix], 0, sizes, first, out_dtype=out_dtype)
    return out.reshape(*lhs.shape[:-1], -1)
