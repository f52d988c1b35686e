"""A process of two is killed or stopped: the other ends soon, and says who and where."""

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from dsjax.config import CheckpointConfig, WatchConfig
from tests.dsjax.training.small_runs import (
    free_port,
    small_run,
    start_two,
    wait_for_step,
    write_run,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="sends Linux signals"),
]


def lose(which: int, how: signal.Signals, folder: Path, corpus: Path) -> tuple[float, str, int]:
    """Trains in two processes and loses one; returns the other's seconds, words and exit code."""
    config = small_run(folder / "run", corpus, num_steps=1_000_000)
    config = replace(
        config,
        checkpoint=CheckpointConfig(every=1_000_000),
        data=replace(config.data, eval_sources=()),
        watch=WatchConfig(peer_seconds=8),
    )
    file = write_run(config, folder / "run.py")
    processes: list[subprocess.Popen] = start_two(file, free_port(), {"JAX_PLATFORMS": "cpu"})
    wait_for_step(processes[0], folder / "run", 3)
    time.sleep(3)  # so that each has heard the other
    os.kill(processes[which].pid, how)
    began = time.monotonic()
    _, said = processes[1 - which].communicate(timeout=40)
    return time.monotonic() - began, said, processes[1 - which].returncode


@pytest.mark.parametrize(
    ("which", "how"),
    [(1, signal.SIGKILL), (1, signal.SIGSTOP), (0, signal.SIGKILL), (0, signal.SIGSTOP)],
)
def test_the_other_ends_and_prints_its_stacks(which, how, corpus, tmp_path: Path):
    seconds, said, code = lose(which, how, tmp_path, corpus)
    assert seconds < 30, said
    assert code != 0
    assert "most recent call first" in said, said  # faulthandler's
    assert "loop.py" in said or "Traceback" in said, said
    if (which, how) != (0, signal.SIGKILL):  # then JAX itself ends the other at once
        assert f"process {which} (" in said, said
        assert "has given no sign of life for 8 s" in said
        assert code == 75
    else:
        assert "another task died" in said
