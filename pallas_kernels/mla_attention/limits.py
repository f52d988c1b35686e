"""What each implementation of latent attention takes."""

import jax.numpy as jnp
from jax.typing import DTypeLike

from pallas_kernels.implementations import (
    IMPLEMENTATIONS,
    check_choice,
    first_reason,
    not_equal,
    wrong_chip,
    wrong_dtype,
)

# Dims of a head that the kernels are written for: without position, rotary, and of the values.
NOPE, ROPE, VALUE = 128, 64, 128
DTYPES = {"tpu": (jnp.bfloat16, jnp.float32), "hopper": (jnp.bfloat16, jnp.float16)}


def supported(
    implementation: str,
    *,
    nope_dim: int,
    rope_dim: int,
    value_dim: int,
    dtype: DTypeLike,
    chip: str | None = None,
) -> str | None:
    """Says whether an implementation takes these sizes.

    Args:
        implementation: one of IMPLEMENTATIONS.
        nope_dim: N, dims of a head without position.
        rope_dim: R, rotary dims.
        value_dim: V, dims of a head's values.
        dtype: dtype of all float arguments.
        chip: the chip to run on, as `chips.chip_of` names it; None for one that fits.

    Returns:
        None, or one line that names what is to blame.

    Raises:
        ValueError: an unknown implementation.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation in ("reference", "xla"):
        return None
    return first_reason(
        wrong_chip(implementation, chip),
        wrong_dtype("dtype", dtype, DTYPES[implementation]),
        not_equal("nope dim", nope_dim, NOPE),
        not_equal("rope dim", rope_dim, ROPE),
        not_equal("value dim", value_dim, VALUE),
    )
