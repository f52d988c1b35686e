"""Compiled programs that a second process takes from disk."""

import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dsjax.engine import program_store
from tests.dsjax.training.small_runs import REPOSITORY

SCRIPT = """
import jax
events = []
jax.monitoring.register_event_duration_secs_listener(lambda event, *_, **__: events.append(event))
from tests.dsjax.engine.small_engine import an_engine, random_requests
an_engine()
events.clear()
with an_engine(warm_up=True, max_batch=2, batch_sizes=(2,), chunks=((1, 8),)) as engine:
    print([one.tokens for one in engine.generate(random_requests(3, 4))])
print(sum("jaxpr_to_mlir" in event for event in events))
"""


def start(cache: Path) -> tuple[str, int]:
    """Starts an engine in a process of its own; returns texts and the programs lowered."""
    environment = os.environ | {
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_PLATFORMS": "cpu",
        "PYTHONPATH": str(REPOSITORY),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT],
        env=environment,
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
        check=True,
    )
    texts, lowered = done.stdout.splitlines()
    return texts, int(lowered)


@pytest.mark.slow
def test_a_second_start_takes_every_program_from_disk(tmp_path: Path):
    texts, lowered = start(tmp_path)
    kept = sorted((tmp_path / "dsjax-programs").iterdir())
    # One step that decodes, one with a chunk and one with log-probabilities, eight choices, and
    # what sets pages and counts.
    assert len(kept) == 1 + 2 + 8 + 2
    again, lowered_again = start(tmp_path)
    assert again == texts
    assert lowered - lowered_again >= len(kept)
    # A damaged file is passed over and made again.
    kept[0].write_bytes(kept[0].read_bytes()[:-1])
    damaged, lowered_damaged = start(tmp_path)
    assert damaged == texts
    assert lowered_damaged == lowered_again + 1
    assert [path.name for path in sorted((tmp_path / "dsjax-programs").iterdir())] == [
        path.name for path in kept
    ]


def test_a_program_that_cannot_be_kept_is_said(tmp_path: Path, caplog):
    (tmp_path / "file").write_text("")
    with caplog.at_level(logging.WARNING):
        program_store.keep_program(tmp_path / "file", "name", object())
    assert "is not kept" in caplog.text
