"""A run's checkpoints: what is kept, what a damaged or foreign one says."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

from dsjax.config import CheckpointConfig, TrainConfig
from dsjax.config.run_file import read_run_file, write_run_file
from dsjax.training.checkpoints import RunCheckpoints
from dsjax.training.loop import fit
from tests.dsjax.training.small_runs import MODEL, losses


@pytest.fixture
def copied(trained_run: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The trained run, free to be damaged."""
    shutil.copytree(trained_run.directory, tmp_path / "run")
    return replace(trained_run, directory=str(tmp_path / "run"))


@pytest.mark.core
def test_the_run_file_is_the_config(trained_run: TrainConfig, tmp_path: Path):
    assert read_run_file(Path(trained_run.directory)) == trained_run
    write_run_file(tmp_path, replace(trained_run, seed=7))
    assert read_run_file(tmp_path) == replace(trained_run, seed=7)
    assert [path.name for path in tmp_path.iterdir()] == ["run.json"]


@pytest.mark.core
def test_all_steps_are_there_and_the_newest_is_found(trained_run: TrainConfig):
    folder = Path(trained_run.directory)
    assert sorted(path.name for path in (folder / "checkpoints").iterdir()) == ["2", "4", "6"]
    with RunCheckpoints(folder, CheckpointConfig()) as checkpoints:
        assert checkpoints.latest == 6


def test_old_checkpoints_go_but_for_the_milestones(tmp_path: Path):
    import jax.numpy as jnp
    from flax import nnx

    params = nnx.State({"weight": nnx.Param(jnp.ones(3))})
    config = CheckpointConfig(keep_latest=2, keep_every=4)
    with RunCheckpoints(tmp_path, config) as checkpoints:
        for step in range(1, 8):
            optimizer = {"step": jnp.int32(step)}
            checkpoints.save(step, params, optimizer, {"shard": 0, "state": {"at": step}})
            checkpoints.save(step, params, optimizer, {})  # is there already: nothing happens
    kept = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert kept == ["4", "6", "7"]
    with RunCheckpoints(tmp_path, config) as checkpoints:
        abstract = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), params
        )
        number = jax.ShapeDtypeStruct((), jnp.int32, sharding=jnp.int32(0).sharding)
        restored, optimizer, data = checkpoints.restore(6, abstract, {"step": number})
    np.testing.assert_array_equal(restored["weight"][...], np.ones(3))
    assert int(optimizer["step"]) == 6
    assert data == [{"shard": 0, "state": {"at": 6}}]


@pytest.mark.slow
def test_a_checkpoint_of_other_shapes_without_its_run_file_is_refused(copied: TrainConfig):
    (Path(copied.directory) / "run.json").unlink()
    other = replace(copied, model=replace(MODEL, intermediate_dim=64))
    with pytest.raises(ValueError, match=r"checkpoints/6: is damaged, or of another config.model"):
        fit(other, devices=jax.devices()[:1])


@pytest.mark.slow
def test_one_that_was_saved_on_one_device_goes_on_on_four(copied: TrainConfig):
    folder = Path(copied.directory)
    before = losses(folder)
    for step in ("4", "6"):
        shutil.rmtree(folder / "checkpoints" / step)
    result = fit(copied, devices=jax.devices()[:4])
    assert result.step == 6
    after = losses(folder)
    np.testing.assert_allclose(list(after.values()), list(before.values()), rtol=1e-4)
