"""A run's checkpoints: what is kept, what a damaged or foreign one says."""

import contextlib
import errno
import shutil
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

import dsjax
from dsjax import files
from dsjax.config import CheckpointConfig, TrainConfig
from dsjax.config.run_file import read_run_file, write_run_file
from dsjax.training.checkpoints import RunCheckpoints
from dsjax.training.loop import fit
from tests.dsjax.training.small_runs import MODEL, losses, small_run


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


def test_what_a_failed_save_still_writes_goes_before_the_next(tmp_path: Path):
    """Threads of a save that failed write on for a while, and put its folder there again."""
    import jax.numpy as jnp

    params = nnx.State({"weight": nnx.Param(jnp.ones(3))})
    left = tmp_path / "checkpoints" / "3.orbax-checkpoint-tmp" / "params"
    ready = threading.Event()

    def write() -> None:
        end, count = time.monotonic() + 0.4, 0
        while time.monotonic() < end:
            with contextlib.suppress(OSError):
                left.mkdir(parents=True, exist_ok=True)
                (left / str(count)).write_bytes(b"part")
            count += 1
            ready.set()

    with RunCheckpoints(tmp_path, CheckpointConfig()) as checkpoints:
        writer = threading.Thread(target=write)
        writer.start()
        ready.wait()
        checkpoints.reopen()
        checkpoints.save(3, params, {"step": jnp.int32(3)}, {})
    writer.join()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["3"]


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
    with pytest.raises(ValueError, match=r"checkpoints/6/params: parameter \S+: "):
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


def test_narrow_moments_and_what_rounding_lost_are_resumed_bit_by_bit(corpus: Path, tmp_path: Path):
    """And other types than a run's are refused, with and without the file that says them."""
    wide = small_run(tmp_path / "whole", corpus, num_steps=4)
    config = replace(
        wide,
        runtime=replace(wide.runtime, param_dtype="bfloat16"),
        optimizer=replace(wide.optimizer, moment_dtype="bfloat16", rounding="compensated"),
    )
    whole = fit(config, devices=jax.devices()[:1])
    parts = replace(config, directory=str(tmp_path / "parts"))
    for num_steps in (2, 4):
        result = fit(replace(parts, num_steps=num_steps), devices=jax.devices()[:1])
    same = zip(*(jax.tree.leaves(nnx.state(r.model)) for r in (whole, result)), strict=True)
    for a, b in same:
        np.testing.assert_array_equal(a, b)
    assert losses(tmp_path / "whole") == losses(tmp_path / "parts")

    def with_optimizer(**changes: Any) -> TrainConfig:
        return replace(parts, num_steps=6, optimizer=replace(parts.optimizer, **changes))

    others = {
        r"optimizer\.moment_dtype=float32 \(it was bfloat16\)": with_optimizer(
            moment_dtype="float32"
        ),
        r"optimizer\.rounding=nearest \(it was compensated\)": with_optimizer(rounding="nearest"),
        r"runtime\.param_dtype=float32 \(it was bfloat16\)": replace(
            with_optimizer(rounding="nearest"), runtime=wide.runtime
        ),
    }
    for message, other in others.items():
        with pytest.raises(ValueError, match=message):
            fit(other, devices=jax.devices()[:1])
    (tmp_path / "parts" / "run.json").unlink()
    stored = r"checkpoints/4/optimizer: mu\..* was stored as bfloat16, not float32"
    with pytest.raises(ValueError, match=stored):
        fit(with_optimizer(moment_dtype="float32"), devices=jax.devices()[:1])


def test_a_run_goes_on_from_a_step_that_is_named_and_later_ones_are_set_aside(copied: TrainConfig):
    run = Path(copied.directory)
    before = losses(run)
    with pytest.raises(ValueError, match=r"step=3: .* has no such step; it has 2, 4, 6"):
        fit(copied, devices=jax.devices()[:1], step=3)
    assert fit(copied, devices=jax.devices()[:1], step=2).step == 6
    assert losses(run) == before
    assert sorted(path.name for path in (run / "set_aside").iterdir()) == ["4", "6"]
    assert sorted(path.name for path in (run / "checkpoints").iterdir()) == ["2", "4", "6"]


def test_a_storage_that_fails_while_reading_damages_no_step(copied, monkeypatch, caplog):
    """What a network's file system says for a while is tried again, and never taken for damage."""
    monkeypatch.setattr(files.time, "sleep", lambda seconds: None)
    run = Path(copied.directory)
    restore, failing = RunCheckpoints._restore, [2]

    def ill(self, *args: Any) -> Any:
        if failing[0]:
            failing[0] -= 1
            raise OSError(errno.ESTALE, "Stale file handle", "params/d/x")
        return restore(self, *args)

    monkeypatch.setattr(RunCheckpoints, "_restore", ill)
    assert fit(copied, devices=jax.devices()[:1]).step == 6
    assert "checkpoints/6: [Errno 116] Stale file handle" in caplog.text
    assert "trying again in 4 s, retry 2 of 3" in caplog.text
    failing[0] = 99
    with pytest.raises(files.StorageError, match=r"checkpoints/6: the storage fails: .*Stale"):
        fit(copied, devices=jax.devices()[:1])
    assert not (run / "damaged").exists()
    assert len(list((run / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError(errno.EIO, "Input/output error"), True),
        (ValueError("UNAVAILABLE: Error reading gs://bucket/x [source locations='...']"), True),
        (FileNotFoundError(errno.ENOENT, "No such file"), False),
        (OSError(errno.ENOSPC, "No space left on device"), False),
        (ValueError("DATA_LOSS: CRC-32C mismatch"), False),
    ],
)
def test_what_passes_is_told_from_damage(error: Exception, passing: bool):
    assert files.is_passing(error) == passing
