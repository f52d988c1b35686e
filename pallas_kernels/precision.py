"""The precision that products of an op's type are taken in."""

from jax import lax
from jax import numpy as jnp
from jax.typing import DTypeLike


def precision_of(dtype: DTypeLike) -> lax.Precision | None:
    """Returns what keeps all bits of float32 operands: a GPU or TPU would round them by default.

    Scores of some hundreds leave nothing of TF32's or bfloat16's digits to the softmax.
    """
    return lax.Precision.HIGHEST if jnp.dtype(dtype) == jnp.float32 else None
