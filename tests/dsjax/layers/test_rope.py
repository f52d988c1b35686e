"""Rotary embedding and YaRN against the oracle and the released models' own figures."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dsjax.config import AttentionConfig, YarnConfig
from dsjax.configs.models import deepseek_v2, deepseek_v2_5
from dsjax.layers.rope import apply_rope, inverse_frequencies, rope_angles, softmax_scale
from tests import oracle

PLAIN = AttentionConfig(num_heads=1)
VARIANTS = {
    "v2": deepseek_v2.config.attention,
    "v2_5": deepseek_v2_5.config.attention,
    "plain": PLAIN,
    "two_mscales": replace(PLAIN, yarn=YarnConfig(mscale=1.0, mscale_all_dim=0.707)),
    "no_mscale": replace(PLAIN, yarn=YarnConfig(mscale_all_dim=0.0)),
    "short": AttentionConfig(
        num_heads=1, qk_rope_head_dim=16, yarn=YarnConfig(factor=4, original_length=256)
    ),
    "other_betas": replace(PLAIN, rope_theta=500.0, yarn=YarnConfig(beta_fast=16, beta_slow=2)),
}


@pytest.mark.core
@pytest.mark.parametrize("name", VARIANTS)
def test_frequencies_and_scale_are_the_oracles(name):
    attention = VARIANTS[name]
    np.testing.assert_allclose(
        inverse_frequencies(attention), oracle.frequencies(attention), rtol=5e-7
    )
    np.testing.assert_allclose(
        softmax_scale(attention), oracle.softmax_scale(attention), rtol=1e-12
    )


@pytest.mark.core
def test_released_models_have_their_known_scales():
    # Trap: the square of mscale_all_dim's correction missing from the softmax scale.
    assert softmax_scale(VARIANTS["v2"]) == pytest.approx(0.114721, abs=5e-7)
    assert softmax_scale(VARIANTS["v2_5"]) == pytest.approx(0.135234, abs=5e-7)
    assert softmax_scale(PLAIN) == pytest.approx(192**-0.5, rel=1e-12)


def test_released_models_blend_pairs_10_to_23():
    frequencies = inverse_frequencies(VARIANTS["v2"])
    plain = inverse_frequencies(PLAIN)
    ratio = plain / frequencies
    np.testing.assert_allclose(ratio[:11], 1, rtol=1e-6)
    np.testing.assert_allclose(ratio[23:], 40, rtol=1e-6)
    assert np.all(np.diff(ratio[10:24]) > 0)


@pytest.mark.core
@pytest.mark.parametrize("name", VARIANTS)
def test_products_of_rotated_queries_and_keys_are_the_oracles(name, rng):
    attention = VARIANTS[name]
    length, heads, dim = 7, 3, attention.qk_rope_head_dim
    positions = np.array([[0, 1, 5, 255, 256, 700, 4000]])
    queries = rng.standard_normal((1, length, heads, dim))
    keys = rng.standard_normal((1, length, dim))

    @jax.jit
    def products(queries, keys, positions):
        angles = rope_angles(positions, attention)
        q = apply_rope(queries, *angles)
        k = apply_rope(keys, *angles)
        return jnp.einsum("bthr,bsr->bhts", q, k)

    got = products(queries.astype(np.float32), keys.astype(np.float32), jnp.asarray(positions))
    q = np.stack([oracle.rotate(queries[0, t], positions[0, t], attention) for t in range(length)])
    k = np.stack([oracle.rotate(keys[0, t], positions[0, t], attention) for t in range(length)])
    # float32 angles of a few thousand radians are good to about 1e-4.
    np.testing.assert_allclose(got[0], np.einsum("thr,sr->hts", q, k), atol=5e-3)
    near = positions[0] < 10
    np.testing.assert_allclose(
        got[0][:, near][..., near], np.einsum("thr,sr->hts", q[near], k[near]), atol=1e-5
    )


def test_rotation_depends_on_distance_alone(rng):
    attention = VARIANTS["short"]
    q, k = rng.standard_normal((2, 1, 2, 16)).astype(np.float32)

    @jax.jit
    def product(offset):
        angles = rope_angles(jnp.array([[3, 9]]) + offset, attention)
        return jnp.einsum("btr,bsr->ts", apply_rope(q, *angles), apply_rope(k, *angles))

    np.testing.assert_allclose(product(0), product(200), atol=2e-4)


def test_dtype_is_kept(rng):
    x = jnp.asarray(rng.standard_normal((1, 2, 16)), jnp.bfloat16)
    angles = rope_angles(jnp.array([[0, 1]]), VARIANTS["short"])
    assert angles[0].dtype == jnp.float32
    assert apply_rope(x, *angles).dtype == jnp.bfloat16
