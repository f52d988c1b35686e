"""The one module through which every matrix of a model is read."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from dsjax.kernels import Kernels
from dsjax.layers.options import LayerOptions
from dsjax.quantise import Sides
from pallas_kernels.quantised import Format, QuantisedWeights
from pallas_kernels.quantised_matmul import quantised_matmul


class Linear(nnx.Module):
    """A matrix, or one for each head or expert; owns its gathering, its type and its stored form.

    Attributes:
        weight: the parameter, in its storage type; its logical dims are its metadata. Quantised, it
            is the stored numbers, with the dims of the result before those that are contracted.
        scales: of a quantised matrix, by block along what is contracted; else None.
        zeros: where its form has zero points.
        form: how it is stored if it is quantised.
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        dims: tuple[str, ...],
        options: LayerOptions,
        rngs: nnx.Rngs,
        *,
        num_stacked: int = 0,
        num_contracted: int = 1,
    ):
        """Creates the matrix.

        Args:
            shape: its sizes: those that count matrices, those that are contracted, the others.
            dims: its logical dims.
            options: what all layers share.
            rngs: of its initial values.
            num_stacked: leading dims that count matrices: experts.
            num_contracted: dims after these that are contracted.
        """
        self.weight = options.new_weight(rngs, shape, dims)
        self.scales: nnx.Param | None = nnx.data(None)
        self.zeros: nnx.Param | None = nnx.data(None)
        self.form: Format | None = None
        self.sides = Sides(tuple(shape), tuple(dims), num_stacked, num_contracted)
        self.options = options

    def __call__(self, subscripts: str, x: jax.Array) -> jax.Array:
        """Contracts x with the matrix.

        Args:
            subscripts: of `einsum`; the second operand is the matrix.
            x: compute type.

        Returns:
            An array of the compute type.
        """
        if self.form is None:
            return jnp.einsum(subscripts, x, self.gathered())
        matrix = self.quantised_matrix()
        how = self.options.kernels.of_matrix(matrix, x.dtype)
        return self.sides.contract(subscripts, x, matrix, how)

    def gathered(self) -> jax.Array:
        """Returns the matrix in the compute type, its gathering begun where fsdp divides it."""
        return self.options.rules.gather_minor_axes(
            self.stored().astype(self.options.dtype), *self.sides.dims
        )

    def divided(self) -> jax.Array | QuantisedWeights:
        """Returns the matrix divided as it lives, for use in a `shard_map`.

        In the compute type, or quantised: `multiply` and the grouped matmul take either.
        """
        if self.form is None:
            return self.stored().astype(self.options.dtype)
        return self.quantised_matrix()

    def stored(self) -> jax.Array:
        """Returns the matrix in its storage type, or widened from fewer bits to the compute type.

        For products that choose their own type.
        """
        if self.form is None:
            return self.weight[...]
        return self.sides.whole(self.quantised_matrix().dequantised(self.options.dtype))

    def quantised_matrix(self) -> QuantisedWeights:
        """Returns what is stored, with one dim for the result and one for what is contracted."""
        assert self.form is not None
        assert self.scales is not None
        zeros = None if self.zeros is None else self.zeros[...]
        return self.sides.as_matrix(self.form, self.weight[...], self.scales[...], zeros)

    @property
    def is_ready(self) -> bool:
        """Whether products take what is stored as it is: in the compute type, or quantised."""
        return self.form is not None or self.weight[...].dtype == self.options.dtype

    def quantise(self, form: Format) -> None:
        """Replaces the matrix by its quantised form; of a stack of layers, all of them."""
        assert self.form is None
        parts = self.sides.quantised(self.weight[...], form)
        dims = self.sides.leaf_dims(form, self.options.rules)
        self.form = form
        self.weight = nnx.Param(parts.values, dims=dims.values)
        self.scales = nnx.data(nnx.Param(parts.scales, dims=dims.scales))
        if parts.zeros is not None:
            self.zeros = nnx.data(nnx.Param(parts.zeros, dims=dims.zeros))

    @property
    def dims(self) -> tuple[str, ...]:
        """The logical dims of the matrix, those that are contracted first."""
        return self.sides.dims


def multiply(
    x: jax.Array,
    matrix: jax.Array | QuantisedWeights,
    kernels: Kernels,
    out_dtype: DTypeLike | None = None,
) -> jax.Array:
    """Multiplies [..., D] by a matrix [D, N] in whatever form `Linear.divided` gave it.

    Args:
        x: compute type.
        matrix: in the compute type, or quantised.
        kernels: that multiply.
        out_dtype: of the result of a quantised matrix; None for the compute type.
    """
    if isinstance(matrix, QuantisedWeights):
        how = kernels.of_matrix(matrix, x.dtype)
        return quantised_matmul(x, matrix, out_dtype=out_dtype, **how)
    return x @ matrix


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
