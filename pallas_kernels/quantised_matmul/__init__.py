"""Rows times a matrix that is stored in a byte or half of one a weight.

Products are "widen", where rows keep their type and the matrix is widened to it, or "fp8", where
rows too are rounded to float8 and what is multiplied has 8 bits (DeepSeek-V3, arXiv 2412.19437,
3.3; see `fp8_rows`). Two implementations have both meanings: "reference" (plain jax.numpy) and
"xla" (portable); "hopper" (Pallas, Mosaic GPU, sm_90) multiplies in float8, or reads the numbers of
few rows' matrix where they lie. Shape letters: M rows, K contracted, N columns.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from pallas_kernels.fp8_rows import PRODUCTS, rounded
from pallas_kernels.implementations import check_supported, load
from pallas_kernels.quantised import Format, QuantisedWeights, quantise
from pallas_kernels.quantised_matmul.limits import IMPLEMENTATIONS, supported

__all__ = [
    "IMPLEMENTATIONS",
    "PRODUCTS",
    "Format",
    "QuantisedWeights",
    "quantise",
    "quantised_matmul",
    "supported",
]


def quantised_matmul(
    lhs: Float[Array, "*rows K"],
    rhs: QuantisedWeights,
    *,
    out_dtype: DTypeLike | None = None,
    products: str = "widen",
    implementation: str,
) -> Float[Array, "*rows N"]:
    """Multiplies rows by a quantised matrix; products are summed in float32. No gradient.

    Args:
        lhs: bfloat16 or float32.
        rhs: one matrix, [K, N].
        out_dtype: dtype of the result; None for that of lhs.
        products: one of PRODUCTS.
        implementation: one of IMPLEMENTATIONS.

    Returns:
        [*rows, N].

    Raises:
        ValueError: shapes or dtypes that do not fit, an unknown implementation, or what it does not
            take (see `supported`).
    """
    rhs.check("rhs")
    if rhs.ndim != 2 or rhs.shape[0] != lhs.shape[-1]:
        raise ValueError(f"rhs: shape {rhs.shape} must be [K, N] with lhs's last {lhs.shape[-1]}")
    reason = supported(
        implementation,
        width_in=rhs.shape[0],
        width_out=rhs.shape[1],
        dtype=lhs.dtype,
        form=rhs.format,
        products=products,
    )
    check_supported(implementation, reason)
    dtype = jnp.dtype(out_dtype or lhs.dtype)
    module = load(__name__, implementation)
    out: Array
    if products == "widen":
        out = module.products(lhs, rhs, dtype)
    elif implementation == "hopper":
        out = module.float8_products(lhs, rhs, dtype)
    else:
        out = module.products(rounded(lhs), rhs, dtype)
    return out
