"""Rotary position embedding with YaRN (§2.1.3, §3.1.4), on interleaved pairs."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.config import AttentionConfig


def length_correction(factor: float, mscale: float) -> float:
    """Returns YaRN's attention correction for a context `factor` times longer."""
    return 1.0 if factor <= 1 else 0.1 * mscale * math.log(factor) + 1.0


def softmax_scale(config: AttentionConfig) -> float:
    """Returns the factor on the scores before the softmax (eq. 18, with YaRN's correction)."""
    scale = (config.qk_nope_head_dim + config.qk_rope_head_dim) ** -0.5
    if config.yarn is not None:
        scale *= length_correction(config.yarn.factor, config.yarn.mscale_all_dim) ** 2
    return scale


def inverse_frequencies(config: AttentionConfig) -> np.ndarray:
    """Returns the radians per position of each rotary pair, float32 [R / 2].

    With YaRN, pairs that turn often within the original length keep their frequency, those that
    turn less than once are slowed by the factor, and the ones between are blended linearly. It is
    on at every length, as in the released checkpoints' own code.
    """
    dim, theta, yarn = config.qk_rope_head_dim, config.rope_theta, config.yarn
    # Rounded to float32 where the released code rounds: thousands of positions later, one unit in
    # the last place of a frequency shows in the logits.
    exponents = np.arange(0, dim, 2, dtype=np.float32) / np.float32(dim)
    wavelengths = (theta ** exponents.astype(np.float64)).astype(np.float32)
    frequencies = 1 / wavelengths
    if yarn is None:
        return frequencies

    def find_dim(rotations: float) -> float:
        turns = yarn.original_length / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(find_dim(yarn.beta_fast)), 0)
    high = min(math.ceil(find_dim(yarn.beta_slow)), dim - 1)
    width = np.float32(max(high - low, 0.001))
    kept = 1 - np.clip((np.arange(dim // 2, dtype=np.float32) - low) / width, 0, 1)
    return 1 / (np.float32(yarn.factor) * wavelengths) * (1 - kept) + frequencies * kept


def rope_angles(positions_BT: jax.Array, config: AttentionConfig) -> tuple[jax.Array, jax.Array]:
    """Computes the cosine and sine of each position's rotation.

    Args:
        positions_BT: int32, counted from the start of each document.
        config: gives the frequencies.

    Returns:
        cos_BTR, sin_BTR: float32 [B, T, R / 2].
    """
    angles_BTR = positions_BT[..., None].astype(jnp.float32) * inverse_frequencies(config)
    scale = 1.0
    if config.yarn is not None:
        yarn = config.yarn
        scale = length_correction(yarn.factor, yarn.mscale)
        scale /= length_correction(yarn.factor, yarn.mscale_all_dim)
    return jnp.cos(angles_BTR) * scale, jnp.sin(angles_BTR) * scale


def apply_rope(x: jax.Array, cos_BTR: jax.Array, sin_BTR: jax.Array) -> jax.Array:
    """Rotates the pairs (2i, 2i + 1) of the last dim (eq. 14 and 15).

    Args:
        x: [B, T, R] or [B, T, H, R], any float dtype.
        cos_BTR: float32 [B, T, R / 2].
        sin_BTR: float32 [B, T, R / 2].

    Returns:
        The rotated array in x's shape and dtype, with the first members of all pairs ahead of
        the second members: queries and keys are permuted alike, so their products are unchanged,
        and no lane has to move back.
    """
    if x.ndim == 4:
        cos_BTR, sin_BTR = cos_BTR[:, :, None], sin_BTR[:, :, None]
    even, odd = x[..., 0::2].astype(jnp.float32), x[..., 1::2].astype(jnp.float32)
    rotated = (even * cos_BTR - odd * sin_BTR, odd * cos_BTR + even * sin_BTR)
    return jnp.concatenate(rotated, axis=-1).astype(x.dtype)
