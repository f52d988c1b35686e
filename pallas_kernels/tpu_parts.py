"""Parts that the TPU kernels of several ops are built from."""

import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.precision import precision_of


def dot(lhs: Array, rhs: Array, *, transpose_rhs: bool = False) -> Array:
    """The product in float32; of float32 arrays to full precision."""
    precision = precision_of(lhs.dtype)
    dims = (((1,), (1 if transpose_rhs else 0,)), ((), ()))
    return lax.dot_general(lhs, rhs, dims, precision=precision, preferred_element_type=jnp.float32)
