"""The one module through which every matrix of a model is read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.layers.options import LayerOptions


class Linear(nnx.Module):
    """A matrix, or one for each head or expert; owns its gathering, its type and its stored form.

    Attributes:
        weight: the parameter, in its storage type; its logical dims are its metadata.
    """

    def __init__(
        self, shape: tuple[int, ...], dims: tuple[str, ...], options: LayerOptions, rngs: nnx.Rngs
    ):
        """Creates the matrix.

        Args:
            shape: its sizes, those that are contracted first.
            dims: its logical dims.
            options: what all layers share.
            rngs: of its initial values.
        """
        self.weight = options.new_weight(rngs, shape, dims)
        self.options = options

    def __call__(self, subscripts: str, x: jax.Array) -> jax.Array:
        """Contracts x with the matrix.

        Args:
            subscripts: of `einsum`; the second operand is the matrix.
            x: compute type.

        Returns:
            An array of the compute type.
        """
        return jnp.einsum(subscripts, x, self.gathered())

    def gathered(self) -> jax.Array:
        """Returns the matrix in the compute type, its gathering begun where fsdp divides it."""
        return self.options.rules.gather_minor_axes(self.divided(), *self.dims)

    def divided(self) -> jax.Array:
        """Returns the matrix in the compute type, divided as it lives: for use in a `shard_map`."""
        return self.stored().astype(self.options.dtype)

    def stored(self) -> jax.Array:
        """Returns the matrix in its storage type: for products that choose their own."""
        return self.weight[...]

    @property
    def dims(self) -> tuple[str, ...]:
        """The logical dims of the matrix."""
        return self.weight.get_metadata("dims")


@jax.custom_vjp
def float32_matmul(x_MD: jax.Array, w_DN: jax.Array) -> jax.Array:
    """Multiplies in x's dtype into a float32 result; the gradient's products run in x's dtype too.

    Without this the float32 cotangent would drag both products of the backward pass to float32.

    Args:
        x_MD: [..., D], compute dtype.
        w_DN: [D, N], any float dtype; its gradient is summed in that dtype.

    Returns:
        [..., N], float32.
    """
    w_DN = w_DN.astype(x_MD.dtype)
    return jnp.einsum("...D,DN->...N", x_MD, w_DN, preferred_element_type=jnp.float32)


def _float32_matmul_forward(
    x_MD: jax.Array, w_DN: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return float32_matmul(x_MD, w_DN), (x_MD, w_DN)


def _float32_matmul_backward(
    kept: tuple[jax.Array, jax.Array], dout_MN: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x_MD, w_DN = kept
    dout_MN = dout_MN.astype(x_MD.dtype)
    dx_MD = jnp.einsum("...N,DN->...D", dout_MN, w_DN.astype(x_MD.dtype))
    dw_DN = jnp.einsum("...D,...N->DN", x_MD, dout_MN, preferred_element_type=jnp.float32)
    return dx_MD, dw_DN.astype(w_DN.dtype)


float32_matmul.defvjp(_float32_matmul_forward, _float32_matmul_backward)
