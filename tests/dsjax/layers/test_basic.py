"""RMSNorm, the dense MLP and how parameters are made."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.kernels import Kernels
from dsjax.layers.mlp import MLP
from dsjax.layers.norm import RMSNorm
from dsjax.layers.options import LayerOptions
from dsjax.mesh import ShardingRules
from tests import oracle
from tests.small_models import RUNTIME, SMALL

OPTIONS = LayerOptions.of(SMALL, RUNTIME, ShardingRules(), Kernels())
apply_norm = jax.jit(lambda norm, x: norm(x))


@pytest.mark.core
@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
@pytest.mark.parametrize("eps", [None, 1e-2])
def test_rms_norm(scale, eps, rng):
    x, weight = scale * rng.standard_normal((2, 3, 32)), rng.uniform(0.5, 1.5, 32)
    norm = RMSNorm(32, OPTIONS, eps)
    norm.weight[...] = jnp.asarray(weight, jnp.float32)
    want = oracle.rms_norm(x, weight, SMALL.norm_eps if eps is None else eps)
    np.testing.assert_allclose(apply_norm(norm, jnp.asarray(x, jnp.float32)), want, rtol=2e-6)


def test_rms_norm_of_bfloat16_is_computed_in_float32(rng):
    x = jnp.asarray(1 + 1e-2 * rng.standard_normal((1, 1, 4096)), jnp.bfloat16)
    norm = RMSNorm(4096, replace(OPTIONS, runtime=replace(RUNTIME, dtype="bfloat16")))
    got = apply_norm(norm, x)
    want = oracle.rms_norm(np.asarray(x, np.float64), 1.0, SMALL.norm_eps)
    assert got.dtype == jnp.bfloat16
    # One rounding to bfloat16 at the end; a sum of 4096 squares in bfloat16 would be far off.
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=2**-8)


@pytest.mark.core
def test_mlp_is_swiglu(rng):
    mlp = MLP(32, 24, OPTIONS, nnx.Rngs(0))
    x = rng.standard_normal((2, 3, 32))
    for name in ("w_gate", "w_up", "w_down"):
        param = getattr(mlp, name).weight
        param[...] = jnp.asarray(rng.standard_normal(param.shape) / 5, jnp.float32)
    weights = [np.asarray(w.stored(), np.float64) for w in (mlp.w_gate, mlp.w_up, mlp.w_down)]
    got = jax.jit(lambda mlp, x: mlp(x))(mlp, jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(got, oracle.swiglu(x, *weights), rtol=1e-4, atol=1e-5)


def test_bfloat16_parameters_start_where_float32_ones_do():
    exact = OPTIONS.new_weight(nnx.Rngs(3), (64, 64), ("param_embed", "mlp"))
    options = replace(OPTIONS, runtime=replace(RUNTIME, param_dtype="bfloat16"))
    rounded = options.new_weight(nnx.Rngs(3), (64, 64), ("param_embed", "mlp"))
    assert rounded.dtype == jnp.bfloat16
    np.testing.assert_array_equal(exact[...].astype(jnp.bfloat16), rounded[...])
    assert float(jnp.std(exact[...])) == pytest.approx(SMALL.init_std, rel=0.05)


def test_options_are_part_of_a_jit_key():
    assert hash(OPTIONS) == hash(LayerOptions.of(SMALL, RUNTIME, ShardingRules(), Kernels()))
    assert LayerOptions.of(SMALL, RUNTIME, ShardingRules(), Kernels("reference")) != OPTIONS
    assert jax.tree.leaves(nnx.split(RMSNorm(4, OPTIONS))[0]) == []
