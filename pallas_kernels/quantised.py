"""Numbers stored in a byte or half of one, with scales: weights by block, any rows by row."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.typing import DTypeLike
from jaxtyping import Float

from pallas_kernels.precision import precision_of

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


@dataclasses.dataclass(frozen=True)
class Format:
    """How matrices [N, K] are stored: N columns of a product's result, K what it contracts.

    Attributes:
        dtype: "int8", "float8_e4m3fn", "int4", or "uint4", whose blocks have a zero each. A weight
            is (number - zero) * scale. GPUs and TPUs keep two numbers of 4 bits in a byte.
        block_in: weights along K that share a scale, None for all of them. The last block may be
            shorter.
        block_out: weights along N that share a scale.
        scale_dtype: dtype of the scales.
    """

    dtype: str
    block_in: int | None = None
    block_out: int = 1
    scale_dtype: str = "bfloat16"

    @property
    def zero_points(self) -> bool:
        """Whether each block has a zero of its own."""
        return self.dtype == "uint4"

    @property
    def per_column(self) -> bool:
        """Whether a column of the product has one scale, so that it can be applied afterwards."""
        return self.block_in is None and self.block_out == 1 and not self.zero_points

    def num_blocks(self, width_in: int) -> int:
        """Scales along K."""
        return 1 if self.block_in is None else -(-width_in // self.block_in)


# Numbers of a row that Hopper's kernel for few rows takes at a time.
HOPPER_STEP = 64


def hopper_refusal(form: Format) -> str | None:
    """Says why Hopper's kernel for few rows does not read numbers stored so; None where it does.

    It scales sums of 64 or 128 numbers of a row, or of all of them.
    """
    if form.zero_points:
        return f"weights dtype {form.dtype} must have no zero points"
    block = form.block_in in (HOPPER_STEP, 2 * HOPPER_STEP) and form.block_out in (1, 128)
    if form.per_column or block:
        return None
    return f"blocks of {form.block_in} x {form.block_out} weights must be of 64 or 128 along K"


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantisedWeights:
    """Matrices [..., K, N], stored as `Format` says with K the last dim.

    So they lie in files of other software, a product with few rows reads along its sums, and a
    tensor core takes float8 in no other order.

    Attributes:
        values: stored numbers, [..., N, K].
        scales: [..., ceil(N / block_out), blocks along K].
        zeros: uint8 of the same shape, or None.
        format: how they are stored.
    """

    # Of jax or NumPy, or what a pytree has in place of arrays: dims, shapes, shardings.
    values: Any
    scales: Any
    zeros: Any
    format: Format = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the matrices as they multiply, [..., K, N]."""
        *lead, num_n, num_k = self.values.shape
        return (*lead, num_k, num_n)

    @property
    def ndim(self) -> int:
        """Dims of the matrices."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Stored dtype of the numbers."""
        return self.values.dtype

    def check(self, name: str) -> None:
        """Raises ValueError when dtypes or shapes do not fit together.

        Args:
            name: the argument to name in the message.
        """
        form = self.format
        if self.values.dtype != jnp.dtype(form.dtype):
            raise ValueError(f"{name}.values: dtype {self.values.dtype} must be {form.dtype}")
        *lead, num_n, num_k = self.values.shape
        want = (*lead, -(-num_n // form.block_out), form.num_blocks(num_k))
        for leaf, array in (("scales", self.scales), ("zeros", self.zeros)):
            if array is not None and array.shape != want:
                raise ValueError(f"{name}.{leaf}: shape {array.shape} must be {want}")
        if (self.zeros is not None) != form.zero_points:
            raise ValueError(f"{name}.zeros: must be given for zero_points, and only for them")

    def dequantised(self, dtype: DTypeLike) -> Array:
        """Returns the matrices as [..., N, K]; the product is taken in float32 and rounded once."""
        numbers = self.values.astype(jnp.float32)
        if self.zeros is not None:
            numbers -= self._spread(self.zeros.astype(jnp.float32))
        return (numbers * self._spread(self.scales.astype(jnp.float32))).astype(dtype)

    def _spread(self, blocks: Array) -> Array:
        """Repeats what each block has for each of its weights."""
        *stacked, num_n, num_k = self.values.shape
        if self.format.block_out > 1:
            blocks = _repeat(blocks, self.format.block_out, axis=-2)[..., :num_n, :]
        if self.format.block_in is None:
            return jnp.broadcast_to(blocks, (*stacked, num_n, num_k))
        return _repeat(blocks, self.format.block_in, axis=-1)[..., :num_k]


def _repeat(array: Array, count: int, axis: int) -> Array:
    """As jnp.repeat, by a broadcast, which XLA makes part of what uses it."""
    axis %= array.ndim
    shape = (*array.shape[: axis + 1], count, *array.shape[axis + 1 :])
    spread = jnp.broadcast_to(jnp.expand_dims(array, axis + 1), shape)
    return spread.reshape(*array.shape[:axis], -1, *array.shape[axis + 1 :])


def quantise(weights: Any, form: Format) -> QuantisedWeights:
    """Quantises matrices, each block by its own largest magnitude, or range with zero points.

    Args:
        weights: float [..., N, K]; NumPy gives NumPy, so that a file can be written without a
            device.
        form: how to store them.

    Returns:
        The quantised weights. A block of zeros has scale 1, one with NaN or infinity scale NaN.
    """
    xp = np if isinstance(weights, np.ndarray) else jnp
    *lead, num_n, num_k = weights.shape
    block_in, block_out = form.block_in or num_k, form.block_out
    pad = [(0, 0)] * len(lead) + [(0, -num_n % block_out), (0, -num_k % block_in)]
    padded = weights.astype(np.float32)
    if pad[-1][1] or pad[-2][1]:
        padded = xp.pad(padded, pad)
    blocks = padded.reshape(
        *lead, padded.shape[-2] // block_out, block_out, padded.shape[-1] // block_in, block_in
    )
    axes = (-3, -1)
    largest = xp.max(blocks, axis=axes, keepdims=True)
    smallest = xp.min(blocks, axis=axes, keepdims=True)
    zeros: Any = None
    if form.zero_points:
        smallest, largest = xp.minimum(smallest, 0), xp.maximum(largest, 0)
        ideal = (largest - smallest) / 15
    elif form.dtype == "int4":
        # The number of largest magnitude becomes -8, of which there is no +8: the scale has a sign.
        ideal = xp.where(largest > -smallest, largest, smallest) / -8
    else:
        most = 127 if form.dtype == "int8" else 448
        ideal = xp.maximum(largest, -smallest) / most
    # Not 0, of numbers that are next to nothing: 0 / 0 is NaN.
    ideal = xp.where(xp.abs(ideal) < jnp.finfo(jnp.float32).tiny, 1.0, ideal)
    finite = xp.isfinite(largest) & xp.isfinite(smallest)
    scales = xp.where(finite, ideal, np.nan).astype(jnp.dtype(form.scale_dtype))
    steps = xp.where(finite, scales.astype(np.float32), 1.0)
    numbers = xp.where(finite, blocks, 0) / steps
    if form.zero_points:
        zeros = xp.clip(xp.round(-smallest / steps), 0, 15)
        zeros = xp.where(finite, zeros, 0)
        numbers = xp.clip(xp.round(numbers) + zeros, 0, 15)
        zeros = zeros.squeeze(axes).astype(np.uint8)
    elif form.dtype == "int4":
        numbers = xp.clip(xp.round(numbers), -8, 7)
    elif form.dtype == "int8":
        numbers = xp.clip(xp.round(numbers), -127, 127)
    else:
        numbers = xp.clip(numbers, -448, 448)
    values = numbers.reshape(padded.shape)[..., :num_n, :num_k].astype(form.dtype)
    return QuantisedWeights(values, scales.squeeze(axes), zeros, form)


def pack_halves(values: Any) -> Any:
    """Puts two numbers of 4 bits in a byte, that of the even place in the low half: for files.

    Args:
        values: int4 or uint4 [..., K], NumPy's or jax's.

    Returns:
        uint8 [..., ceil(K / 2)].
    """
    xp = np if isinstance(values, np.ndarray) else jnp
    halves = values.astype(jnp.int8).astype(jnp.uint8) & 15
    if halves.shape[-1] % 2:
        halves = xp.pad(halves, [(0, 0)] * (halves.ndim - 1) + [(0, 1)])
    return halves[..., 0::2] | (halves[..., 1::2] << 4)


def unpack_halves(packed: np.ndarray, count: int, dtype: DTypeLike) -> np.ndarray:
    """Undoes `pack_halves`.

    Args:
        packed: uint8 [..., ceil(count / 2)].
        count: numbers in a row.
        dtype: int4 or uint4.
    """
    halves = np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)
    halves = halves[..., :count]
    if jnp.dtype(dtype) == jnp.int4:
        return ((halves ^ 8).astype(np.int8) - 8).astype(jnp.int4)
    return halves.astype(jnp.dtype(dtype))


def widened_products(lhs: Array, rhs: QuantisedWeights) -> Array:
    """Rows [..., K] times matrices that are widened within the product, in plain XLA.

    One scale a column can wait until after the product, in which numbers of 4 and 8 bits are exact.
    Scales of blocks multiply in the rows' type: so XLA's GPU compiler, told to
    (`xla_gpu_experimental_enable_subchannel_dequantisation_fusion`), reads the stored numbers in
    the product's own kernel. It would write out what zeros were taken from, so that these come
    off afterwards.

    Args:
        lhs: bfloat16 or float32 [..., K]; [G, ..., K] for several matrices.
        rhs: one matrix [K, N], or several [G, K, N].

    Returns:
        float32 [..., N].
    """
    letters = "G...K,GNK->G...N" if rhs.ndim == 3 else "...K,NK->...N"

    def product(lhs: Array, weights: Array) -> Array:
        precision = precision_of(lhs.dtype)
        return jnp.einsum(
            letters, lhs, weights, precision=precision, preferred_element_type=jnp.float32
        )

    weights = rhs.values.astype(lhs.dtype)
    if rhs.format.per_column:
        scales = rhs.scales[..., 0].astype(jnp.float32)
        if rhs.ndim == 3:
            scales = scales.reshape(scales.shape[0], *(1,) * (lhs.ndim - 2), -1)
        return product(lhs, weights) * scales
    out = product(lhs, weights * rhs._spread(rhs.scales.astype(lhs.dtype)))
    if rhs.zeros is None:
        return out
    num_k, block = lhs.shape[-1], rhs.format.block_in or lhs.shape[-1]
    padded = jnp.pad(lhs.astype(jnp.float32), [(0, 0)] * (lhs.ndim - 1) + [(0, -num_k % block)])
    sums = jnp.sum(padded.reshape(*lhs.shape[:-1], -1, block), axis=-1)
    offsets = rhs.zeros.astype(jnp.float32) * rhs.scales.astype(jnp.float32)
    return out - product(sums, offsets)
