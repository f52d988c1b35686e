"""Expert weights that are more than one array: block-scaled quantised ones, a layer of a stack."""

import dataclasses

import jax
import jax.numpy as jnp
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

SCALE_BLOCK = 128
QUANTISED_DTYPES = (jnp.dtype(jnp.int8), jnp.dtype(jnp.float8_e4m3fn))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class BlockScaledWeights:
    """Weights [G, K, N] stored in one byte each, with one float32 scale for every 128 x 128 block.

    Attributes:
        values: int8 or float8_e4m3fn [G, K, N].
        scales: float32 [G, ceil(K / 128), ceil(N / 128)]; a weight is its value times its block's
            scale.
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
        """Raise ValueError when dtypes or shapes do not fit together.

        Args:
            name: the argument to name in the message.
        """
        if self.values.ndim != 3:
            raise ValueError(f"{name}.values: shape {self.values.shape} must be [G, K, N]")
        if self.values.dtype not in QUANTISED_DTYPES:
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


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOfStack:
    """One layer's weights [G, K, N] where they lie in a stack of layers; forward only.

    A scan over layers slices their weights, and XLA writes the slice out before it calls a kernel:
    in decode that moves up to three times the bytes. A kernel that fetches its weights itself can
    do so from the whole stack, which is then no scanned input but the same in every step.

    Attributes:
        stack: bfloat16 or float32 [L, G, K, N].
        layer: int32 scalar, the layer.
    """

    stack: Array
    layer: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weights, [G, K, N]."""
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        """Dims of the layer's weights."""
        return self.stack.ndim - 1

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights."""
        return self.stack.dtype

    def take(self) -> Array:
        """Returns the layer's weights as an array, which is a copy of them."""
        return jax.lax.dynamic_index_in_dim(self.stack, self.layer, keepdims=False)


def dequantise(values: Array, scales: Array, dtype: DTypeLike) -> Array:
    """Multiply values by their blocks' scales.

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


def block_scaled(weights: Float[Array, "G K N"], dtype: DTypeLike) -> BlockScaledWeights:
    """Quantise weights symmetrically, each 128 x 128 block by its own largest magnitude.

    Args:
        weights: float [G, K, N].
        dtype: int8 or float8_e4m3fn.

    Returns:
        The quantised weights. A block of zeros has scale 1.

    Raises:
        ValueError: when dtype is neither int8 nor float8_e4m3fn.
    """
    dtype = jnp.dtype(dtype)
    if dtype not in QUANTISED_DTYPES:
        raise ValueError(f"dtype: {dtype} must be int8 or float8_e4m3fn")
    num_groups, num_k, num_n = weights.shape
    blocks_k, blocks_n = -(-num_k // SCALE_BLOCK), -(-num_n // SCALE_BLOCK)
    pad = (blocks_k * SCALE_BLOCK - num_k, blocks_n * SCALE_BLOCK - num_n)
    padded = jnp.pad(weights.astype(jnp.float32), ((0, 0), (0, pad[0]), (0, pad[1])))
    blocks = padded.reshape(num_groups, blocks_k, SCALE_BLOCK, blocks_n, SCALE_BLOCK)
    largest = jnp.abs(blocks).max(axis=(2, 4))
    top = 127.0 if dtype == jnp.int8 else float(jnp.finfo(dtype).max)
    scales = jnp.where(largest > 0, largest / top, 1.0)
    scaled = (blocks / scales[:, :, None, :, None]).reshape(padded.shape)[:, :num_k, :num_n]
    if dtype == jnp.int8:
        scaled = jnp.clip(jnp.round(scaled), -127, 127)
    return BlockScaledWeights(values=scaled.astype(dtype), scales=scales)
