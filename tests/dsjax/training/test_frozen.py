"""Parameters that are not trained: nothing is kept or computed for them."""

from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from dsjax.config import CheckpointConfig, GuardConfig, MeshConfig, OptimizerConfig, TrainConfig
from dsjax.configs.models import deepseek_v2_lite
from dsjax.counts import train_flops_per_token
from dsjax.mesh import make_mesh, train_rules
from dsjax.model import abstract_model, create_model
from dsjax.training.loop import fit
from dsjax.training.optimizer import divide, init_moments
from dsjax.training.step import abstract_train_state, init_train_state, jitted_train_step
from tests.dsjax.training.small_runs import LENGTH, MODEL, losses, small_run
from tests.dsjax.training.test_step import batches  # noqa: F401
from tests.small_models import LOSS, RUNTIME

EXPERTS = "moe_layers.feed_forward.w_*"
# The norm of fewer gradients is smaller: nothing is clipped here.
PLAIN = OptimizerConfig(clip_norm=1e9)
FROZEN = replace(PLAIN, frozen=(EXPERTS, "embed.*"))


def flat(tree) -> dict[str, np.ndarray]:
    return {
        ".".join(map(str, path)): np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(tree)
    }


def names(tree) -> set[str]:
    return {".".join(map(str, path)) for path, _ in nnx.to_flat_state(tree)}


@pytest.mark.core
def test_what_is_frozen_stays_and_the_rest_is_trained_as_without(batches):  # noqa: F811
    take_step = jitted_train_step(jax.devices()[0].platform)
    before = flat(nnx.state(create_model(MODEL, 0, RUNTIME)))
    after, flops = {}, {}
    for name, optimizer in (("all", PLAIN), ("rest", FROZEN)):
        graphdef, params = nnx.split(create_model(MODEL, 0, RUNTIME))
        state = init_train_state(optimizer, params)
        given = (graphdef, optimizer, LOSS, GuardConfig(), state, batches[0], jnp.float32(1e-2))
        flops[name] = take_step.lower(*given).compile().cost_analysis()["flops"]
        after[name], _ = take_step(*given)
    whole, rest = flat(after["all"].params), flat(after["rest"].params)
    gradients, some = (flat(after[name].moments.mu) for name in ("all", "rest"))
    assert rest.keys() == whole.keys() == before.keys()
    frozen = {name for name in whole if name.startswith(("moe_layers.feed_forward.w_", "embed"))}
    assert len(frozen) == 4
    for name, values in rest.items():
        if name in frozen:
            np.testing.assert_array_equal(values, before[name], name)
        else:
            largest = np.abs(gradients[name]).max()
            np.testing.assert_allclose(some[name], gradients[name], rtol=1e-4, atol=1e-5 * largest)
            assert np.any(values != before[name]), name
        assert np.any(whole[name] != before[name]), name
    assert some.keys() == names(after["rest"].moments.nu) == whole.keys() - frozen
    # A third of an expert's products are of its gradient: two FLOPs a weight and token.
    moe = MODEL.moe
    assert moe is not None
    one = 2 * 3 * MODEL.hidden_dim * moe.intermediate_dim * 8 * LENGTH * moe.top_k
    assert flops["all"] - flops["rest"] > 0.9 * one


def test_they_lie_where_they_did_and_the_moments_beside_the_others():
    rules = train_rules(make_mesh(MeshConfig(fsdp=2, expert=4), jax.devices()[:8]))
    _, params = abstract_model(MODEL, RUNTIME, rules)
    both = [
        abstract_train_state(config, params, rules, jax.devices()[0]) for config in (PLAIN, FROZEN)
    ]
    whole, rest = (state.params for state in both)
    assert jax.tree.leaves(whole) == jax.tree.leaves(rest)
    trained, _ = divide(whole, both[1].moments)
    for mean, param in zip(
        jax.tree.leaves(both[1].moments.mu), jax.tree.leaves(trained), strict=True
    ):
        assert (mean.shape, mean.sharding) == (param.shape, param.sharding)


def test_a_run_is_resumed_bit_by_bit_and_not_with_others_frozen(corpus: Path, tmp_path: Path):
    def run(name: str, **changes) -> TrainConfig:
        config = small_run(tmp_path / name, corpus, num_steps=4)
        config = replace(config, checkpoint=CheckpointConfig(every=2, keep_latest=9))
        optimizer = replace(config.optimizer, frozen=(EXPERTS,), decay_at=())
        data = replace(config.data, eval_sources=())
        return replace(replace(config, optimizer=optimizer, data=data), **changes)

    whole = fit(run("whole"), devices=jax.devices()[:1])
    fit(run("parts", num_steps=2), devices=jax.devices()[:1])
    parts = fit(run("parts"), devices=jax.devices()[:1])
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    one, other = (flat(nnx.state(result.model)) for result in (whole, parts))
    for name, values in one.items():
        np.testing.assert_array_equal(values, other[name], name)
    config = run("parts")
    others = replace(config, optimizer=replace(config.optimizer, frozen=()), num_steps=6)
    with pytest.raises(ValueError, match=r"optimizer\.frozen=\(\) \(it was \('moe_layers"):
        fit(others, devices=jax.devices()[:1])


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (("moe_layers.experts.*",), r"optimizer\.frozen='moe_layers\.experts\.\*': names no"),
        (("embed.*", "*"), r"optimizer\.frozen=\('embed\.\*', '\*'\): leaves no parameter"),
    ],
)
def test_patterns_of_none_or_all_are_refused(patterns: tuple[str, ...], message: str):
    _, params = abstract_model(MODEL, RUNTIME)
    with pytest.raises(ValueError, match=message):
        init_moments(OptimizerConfig(frozen=patterns), params)


def test_an_average_is_of_all_parameters():
    with pytest.raises(ValueError, match=r"optimizer\.ema_decay=0\.9: must be none with"):
        OptimizerConfig(frozen=("embed.*",), ema_decay=0.9)


def test_weights_that_are_not_trained_have_no_gradients_flops():
    config = deepseek_v2_lite.config
    whole, without = (train_flops_per_token(config, 4096, frozen) for frozen in ((), FROZEN.frozen))
    assert (
        whole - without == 2 * 26 * 6 * 3 * 2048 * 1408
    )  # six experts a token; a look-up has none
