"""Rows times a matrix that is stored in a byte or half of one a weight; rows keep their type.

Two implementations have one meaning: "reference" (plain jax.numpy) and "xla" (portable). Shape
letters: M rows, K contracted, N columns.
"""

import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from pallas_kernels.implementations import check_supported, load
from pallas_kernels.quantised import Format, QuantisedWeights, quantise
from pallas_kernels.quantised_matmul.limits import IMPLEMENTATIONS, supported

__all__ = [
    "IMPLEMENTATIONS",
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
    implementation: str,
) -> Float[Array, "*rows N"]:
    """Multiplies rows by a quantised matrix; products are summed in float32. No gradient.

    Args:
        lhs: bfloat16 or float32.
        rhs: one matrix, [K, N].
        out_dtype: dtype of the result; None for that of lhs.
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
    )
    check_supported(implementation, reason)
    out: Array = load(__name__, implementation).products(lhs, rhs)
    return out.astype(jnp.dtype(out_dtype or lhs.dtype))
