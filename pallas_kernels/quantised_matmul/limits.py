"""What each implementation of the product with a quantised matrix takes."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.implementations import check_choice, first_reason, wrong_chip, wrong_dtype
from pallas_kernels.quantised import Format

IMPLEMENTATIONS = ("reference", "xla")
DTYPES = (jnp.bfloat16, jnp.float32)


def supported(
    implementation: str,
    *,
    width_in: int,
    width_out: int,
    dtype: DTypeLike,
    form: Format,
    chip: str | None = None,
) -> str | None:
    """Says whether an implementation takes these sizes.

    Args:
        implementation: one of IMPLEMENTATIONS.
        width_in: K, the contracted width.
        width_out: N, columns of the result.
        dtype: dtype of the rows.
        form: how the matrix is stored.
        chip: the chip to run on, as `chips.chip_of` names it; None for one that fits.

    Returns:
        None, or one line that names what is to blame.

    Raises:
        ValueError: an unknown implementation.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    return first_reason(wrong_dtype("dtype", dtype, DTYPES), wrong_chip(implementation, chip))
