"""Runs whose processes are killed at random, and those of which a process that reads data is."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dsjax.config import CheckpointConfig
from tests.cpu_compiler import xla_flags
from tests.dsjax.training.small_runs import (
    REPOSITORY,
    losses,
    small_run,
    start_cli,
    wait_for_step,
    write_run,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="sends Linux signals"),
]
SCRIPTS = REPOSITORY / "scripts"
# By hand: DSJAX_KILLED_STEPS=4000 DSJAX_KILLS=60.
STEPS = int(os.environ.get("DSJAX_KILLED_STEPS", "20"))
KILLS = int(os.environ.get("DSJAX_KILLS", "1"))


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """The processes of a test share what they compile."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


def run_script(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(SCRIPTS / "kill_run.py"), *map(str, arguments)],
        cwd=REPOSITORY,
        env=os.environ | {"XLA_FLAGS": xla_flags(1), "PYTHONPATH": str(REPOSITORY)} | environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_killed_at_random_a_run_comes_to_the_same_bits(corpus, tmp_path: Path, environment):
    config = small_run(tmp_path / "run", corpus, num_steps=STEPS)
    config = replace(config, checkpoint=CheckpointConfig(every=5))
    config = replace(config, data=replace(config.data, eval_sources=()))
    file = write_run(config, tmp_path / "run.py")
    options = ("--kills", KILLS, "--seconds", 1, "--seed", 1)
    ended = run_script(file, tmp_path, *options, **environment)
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    assert found["steps"] == STEPS
    assert 0 < found["kills"] <= KILLS
    # It would say so, were they not the same.
    script = functions_of("kill_run.py")
    assert script["first_difference"](tmp_path / "whole", tmp_path / "killed") == ""
    shutil.copytree(tmp_path / "killed", tmp_path / "other")
    metrics = tmp_path / "other" / "metrics.jsonl"
    text = metrics.read_text()
    metrics.write_text(re.sub(r'("step": 7, "loss": \d+\.\d*)\d', r"\g<1>", text, count=1))
    assert metrics.read_text() != text
    said = script["first_difference"](tmp_path / "whole", tmp_path / "other")
    assert said.startswith("step 7: loss "), said


def functions_of(script: str) -> dict[str, Any]:
    sys.path.insert(0, str(SCRIPTS))
    try:
        return runpy.run_path(str(SCRIPTS / script))
    finally:
        sys.path.remove(str(SCRIPTS))


def data_workers(process: subprocess.Popen) -> list[int]:
    """Returns the processes that read data for a run."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(path.read_text().rpartition(")")[2].split()[1])
            command = (path.parent / "cmdline").read_bytes()
        except OSError:  # it has ended by now
            continue
        if parent == process.pid and b"spawn_main" in command:
            found.append(int(path.parent.name))
    return sorted(found)


def test_a_killed_data_worker_ends_the_run_with_one_line(corpus, tmp_path: Path, environment):
    run = tmp_path / "run"
    config = small_run(run, corpus, num_steps=100_000)
    config = replace(
        config,
        data=replace(config.data, num_workers=2, eval_sources=()),
        checkpoint=CheckpointConfig(every=3, keep_latest=99),
    )
    file = write_run(config, tmp_path / "run.py")
    process = start_cli("train", file, **environment)
    wait_for_step(process, run, 4)
    workers = data_workers(process)
    assert len(workers) == 2
    os.kill(workers[0], signal.SIGKILL)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 2, err
    (line,) = [line for line in err.splitlines() if line.startswith("error: ")]
    assert line.startswith("error: a process of data.num_workers was ended by signal 9 (SIGKILL);")
    assert max(losses(run)) >= 4
    assert (run / "checkpoints" / "3").is_dir()  # from which the next start goes on
