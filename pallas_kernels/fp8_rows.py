"""Rows rounded to float8, 128 columns of a row by a scale of their own, for products in float8.

DeepSeek-V3 multiplies so (arXiv 2412.19437, 3.3): activations in tiles of 1 x 128, weights in
blocks of 128 x 128, and sums over 128 of the contraction scaled and added up in float32. Scales of
rows are powers of two here, as V3's are where it keeps activations. float8 loses no bits by that,
and a rounded row is exact in bfloat16: so products of rounded rows with widened weights have the
very meaning of products in float8, and few rows are multiplied like that.
"""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Float

from pallas_kernels.implementations import check_choice, first_reason, wrong_dtype
from pallas_kernels.quantised import SCALE_BLOCK as BLOCK
from pallas_kernels.quantised import Format

# How rows multiply stored numbers: as they are, by widened weights; or rounded to float8.
PRODUCTS = ("widen", "fp8")
DTYPE = jnp.float8_e4m3fn
_LEAST_EXPONENT = -92  # of the largest magnitude that still decides a scale; scales begin at 2^-100


def refusal(products: str, form: Format | None) -> str | None:
    """Says why weights of a form are not multiplied so; None where they are.

    Args:
        products: one of PRODUCTS.
        form: how the weights are stored; None for weights that are not quantised.

    Raises:
        ValueError: `products` is none of PRODUCTS.
    """
    check_choice("products", products, PRODUCTS)
    if products == "widen":
        return None
    if form is None:
        return "products 'fp8' must be of weights that are stored in float8_e4m3fn"
    return first_reason(
        wrong_dtype("products 'fp8': weights dtype", form.dtype, (DTYPE,)),
        None
        if form.per_column or (form.block_in, form.block_out) == (BLOCK, BLOCK)
        else f"products 'fp8': blocks of {form.block_in} x {form.block_out} weights must be "
        f"{BLOCK} x {BLOCK} or whole columns",
    )


def quantised_blocks(rows: Float[Array, "*rows K"]) -> tuple[Array, Array]:
    """Quantises each 128 columns of each row by the least power of two that holds them.

    Args:
        rows: any float dtype.

    Returns:
        float8_e4m3fn [*rows, ceil(K / 128), 128], with zeros beyond K, and float32 scales
        [*rows, ceil(K / 128)]. A block with infinity has scale NaN, one with NaN some NaN.
    """
    *lead, num_k = rows.shape
    padded = rows.astype(jnp.float32)
    if num_k % BLOCK:
        padded = jnp.pad(padded, [(0, 0)] * len(lead) + [(0, -num_k % BLOCK)])
    blocks = padded.reshape(*lead, -1, BLOCK)
    scales, inverses = scales_of(jnp.max(jnp.abs(blocks), axis=-1))
    return (blocks * inverses[..., None]).astype(DTYPE), scales


def scales_of(largest: Array) -> tuple[Array, Array]:
    """The scales of blocks by their largest magnitudes, float32, and one over them.

    NaN and infinity have scale NaN.
    """
    # 448, float8's largest number, is 1.75 * 2^8: of 1.m * 2^e the exponent is e - 8, and one more
    # where 1.m exceeds 1.75. The sum carries then.
    bits = lax.bitcast_convert_type(largest, jnp.int32) + 0x1FFFFF
    exponent = jnp.maximum((bits >> 23) - 127, _LEAST_EXPONENT) - 8
    scales = lax.bitcast_convert_type((127 + exponent) << 23, jnp.float32)
    inverses = lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)
    return jnp.where(largest < jnp.inf, scales, jnp.nan), inverses


def rounded(rows: Float[Array, "*rows K"]) -> Array:
    """Rounds rows to what `quantised_blocks` keeps of them, in their own dtype.

    Args:
        rows: bfloat16 or float32, both of which hold the result exactly.
    """
    values, scales = quantised_blocks(rows)
    # Else a compiler may take the conversion there and back for nothing.
    values = lax.optimization_barrier(values)
    wide = values.astype(jnp.float32) * scales[..., None]
    return wide.reshape(*rows.shape[:-1], -1)[..., : rows.shape[-1]].astype(rows.dtype)
