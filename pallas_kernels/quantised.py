"""Numbers stored in one byte each, with scales: of weights by block, of any rows by row."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

QUANTISED_DTYPES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))
# Rows and columns of the block of weights that has one scale.
SCALE_BLOCK = 128


def is_quantised(dtype: DTypeLike) -> bool:
    """Whether numbers of this dtype need scales."""
    return jnp.dtype(dtype) in QUANTISED_DTYPES


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaledWeights:
    """Weights [G, K, N] stored in one byte each, with one float32 scale for every 128 x 128 block.

    Attributes:
        values: int8 or float8_e4m3fn [G, K, N].
        scales: float32 [G, ceil(K / 128), ceil(N / 128)]. A weight is its value times the scale of
            its block.
    """

    values: Array
    scales: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the weights, [G, K, N]."""
        return self.values.shape

    @property
    def dtype(self) -> jnp.dtype:
        """Stored dtype of the values."""
        return self.values.dtype

    def check(self, name: str) -> None:
        """Raises ValueError when dtypes or shapes do not fit together.

        Args:
            name: the argument to name in the message.
        """
        if self.values.ndim != 3:
            raise ValueError(f"{name}.values: shape {self.values.shape} must be [G, K, N]")
        if not is_quantised(self.values.dtype):
            raise ValueError(
                f"{name}.values: dtype {self.values.dtype} must be int8 or float8_e4m3fn"
            )
        if self.scales.dtype != jnp.float32:
            raise ValueError(f"{name}.scales: dtype {self.scales.dtype} must be float32")
        groups, *dims = self.values.shape
        want = (groups, *(-(-dim // SCALE_BLOCK) for dim in dims))
        if self.scales.shape != want:
            raise ValueError(
                f"{name}.scales: shape {self.scales.shape} must be {want}, one scale for each "
                f"{SCALE_BLOCK} x {SCALE_BLOCK} block of values {self.values.shape}"
            )


def block_scaled(weights: Float[Array, "G K N"], dtype: DTypeLike) -> BlockScaledWeights:
    """Quantises weights symmetrically, each 128 x 128 block by its own largest magnitude.

    Args:
        weights: float [G, K, N].
        dtype: int8 or float8_e4m3fn.

    Returns:
        The quantised weights. A block of zeros has scale 1, one with NaN or infinity scale NaN.

    Raises:
        ValueError: when dtype is neither int8 nor float8_e4m3fn.
    """
    num_groups, num_k, num_n = weights.shape
    blocks_k, blocks_n = -(-num_k // SCALE_BLOCK), -(-num_n // SCALE_BLOCK)
    pad = (blocks_k * SCALE_BLOCK - num_k, blocks_n * SCALE_BLOCK - num_n)
    padded = jnp.pad(weights.astype(jnp.float32), ((0, 0), (0, pad[0]), (0, pad[1])))
    blocks = padded.reshape(num_groups, blocks_k, SCALE_BLOCK, blocks_n, SCALE_BLOCK)
    values, scales = _round_to(blocks, dtype, axes=(2, 4))
    return BlockScaledWeights(values.reshape(padded.shape)[:, :num_k, :num_n], scales)


def dequantise(values: Array, scales: Array, dtype: DTypeLike) -> Array:
    """Multiplies values by the scales of their blocks.

    Args:
        values: int8 or float8_e4m3fn [..., K, N].
        scales: float32 [..., ceil(K / 128), ceil(N / 128)].
        dtype: dtype of the result; the product is taken in float32 and rounded once.

    Returns:
        Weights [..., K, N].
    """
    num_k, num_n = values.shape[-2:]
    scale = jnp.repeat(jnp.repeat(scales, SCALE_BLOCK, axis=-2), SCALE_BLOCK, axis=-1)
    return (values.astype(jnp.float32) * scale[..., :num_k, :num_n]).astype(dtype)


def row_scaled(
    rows: Float[Array, "*rows C"], dtype: DTypeLike
) -> tuple[Array, Float[Array, "*rows"]]:
    """Quantises each row symmetrically by its own largest magnitude.

    Args:
        rows: any float dtype.
        dtype: int8 or float8_e4m3fn.

    Returns:
        (values of `dtype`, float32 scales), with rows ~ values * scales. A row of zeros has
        scale 1, one with NaN or infinity scale NaN.

    Raises:
        ValueError: when dtype is neither int8 nor float8_e4m3fn.
    """
    return _round_to(rows.astype(jnp.float32), dtype, axes=(-1,))


def _round_to(x: Array, dtype: DTypeLike, axes: tuple[int, ...]) -> tuple[Array, Array]:
    """Values and scales of float32 numbers, with one scale over `axes`."""
    dtype = jnp.dtype(dtype)
    if not is_quantised(dtype):
        raise ValueError(f"dtype: {dtype} must be int8 or float8_e4m3fn")
    whole = dtype == jnp.int8
    largest = float(jnp.iinfo(dtype).max if whole else jnp.finfo(dtype).max)
    magnitude = jnp.abs(x).max(axis=axes, keepdims=True)
    scales = magnitude / largest
    # Not 0, of numbers that are next to nothing: 0 / 0 is NaN.
    scales = jnp.where(scales < jnp.finfo(jnp.float32).tiny, 1.0, scales)
    # An integer cannot hold NaN or infinity, and a CPU's maximum may pass over NaN.
    scales = jnp.where(jnp.isfinite(x).all(axis=axes, keepdims=True), scales, jnp.nan)
    values = jnp.clip(x / scales, -largest, largest)
    return (jnp.round(values) if whole else values).astype(dtype), scales.squeeze(axes)
