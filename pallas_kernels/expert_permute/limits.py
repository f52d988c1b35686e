"""What each implementation of the local permutation takes."""

from jax.typing import DTypeLike

from pallas_kernels.implementations import (
    check_choice,
    first_reason,
    not_multiple,
    wrong_chip,
)

IMPLEMENTATIONS = ("reference", "xla", "hopper")
# Threads of a warpgroup, which share a token's numbers evenly.
HOPPER_THREADS = 128


def supported(
    implementation: str, *, width: int, dtype: DTypeLike, chip: str | None = None
) -> str | None:
    """Says whether an implementation takes these sizes, forward and backward.

    Args:
        implementation: one of IMPLEMENTATIONS.
        width: D, numbers in a token.
        dtype: dtype of the tokens.
        chip: the chip to run on, as `chips.chip_of` names it; None for one that fits.

    Returns:
        None, or one line that names what is to blame.

    Raises:
        ValueError: an unknown implementation.
    """
    check_choice("implementation", implementation, IMPLEMENTATIONS)
    if implementation != "hopper":
        return None
    return first_reason(
        wrong_chip(implementation, chip), not_multiple("width", width, HOPPER_THREADS)
    )
