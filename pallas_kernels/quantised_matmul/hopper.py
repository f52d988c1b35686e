"""Products with a quantised matrix on Hopper, of few rows or in float8: all are of one group."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike

from pallas_kernels import hopper_few_rows, hopper_fp8
from pallas_kernels.fp8_rows import rounded
from pallas_kernels.quantised import (
    HOPPER_STEP,
    QuantisedWeights,
    hopper_refusal,
    widened_products,
)

# Rows up to which what takes time is reading the matrix: in float8 nothing is gained then.
MOST_FEW_ROWS = 64
# Rows up to which a matrix is read where it lies, by 32 rows at a time. For more it is widened
# first, which takes little of their time.
MOST_READ_ROWS = 128


def products(lhs: Array, rhs: QuantisedWeights, out_dtype: DTypeLike) -> Array:
    """Rows [..., K] times a matrix: [..., N], bfloat16 or float32."""
    if math.prod(lhs.shape[:-1]) > MOST_READ_ROWS:
        return widened_products(lhs, rhs).astype(out_dtype)
    return _of_one_group(hopper_few_rows.row_products, lhs, rhs, out_dtype)


def float8_products(lhs: Array, rhs: QuantisedWeights, out_dtype: DTypeLike) -> Array:
    """Rows [..., K], rounded to float8, times a matrix: [..., N], bfloat16 or float32."""
    if math.prod(lhs.shape[:-1]) > MOST_FEW_ROWS:
        return _of_one_group(hopper_fp8.row_products, lhs, rhs, out_dtype)
    if lhs.shape[-1] % HOPPER_STEP or hopper_refusal(rhs.format) is not None:
        return widened_products(rounded(lhs), rhs).astype(out_dtype)
    return products(rounded(lhs), rhs, out_dtype)


def _of_one_group(
    row_products: Callable[..., Array], lhs: Array, rhs: QuantisedWeights, out_dtype: DTypeLike
) -> Array:
    rows = lhs.reshape(-1, lhs.shape[-1])
    matrix = jax.tree.map(lambda leaf: leaf[None], rhs)
    sizes, first = jnp.full(1, rows.shape[0], jnp.int32), jnp.int32(0)
    out = row_products(rows, [matrix], 0, sizes, first, out_dtype=out_dtype)
    return out.reshape(*lhs.shape[:-1], -1)
