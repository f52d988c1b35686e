"""What each implementation of the product with a quantised matrix takes."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.fp8_rows import refusal
from pallas_kernels.implementations import (
    check_choice,
    first_reason,
    not_multiple,
    wrong_chip,
    wrong_dtype,
)
from pallas_kernels.quantised import HOPPER_STEP, Format, hopper_refusal

IMPLEMENTATIONS = ("reference", "xla", "hopper")
DTYPES = (jnp.bfloat16, jnp.float32)
# What the Hopper kernel's widths are multiples of, of products in float8.
HOPPER_STEPS = {"input width": 16, "output width": 64}


def supported(
    implementation: str,
    *,
    width_in: int,
    width_out: int,
    dtype: DTypeLike,
    form: Format,
    products: str = "widen",
    chip: str | None = None,
) -> str | None:
    """Says whether an implementation takes these sizes.

    Args:
        implementation: one of IMPLEMENTATIONS.
        width_in: K, the contracted width.
        width_out: N, columns of the result.
        dtype: dtype of the rows.
        form: how the matrix is stored.
        products: one of `fp8_rows.PRODUCTS`.
        chip: the chip to run on, as `chips.chip_of` names it; None for one that fits.

    Returns:
        None, or one line that names what is to blame.

    Raises:
        ValueError: an unknown implementation, or unknown products.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    general = first_reason(
        wrong_dtype("dtype", dtype, DTYPES),
        wrong_chip(implementation, chip),
        refusal(products, form),
    )
    if general is not None or implementation != "hopper":
        return general
    if products == "widen":
        return first_reason(
            hopper_refusal(form),
            wrong_dtype("dtype", dtype, (jnp.bfloat16,)),
            not_multiple("input width", width_in, HOPPER_STEP),
            not_multiple("output width", width_out, HOPPER_STEP),
        )
    return first_reason(
        wrong_dtype("dtype", dtype, (jnp.bfloat16,)),
        not_multiple("input width", width_in, HOPPER_STEPS["input width"]),
        not_multiple("output width", width_out, HOPPER_STEPS["output width"]),
    )
