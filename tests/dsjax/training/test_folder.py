"""A run's folder: one run at a time, whoever starts it."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsjax import api
from dsjax.files import LockHeldError, locked
from dsjax.processes import join
from dsjax.training.folder import LOCK_FILE
from tests.dsjax.training.small_runs import small_run

pytestmark = pytest.mark.core


def test_a_second_run_in_a_folder_is_refused_and_changes_nothing(corpus: Path, tmp_path: Path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "metrics.jsonl").write_text(json.dumps({"step": 1}) + "\n")
    with locked(run / LOCK_FILE):
        with pytest.raises(LockHeldError, match=f"{run}: in use by process"):
            api.train(small_run(run, corpus))
        assert sorted(path.name for path in run.iterdir()) == ["metrics.jsonl", LOCK_FILE]
        assert (run / "metrics.jsonl").read_text() == json.dumps({"step": 1}) + "\n"


def test_a_step_that_is_not_there_is_said_before_data_are_made(tmp_path: Path):
    with pytest.raises(ValueError, match=r"step=3: .*new is no training run, so it has no steps"):
        api.train(small_run(tmp_path / "new", tmp_path / "no corpus"), step=3)
    assert not list(tmp_path.iterdir())


def test_training_from_python_joins_the_other_processes(corpus: Path, tmp_path: Path, monkeypatch):
    order: list[str] = []
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "host:1")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "2")
    monkeypatch.setenv("JAX_PROCESS_ID", "1")
    monkeypatch.setattr(join.jax.distributed, "initialize", lambda *_, **__: order.append("joined"))
    monkeypatch.setattr(api, "fit", lambda config, step: order.append(config.directory))
    config = small_run(tmp_path, corpus)
    api.train(config)
    assert order == ["joined", str(tmp_path)]
    # A second call in one process finds it joined.
    monkeypatch.setattr(join.jax.distributed, "is_initialized", lambda: True)
    api.train(replace(config, directory="second"))
    assert order == ["joined", str(tmp_path), "second"]
