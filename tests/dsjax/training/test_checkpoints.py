"""A run's checkpoints: what is kept, what a damaged or foreign one says."""

import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

import dsjax
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


def _lose_the_optimizer(step: Path) -> None:
    shutil.rmtree(step / "optimizer")


def _lose_the_parameters(step: Path) -> None:
    shutil.rmtree(step / "params")


def _empty_the_description(step: Path) -> None:
    (step / "_CHECKPOINT_METADATA").write_bytes(b"")


def _fill_the_description_with_nuls(step: Path) -> None:
    path = step / "params" / "_METADATA"
    path.write_bytes(bytes(path.stat().st_size))


def _lose_the_data(step: Path) -> None:
    for file in (step / "params").rglob("d/*"):
        file.unlink()


@pytest.mark.parametrize(
    "damage",
    [
        _lose_the_optimizer,
        _lose_the_parameters,
        _empty_the_description,
        _fill_the_description_with_nuls,
        _lose_the_data,
    ],
)
def test_a_damaged_newest_step_is_said_and_the_one_before_is_taken_by_all(
    copied: TrainConfig, damage, caplog
):
    run = Path(copied.directory)
    expected = jax.tree.leaves(nnx.state(dsjax.load(run, dtype=None, step=4)))
    damage(run / "checkpoints" / "6")
    loaded = jax.tree.leaves(nnx.state(dsjax.load(run, dtype=None)))
    for a, b in zip(loaded, expected, strict=True):
        np.testing.assert_array_equal(a, b)
    assert "taking step 4 instead" in caplog.text
    assert f"DAMAGED: {run}/checkpoints/6" in caplog.text
    caplog.clear()
    before = losses(run)
    result = fit(copied, devices=jax.devices()[:1])
    assert result.step == 6
    assert losses(run) == before
    assert "taking step 4 instead" in caplog.text
    assert (run / "damaged" / "6").is_dir()  # nothing is lost
    steps = sorted(path.name for path in (run / "checkpoints").iterdir())
    assert steps == ["2", "4", "6"]


def test_where_every_step_is_damaged_the_newest_is_named_and_nothing_is_moved(copied: TrainConfig):
    run = Path(copied.directory)
    for step in ("2", "4", "6"):
        _lose_the_data(run / "checkpoints" / step)
    with pytest.raises(ValueError, match="checkpoints/6: is damaged"):
        fit(copied, devices=jax.devices()[:1])
    with pytest.raises(ValueError, match="checkpoints/6"):
        dsjax.load(run)
    assert len(list((run / "checkpoints").iterdir())) == 3


def test_a_step_can_be_chosen_and_an_absent_one_names_those_there(trained_run: TrainConfig):
    with pytest.raises(ValueError, match=r"step=5: .* has no such step; it has 2, 4, 6"):
        dsjax.load(trained_run.directory, step=5)
    with pytest.raises(ValueError, match=r"step=5: .* is no training run"):
        dsjax.load(Path(trained_run.directory) / "checkpoints" / "2", step=5)


def test_damaged_small_files_stop_no_resume(copied: TrainConfig, caplog):
    run = Path(copied.directory)
    (run / "run.json").write_bytes(b"")
    with (run / "metrics.jsonl").open("ab") as file:
        file.write(bytes(80) + b"\n" + b'{"step": 6, "lo')
    assert fit(copied, devices=jax.devices()[:1]).step == 6
    assert f"{run}/run.json" in caplog.text
    assert "metrics.jsonl: 1 damaged lines were dropped" in caplog.text
    assert read_run_file(run) == copied
    assert len(losses(run)) == 6
