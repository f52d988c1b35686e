"""A run's step with one file damaged: one line names it, and the step before is taken by all."""

import gc
import logging
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dsjax.config import LogConfig, TrainConfig
from dsjax.model import abstract_model
from dsjax.training.checkpoints import RunCheckpoints, optimizer_to_dict
from dsjax.training.metrics import MetricsWriter
from dsjax.training.start import lay_out, stored_config
from dsjax.training.step import abstract_train_state
from dsjax.weights.check import faults_of
from dsjax.weights.sources import describe, open_source

DESCRIPTION = "_CHECKPOINT_METADATA"


@pytest.fixture
def copied(trained_run: TrainConfig, tmp_path: Path) -> TrainConfig:
    """The trained run, free to be damaged."""
    shutil.copytree(trained_run.directory, tmp_path / "run")
    return replace(trained_run, directory=str(tmp_path / "run"))


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size // 2)


def fill_with_nuls(file: Path) -> None:
    file.write_bytes(bytes(file.stat().st_size))


def lose(file: Path) -> None:
    file.unlink()


def put_a_folder(file: Path) -> None:
    file.unlink()
    file.mkdir()


def make_unreadable(file: Path) -> None:
    """As without permission, which is no hindrance to a superuser: the system refuses to open."""
    file.unlink()
    file.symlink_to(file.name)


def swap(file: Path) -> None:
    """Puts what step 2 has in its place."""
    other = Path(str(file).replace("/checkpoints/6/", "/checkpoints/2/"))
    if not other.exists():  # the names of data are drawn
        other = next(path for path in other.parent.iterdir() if path.is_file())
    if file.is_dir():
        shutil.rmtree(file)
        shutil.copytree(other, file)
    else:
        shutil.copyfile(other, file)


def write_a_list(file: Path) -> None:
    file.write_text("[1, 2]")


DAMAGES = [
    (DESCRIPTION, cut),
    (DESCRIPTION, swap),
    (DESCRIPTION, write_a_list),
    (DESCRIPTION, make_unreadable),
    ("params/manifest.ocdbt", cut),
    ("params/manifest.ocdbt", swap),
    ("params/d/*", cut),
    ("params/d/*", swap),
    ("params/d/*", put_a_folder),
    ("optimizer/d/*", lose),
    ("optimizer", swap),
]


def restore(config: TrainConfig) -> int:
    """Does what training does to go on; returns the step at which it would."""
    _, _, mesh, rules, kernels = lay_out(config, jax.devices()[:1])
    _, params = abstract_model(config.model, config.runtime, rules, kernels)
    state = abstract_train_state(config.optimizer, params, rules, mesh.devices.flat[0])
    with RunCheckpoints(Path(config.directory), config.checkpoint) as checkpoints:
        found = checkpoints.restore_newest(state.params, optimizer_to_dict(state))
    assert found is not None
    return int(found[1]["step"])


@pytest.mark.parametrize(
    ("name", "damage"), DAMAGES, ids=[f"{name}-{damage.__name__}" for name, damage in DAMAGES]
)
def test_one_line_names_the_damage_and_the_step_before_is_taken(
    copied: TrainConfig, name: str, damage: Callable[[Path], None], caplog
):
    run = Path(copied.directory)
    step = run / "checkpoints" / "6"
    (file,) = step.glob(name)
    damage(file)
    assert any(str(step) in fault for fault in faults_of(run, progress=False))
    for take in (lambda: int(open_source(run).where.name), lambda: restore(copied)):
        caplog.clear()
        assert take() == 4
        gc.collect()  # what tasks leave unsaid is said then
        heard = [r for r in caplog.records if r.name.startswith(("dsjax", "asyncio"))]
        (said,) = [r.getMessage() for r in heard if r.levelno >= logging.WARNING]
        assert said.startswith(f"DAMAGED: {step}")
        assert "\n" not in said
        assert len(said) < 1000
    assert (run / "damaged" / "6").is_dir()


def test_where_no_step_has_a_description_nothing_is_moved_and_no_run_begins_anew(copied):
    run = Path(copied.directory)
    for step in ("2", "4", "6"):
        write_a_list(run / "checkpoints" / step / DESCRIPTION)
    with pytest.raises(ValueError, match=rf"^{run}/checkpoints/6/{DESCRIPTION}: is damaged"):
        restore(copied)
    assert len(list((run / "checkpoints").iterdir())) == 3


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        ("run.json", fill_with_nuls),
        ("run.json", put_a_folder),
        ("metrics.jsonl", fill_with_nuls),
        ("metrics.jsonl", put_a_folder),
    ],
)
def test_small_files_are_named_or_written_anew(copied, name, damage, caplog):
    run = Path(copied.directory)
    damage(run / name)
    opened = damage is fill_with_nuls
    if name == "metrics.jsonl":
        if opened:
            with MetricsWriter(run, LogConfig(), {}, 6) as metrics:
                metrics.write(6, {"loss": 1.0})
            assert not list(faults_of(run, progress=False))
        else:
            with pytest.raises(OSError, match=name):
                MetricsWriter(run, LogConfig(), {}, 6)
        return
    assert stored_config(run) is None
    assert f"{run}/{name}" in caplog.text
    with pytest.raises((ValueError, OSError), match=rf"^[^\n]*{name}[^\n]*$"):
        describe(run)
