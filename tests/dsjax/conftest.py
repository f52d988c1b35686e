"""A run that is trained once and looked at by many tests."""

from dataclasses import replace
from pathlib import Path

import jax
import pytest

from dsjax.config import CheckpointConfig, LogConfig, TrainConfig
from dsjax.training.loop import fit
from tests.dsjax.training.small_runs import small_run, write_corpus


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of short documents."""
    return write_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="session")
def trained_run(corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> TrainConfig:
    """Six steps on one device, a checkpoint and an evaluation every two; all are kept."""
    config = replace(
        small_run(tmp_path_factory.mktemp("run") / "six", corpus),
        checkpoint=CheckpointConfig(every=2, keep_latest=9),
        log=LogConfig(every=1, eval_every=2, tensorboard=True),
    )
    result = fit(config, devices=jax.devices()[:1])
    assert result.finished
    return config
