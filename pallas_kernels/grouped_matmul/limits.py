"""What each implementation of the grouped matmul takes."""

from collections.abc import Sequence

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.chips import TPU_LANES
from pallas_kernels.fp8_rows import refusal
from pallas_kernels.implementations import (
    IMPLEMENTATIONS,
    check_choice,
    first_reason,
    not_multiple,
    wrong_chip,
    wrong_dtype,
)
from pallas_kernels.quantised import (
    HOPPER_STEP,
    QUANTISED_DTYPES,
    Format,
    QuantisedWeights,
    hopper_refusal,
    is_quantised,
)

# Implementations that use a LayerOfStack where it lies. For the others the layer is copied first.
STACKS_IN_PLACE = ("tpu", "hopper")
DTYPES = (jnp.bfloat16, jnp.float32)
# Columns in a swizzled row of 128 bytes; also the contraction step of the Hopper kernels.
HOPPER_LANES = HOPPER_STEP
# Numbers along K with one scale that the TPU's kernel for stored numbers takes.
_TPU_BLOCKS = (32, 64, 128)


def hopper_reads(weights: Sequence[QuantisedWeights]) -> bool:
    """Whether Hopper's kernel for few rows reads such stored numbers; XLA does the others."""
    form = weights[0].format
    return all(array.format == form for array in weights) and hopper_refusal(form) is None


def tpu_reads(weights: Sequence[QuantisedWeights], dtype: DTypeLike) -> bool:
    """Whether the TPU's kernel reads such stored numbers for rows of this dtype; XLA does others.

    It scales sums of a whole column, or of blocks of 32, 64 or 128 numbers, and has no zero points.
    """
    form = weights[0].format
    block = form.block_in in _TPU_BLOCKS and form.block_out in (1, TPU_LANES)
    return (
        jnp.dtype(dtype) == jnp.bfloat16
        and all(array.format == form for array in weights)
        and (form.per_column or (block and not form.zero_points))
    )


def supported(
    implementation: str,
    *,
    width_in: int,
    width_out: int,
    dtype: DTypeLike,
    weights_dtype: DTypeLike | None = None,
    form: Format | None = None,
    products: str = "widen",
    transpose_rhs: bool = False,
    chip: str | None = None,
) -> str | None:
    """Says whether an implementation takes these sizes, forward and backward.

    Args:
        implementation: one of IMPLEMENTATIONS.
        width_in: K, the contracted width.
        width_out: N, columns of the result, of each of the two products in grouped_swiglu.
        dtype: dtype of the rows.
        weights_dtype: dtype of the weights, int8 or float8_e4m3fn for quantised ones; None for that
            of the rows.
        form: how `QuantisedWeights` are stored; None for others.
        products: one of `fp8_rows.PRODUCTS`.
        transpose_rhs: as of grouped_matmul.
        chip: the chip to run on, as `chips.chip_of` names it; None for one that fits.

    Returns:
        None, or one line that names what is to blame.

    Raises:
        ValueError: an unknown implementation, or unknown products.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    weights_dtype = dtype if weights_dtype is None else weights_dtype
    both = "transpose_rhs True must be False for QuantisedWeights"
    general = first_reason(
        both if form is not None and transpose_rhs else None,
        wrong_dtype("dtype", dtype, DTYPES),
        wrong_dtype("weights dtype", weights_dtype, (dtype, *QUANTISED_DTYPES)),
        wrong_chip(implementation, chip),
        refusal(products, form),
    )
    if general is not None or implementation in ("reference", "xla"):
        return general
    step = TPU_LANES if implementation == "tpu" else HOPPER_LANES
    widths = first_reason(
        not_multiple("input width", width_in, step), not_multiple("output width", width_out, step)
    )
    if implementation == "tpu":
        return widths or ("products 'fp8' must be 'widen'" if products == "fp8" else None)
    transposed = transpose_rhs and is_quantised(weights_dtype)
    return first_reason(
        wrong_dtype("dtype", dtype, (jnp.bfloat16,)),
        widths,
        "transpose_rhs True must be False for quantised weights" if transposed else None,
    )
