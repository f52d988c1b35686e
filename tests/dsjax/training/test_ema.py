"""The moving average of a run's parameters: what it is, where it lies, how it is read."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import dsjax
from dsjax.config import CheckpointConfig, MeshConfig, OptimizerConfig, TrainConfig
from dsjax.mesh import make_mesh, train_rules
from dsjax.model import abstract_model
from dsjax.training.loop import fit
from dsjax.training.optimizer import apply_adamw, global_norm, init_moments
from dsjax.training.step import abstract_train_state, state_shardings
from dsjax.weights.convert import convert
from tests.dsjax.training.small_runs import MODEL, losses, read_metrics, small_run
from tests.dsjax.training.test_optimizer import arrays, tree
from tests.small_models import RUNTIME

DECAY = 0.9


@pytest.fixture(scope="module")
def averaged(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """The trained run again with a moving average, and a checkpoint of each step."""
    config = small_run(tmp_path_factory.mktemp("ema") / "run", corpus)
    config = replace(
        config,
        optimizer=replace(config.optimizer, ema_decay=DECAY),
        checkpoint=CheckpointConfig(every=1, keep_latest=9),
    )
    assert fit(config, devices=jax.devices()[:1]).finished
    return config


def params_of(run: str | Path, **options) -> list[np.ndarray]:
    return arrays(nnx.state(dsjax.load(run, dtype=None, **options)))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_it_is_the_mean_of_what_the_parameters_were_and_a_skip_leaves_it(dtype: str):
    config = OptimizerConfig(ema_decay=0.3)
    params = tree(0, dtype)
    moments = init_moments(config, params)
    expected = [array.astype(np.float64) for array in arrays(params)]
    for count in range(1, 6):
        given = tree(count), jnp.float32(1e-1), jnp.bool(count != 3), jnp.int32(count)
        gradients, *scalars = given
        params, moments = jax.jit(apply_adamw, static_argnums=0)(
            config, params, moments, gradients, global_norm(gradients), *scalars
        )
        if count != 3:
            updates = count - (count > 3)
            decay = min(0.3, (1 + updates) / (10 + updates))
            expected = [
                decay * mean + (1 - decay) * array.astype(np.float64)
                for mean, array in zip(expected, arrays(params), strict=True)
            ]
        for mean, value in zip(arrays(moments.ema), expected, strict=True):
            assert mean.dtype == np.float32
            np.testing.assert_allclose(mean, value, rtol=1e-5, atol=1e-7)
    assert decay == 0.3  # the rule was on both sides of its bend


def test_without_it_nothing_is_kept_and_with_it_the_run_is_the_same(
    averaged: TrainConfig, trained_run: TrainConfig, tmp_path: Path
):
    assert init_moments(OptimizerConfig(), tree(0)).ema is None
    plain = Path(trained_run.directory)
    # To rounding: they are two programs, which a CPU's compiler may fuse in two ways.
    assert losses(plain) == pytest.approx(losses(Path(averaged.directory)), rel=1e-6)
    with pytest.raises(ValueError, match=r"checkpoints/6/optimizer: holds no ema: this run"):
        dsjax.load(plain, ema=True)
    other = replace(averaged, directory=str(plain), num_steps=8)
    with pytest.raises(ValueError, match=r"optimizer\.ema_decay=0\.9 \(it was none\)"):
        fit(other, devices=jax.devices()[:1])


def test_it_is_resumed_bit_by_bit(averaged: TrainConfig, tmp_path: Path):
    run = tmp_path / "again"
    shutil.copytree(averaged.directory, run)
    fit(replace(averaged, directory=str(run)), devices=jax.devices()[:1], step=3)
    for a, b in zip(params_of(run, ema=True), params_of(averaged.directory, ema=True), strict=True):
        np.testing.assert_array_equal(a, b)
    assert (run / "set_aside" / "6").is_dir()  # so it was made anew


def test_load_and_convert_read_it(averaged: TrainConfig, tmp_path: Path):
    run = Path(averaged.directory)
    steps = [params_of(run, step=step) for step in (2, 3)]
    means = [params_of(run, step=step, ema=True) for step in (2, 3)]
    decay = min(DECAY, 4 / 13)
    for before, params, mean in zip(means[0], steps[1], means[1], strict=True):
        np.testing.assert_allclose(mean, decay * before + (1 - decay) * params, atol=1e-6)
        assert np.any(mean != params)
    convert(run, tmp_path / "hf", step=3, ema=True, progress=False)
    for a, b in zip(params_of(tmp_path / "hf"), means[1], strict=True):
        np.testing.assert_array_equal(a, b)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["torch_dtype"] == "float32"
    with pytest.raises(ValueError, match=r"ema: .*/hf is no training run"):
        dsjax.load(tmp_path / "hf", ema=True)


def test_an_evaluation_is_of_both_unless_it_is_to_be_of_the_parameters_alone(
    averaged: TrainConfig, tmp_path: Path
):
    """The average's figure is what evaluating it as a model of its own gives."""
    evaluated: dict[str, float] = {}
    for line in read_metrics(Path(averaged.directory)):
        evaluated |= {name: value for name, value in line.items() if name.startswith("eval_")}
    assert evaluated["eval_ema_bits_per_byte"] != evaluated["eval_bits_per_byte"]
    convert(averaged.directory, tmp_path / "hf", ema=True, progress=False)
    quiet = replace(averaged.log, eval_ema=False)
    config = replace(averaged, directory=str(tmp_path / "run"), init_from=str(tmp_path / "hf"))
    # One step of no size: what was given is what is evaluated.
    config = replace(config, num_steps=1, optimizer=replace(config.optimizer, warmup_steps=10**6))
    result = fit(replace(config, log=quiet), devices=jax.devices()[:1])
    expected = evaluated["eval_ema_bits_per_byte"]
    assert result.bits_per_byte == pytest.approx(expected, rel=1e-5)
    names = {name for line in read_metrics(tmp_path / "run") for name in line}
    assert "eval_bits_per_byte" in names
    assert "eval_ema_bits_per_byte" not in names


def test_it_lies_where_the_parameters_do():
    rules = train_rules(make_mesh(MeshConfig(fsdp=2, expert=4), jax.devices()[:8]))
    _, params = abstract_model(MODEL, RUNTIME, rules)
    optimizer = OptimizerConfig(ema_decay=0.999)
    state = abstract_train_state(optimizer, params, rules, jax.devices()[0])
    shardings = state_shardings(state, rules)
    assert jax.tree.leaves(shardings.moments.ema) == jax.tree.leaves(shardings.params)
    for mean, param in zip(
        jax.tree.leaves(state.moments.ema), jax.tree.leaves(state.params), strict=True
    ):
        assert mean.sharding == param.sharding
        assert (mean.shape, mean.dtype) == (param.shape, jnp.float32)


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.5, float("nan")])
def test_a_decay_outside_its_range_is_refused(decay: float):
    with pytest.raises(ValueError, match=r"optimizer\.ema_decay=\S+: must be between 0 and 1"):
        OptimizerConfig(ema_decay=decay)
