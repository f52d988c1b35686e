"""AdamW in one pass: optax's arithmetic, what is stored in bfloat16, and what a skip leaves."""

import re
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from dsjax.config import OptimizerConfig, RuntimeConfig
from dsjax.config.optimizer import ROUNDINGS, Rounding
from dsjax.training.optimizer import (
    apply_adamw,
    global_norm,
    init_moments,
    random_bits,
    round_stochastically,
)

CONFIG = OptimizerConfig(clip_norm=0.5)
NARROW = replace(CONFIG, moment_dtype="bfloat16")


def tree(seed: int, dtype: str = "float32", scale: float = 1.0) -> nnx.State:
    rng = np.random.default_rng(seed)
    shapes = {"matrix": ((33, 65), ("param_embed", "mlp")), "gain": ((65,), ("norm",))}
    return nnx.State(
        {
            name: nnx.Param(jnp.asarray(scale * rng.standard_normal(shape), dtype), dims=dims)
            for name, (shape, dims) in shapes.items()
        }
    )


def update(config, params, moments, gradients, rate=1e-2, applied=True, step=0):
    scalars = global_norm(gradients), jnp.float32(rate), jnp.bool(applied), jnp.int32(step)
    return jax.jit(apply_adamw, static_argnums=0)(config, params, moments, gradients, *scalars)


def arrays(tree) -> list[np.ndarray]:
    return [np.asarray(leaf) for leaf in jax.tree.leaves(tree)]


@pytest.mark.core
def test_it_is_optax_with_decay_on_all_but_the_norms():
    params = tree(0)
    chain = optax.chain(
        optax.clip_by_global_norm(0.5),
        optax.scale_by_adam(CONFIG.beta1, CONFIG.beta2, CONFIG.epsilon),
        optax.add_decayed_weights(0.1, mask=nnx.State({"matrix": True, "gain": False})),
    )
    expected, remembered = params, chain.init(params)
    moments = init_moments(CONFIG, params)
    for step, scale in enumerate((1.0, 1e-3, 3.0)):  # the second is not clipped
        gradients = tree(step + 1, scale=scale)
        updates, remembered = chain.update(gradients, remembered, expected)
        expected = jax.tree.map(lambda p, u: p - 1e-2 * u, expected, updates)
        params, moments = update(CONFIG, params, moments, gradients, step=step)
        for a, b in zip(arrays(params), arrays(expected), strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-7)
    assert int(moments.count) == 3


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_a_skipped_step_leaves_every_bit(rounding: Rounding):
    config = replace(NARROW, rounding=rounding)
    params = tree(0, "bfloat16")
    old = update(config, params, init_moments(config, params), tree(1, "bfloat16"))
    poison = jax.tree.map(lambda g: g * jnp.nan, tree(2, "bfloat16"))
    after = update(config, old[0], old[1], poison, applied=False, step=1)
    for a, b in zip(arrays(after), arrays(old), strict=True):
        np.testing.assert_array_equal(a, b)
    assert {leaf.dtype.name for leaf in arrays(old[1].mu) + arrays(old[1].nu)} == {"bfloat16"}
    applied = update(config, old[0], old[1], tree(2, "bfloat16"), step=1)
    assert all(np.any(a != b) for a, b in zip(arrays(applied), arrays(old), strict=True))


def test_what_rounding_to_nearest_loses_the_others_keep():
    """A thousand updates of a tenth of a last place each, beside float32."""
    found = {}
    cases: list[tuple[str, str, Rounding]] = [
        ("float32", "float32", "nearest"),
        ("nearest", "bfloat16", "nearest"),
        ("stochastic", "bfloat16", "stochastic"),
        ("compensated", "bfloat16", "compensated"),
    ]
    for name, dtype, rounding in cases:
        config = replace(CONFIG, weight_decay=0.0, rounding=rounding)
        params = jax.tree.map(lambda p, d=dtype: jnp.ones(p.shape, d), tree(0))
        gradients = jax.tree.map(jnp.ones_like, params)

        def body(i, carry, config=config, gradients=gradients):
            norm, rate = global_norm(gradients), jnp.float32(4e-4)
            return apply_adamw(config, carry[0], carry[1], gradients, norm, rate, jnp.bool(True), i)

        carry = (params, init_moments(config, params))
        params, moments = jax.jit(lambda c, body=body: jax.lax.fori_loop(0, 1000, body, c))(carry)
        found[name] = np.asarray(params["matrix"][...], np.float64)
        if moments.lost is not None:
            found[name] += np.asarray(moments.lost["matrix"][...], np.float64)
    assert found["float32"].mean() == pytest.approx(0.6, abs=1e-3)
    assert np.all(found["nearest"] == 1.0)
    assert found["stochastic"].mean() == pytest.approx(0.6, abs=2e-3)
    np.testing.assert_allclose(found["compensated"], found["float32"], atol=2e-3)


def test_stochastic_rounding_is_right_in_the_mean_and_leaves_what_needs_none():
    x = jnp.full((1 << 16,), 1 + 2.0**-7 * 0.3, jnp.float32)
    rounded = round_stochastically(x, random_bits(jnp.uint32(5), x.shape), jnp.bfloat16)
    assert set(np.unique(np.asarray(rounded, np.float32))) == {1.0, 1 + 2.0**-7}
    assert np.asarray(rounded, np.float64).mean() == pytest.approx(float(x[0]), abs=3e-5)
    special = jnp.array([0.0, -0.0, 1.5, -2.0, np.inf, -np.inf, np.nan], jnp.float32)
    kept = round_stochastically(special, jnp.full((7,), 0xFFFF, jnp.uint32), jnp.bfloat16)
    np.testing.assert_array_equal(np.asarray(kept, np.float32), special)


def test_bits_are_of_a_place_and_a_seed():
    bits = np.asarray(random_bits(jnp.uint32(1), (64, 128)))
    assert len(np.unique(bits)) == bits.size
    np.testing.assert_array_equal(bits.reshape(-1), random_bits(jnp.uint32(1), (64 * 128,)))
    other = np.asarray(random_bits(jnp.uint32(2), (64, 128)))
    for shift in range(32):  # no bit leans to one side, nor goes with the same bit of another seed
        assert abs(np.mean(bits >> shift & 1) - 0.5) < 0.03
        assert abs(np.mean((bits ^ other) >> shift & 1) - 0.5) < 0.03


def test_an_update_is_elementwise_so_that_it_compiles_to_one_loop_a_parameter():
    """What is stored is read once and written once, whatever the rounding and the skip."""
    others = re.compile(r"stablehlo\.(reduce\b|dot|gather|scatter|while|case|if|sort|dynamic\w+)")
    for rounding in ROUNDINGS:
        config = replace(NARROW, rounding=rounding)
        params = tree(0, "bfloat16")
        scalars = jnp.float32(1), jnp.float32(1e-2), jnp.bool(True), jnp.int32(0)
        lowered = jax.jit(apply_adamw, static_argnums=0).lower(
            config, params, init_moments(config, params), params, *scalars
        )
        assert not others.findall(lowered.as_text())
    assert others.findall(jax.jit(global_norm).lower(params).as_text())  # it finds what there is


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"moment_dtype": "float16"}, r"optimizer\.moment_dtype='float16': must be one of"),
        ({"rounding": "up"}, r"optimizer\.rounding='up': must be one of"),
        (
            {"moment_dtype": "bfloat16", "beta2": 0.999},
            r"optimizer\.beta2=0\.999: must be at most 0\.99609375, .* take rounding=stochastic",
        ),
    ],
)
def test_what_cannot_be_stored_is_one_line(changes: dict, message: str):
    with pytest.raises(ValueError, match=message):
        OptimizerConfig(**changes)
    OptimizerConfig(moment_dtype="bfloat16", beta2=0.999, rounding="stochastic")


def test_rounding_is_of_bfloat16(tmp_path):
    from tests.dsjax.training.small_runs import small_run

    config = small_run(tmp_path, tmp_path)
    with pytest.raises(ValueError, match=r"optimizer\.rounding='compensated': is of bfloat16"):
        replace(config, optimizer=replace(config.optimizer, rounding="compensated"))
    narrow = RuntimeConfig(dtype="float32", param_dtype="bfloat16")
    replace(config, runtime=narrow, optimizer=replace(config.optimizer, rounding="compensated"))
    stochastic = replace(config.optimizer, rounding="stochastic", moment_dtype="bfloat16")
    replace(config, optimizer=stochastic)
