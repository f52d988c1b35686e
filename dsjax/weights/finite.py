"""Whether weights hold numbers: NaN and infinity are found while they are read."""

from __future__ import annotations

from typing import Any

import numpy as np

# Of each size of a float: the unsigned integer with its bits, and its exponent's bits. They are all
# set where a value is NaN or infinite, of float32 and of bfloat16 alike.
_EXPONENTS: dict[int, tuple[Any, int]] = {2: (np.uint16, 0x7F80), 4: (np.uint32, 0x7F800000)}
_BLOCK = 1 << 18  # values looked at together: they stay in a core's cache


class NonFiniteError(ValueError):
    """Weights hold NaN or infinite values: not what is there, but what it means, is wrong."""


def require_finite(values: np.ndarray, where: str) -> None:
    """Checks that float32 or bfloat16 weights are numbers, at some 20 GB/s a core.

    Args:
        values: any shape; looked at in place where contiguous.
        where: file and tensor, for the message.

    Raises:
        NonFiniteError: there are NaN or infinite values; says how many of those read.
    """
    unsigned, mask = _EXPONENTS[values.dtype.itemsize]
    bits = np.ascontiguousarray(values).reshape(-1).view(unsigned)
    scratch = np.empty(min(_BLOCK, bits.size), unsigned)
    for start in range(0, bits.size, _BLOCK):
        block = bits[start : start + _BLOCK]
        if np.bitwise_and(block, unsigned(mask), out=scratch[: block.size]).max() == mask:
            floats = values.astype(np.float32)
            nan, infinite = np.isnan(floats).sum(), np.isinf(floats).sum()
            raise NonFiniteError(
                f"{where}: {nan} NaN and {infinite} infinite of the {values.size} values read; "
                "where that is meant, load with allow_nonfinite=True (convert --allow-nonfinite)"
            )
