"""Numbers stored in one byte each: what is lost, and what must not be."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.quantised import block_scaled, row_scaled


@pytest.mark.parametrize("bits", ["int8", "float8_e4m3fn"])
def test_row_scaled(bits):
    latent = np.random.default_rng(7).normal(size=(3, 5, 64)).astype(np.float32)
    latent[1, 2] = 0
    values, scale = row_scaled(jnp.asarray(latent), bits)
    assert values.dtype == jnp.dtype(bits)
    assert scale.shape == (3, 5)
    assert scale[1, 2] == 1
    back = np.asarray(values).astype(np.float64) * np.asarray(scale)[..., None]
    amax = np.abs(latent).max(axis=-1, keepdims=True)
    # Half a step: 1/254 of the largest for int8, 2^-4 of each number (3 mantissa bits) for float8.
    allowed = amax / 254 if bits == "int8" else np.abs(latent) / 16 + amax * 2**-17
    assert (np.abs(back - latent) <= allowed * 1.001).all()
    np.testing.assert_allclose(np.abs(back).max(axis=-1), amax[..., 0], rtol=1e-6)


@pytest.mark.parametrize("bits", ["int8", "float8_e4m3fn"])
def test_extremes(bits):
    """What is no number is none afterwards; zeros beside next to nothing are zeros."""
    rows = np.ones((4, 64), np.float32)
    rows[0, 3], rows[1, 3], rows[2], rows[3] = np.nan, np.inf, 0, 1e38
    rows[2, 5] = 1e-39
    values, scale = row_scaled(jnp.asarray(rows), bits)
    assert not np.isfinite(scale[:2]).any()
    back = np.asarray(values[2:]).astype(np.float64) * np.asarray(scale[2:])[:, None]
    np.testing.assert_allclose(back, rows[2:], rtol=1e-2, atol=1e-38)
    blocks = block_scaled(jnp.asarray(rows)[:, None], bits)
    np.testing.assert_array_equal(blocks.values[2:, 0], values[2:])
    np.testing.assert_array_equal(blocks.scales[:, 0, 0], scale)
