"""Runs that are killed, stopped or out of disk, as real processes."""

import os
import signal
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest
from flax import nnx

from dsjax.config import BatchConfig, CheckpointConfig, TrainConfig
from dsjax.files import LockHeldError
from dsjax.training.folder import only_run_in
from dsjax.weights import load_weights
from tests.cpu_compiler import xla_flags
from tests.dsjax.training.small_runs import (
    REPOSITORY,
    free_port,
    losses,
    read_metrics,
    run_cli,
    small_run,
    start_cli,
    start_two,
    wait_for_step,
    write_run,
)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform != "linux", reason="sends Linux signals"),
]


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> dict[str, str]:
    """The processes of these tests share what they compile."""
    return {
        "JAX_PLATFORMS": "cpu",
        "JAX_ENABLE_COMPILATION_CACHE": "true",
        "JAX_COMPILATION_CACHE_DIR": str(tmp_path_factory.mktemp("compiled")),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0.1",
    }


@pytest.fixture(scope="module")
def whole(corpus: Path, tmp_path_factory, environment) -> TrainConfig:
    """Six steps that nothing interrupts, a checkpoint at each."""
    folder = tmp_path_factory.mktemp("whole")
    config = small_run(folder / "run", corpus, checkpoint=CheckpointConfig(every=1, keep_latest=9))
    code, out, err = run_cli("train", write_run(config, folder / "run.py"), **environment)
    assert code == 0, err
    assert "held-out bits per byte" in out
    return config


def stored_params(run: Path, step: int) -> list[np.ndarray]:
    model = load_weights(run / "checkpoints" / str(step), dtype="float32")
    return [np.asarray(leaf) for leaf in jax.tree.leaves(nnx.state(model))]


def assert_same_end(run: Path, whole: TrainConfig) -> None:
    assert losses(run) == losses(Path(whole.directory))
    pairs = zip(stored_params(run, 6), stored_params(Path(whole.directory), 6), strict=True)
    for a, b in pairs:
        np.testing.assert_array_equal(a, b)


def unfinished(run: Path) -> list[Path]:
    return sorted((run / "checkpoints").glob("*.orbax-checkpoint-tmp*"))


def kill_during_save(process: subprocess.Popen, run: Path, first: int) -> int:
    """Kills a run while it saves a step from `first` on; returns that step."""
    until = time.monotonic() + 900
    while time.monotonic() < until and process.poll() is None:
        for path in unfinished(run):
            step = int(path.name.partition(".")[0])
            if step < first:
                continue
            process.send_signal(signal.SIGSTOP)
            if path.exists():  # still there with the process standing: not complete
                process.kill()
                process.wait()
                return step
            process.send_signal(signal.SIGCONT)
    pytest.fail(f"no save was caught: {process.communicate()[1]}")


def test_killed_in_a_save_and_resumed_changes_no_bit(whole, corpus, tmp_path: Path, environment):
    config = replace(whole, directory=str(tmp_path / "run"))
    file = write_run(config, tmp_path / "run.py")
    process = start_cli("train", file, **environment)
    killed_at = kill_during_save(process, tmp_path / "run", first=4)
    assert process.returncode == -signal.SIGKILL
    assert unfinished(tmp_path / "run")
    code, _, err = run_cli("train", file, **environment)
    assert code == 0, err
    assert f"resumed at step {killed_at - 1} of 6" in err
    assert not unfinished(tmp_path / "run")
    assert_same_end(tmp_path / "run", whole)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_saves_and_exits_and_the_run_goes_on(
    number: signal.Signals, whole, tmp_path: Path, environment
):
    # So many steps that it cannot end before the signal is seen.
    config = replace(whole, directory=str(tmp_path / "run"), num_steps=100_000)
    config = replace(config, checkpoint=CheckpointConfig(every=100_000))
    file = write_run(config, tmp_path / "run.py")
    process = start_cli("train", file, **environment)
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(number)
    out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    step = int(next((tmp_path / "run" / "checkpoints").iterdir()).name)
    assert f"stopped by a signal at step {step}; saved; run again to go on" in err
    assert f"step {step}, stopped by a signal" in out
    assert read_metrics(tmp_path / "run")[-1]["step"] == step
    code, _, err = run_cli("train", file, f"num_steps={step + 2}", **environment)
    assert code == 0, err
    assert f"resumed at step {step} of {step + 2}" in err
    assert list(losses(tmp_path / "run")) == list(range(1, step + 3))


def test_two_starts_in_one_folder_are_one_run_and_a_killed_one_blocks_none(
    whole, tmp_path: Path, environment
):
    """Started at once, as a scheduler that requeues does; which of them is first is open."""
    run = tmp_path / "run"
    config = replace(whole, directory=str(run), checkpoint=CheckpointConfig(every=100_000))
    config = replace(config, data=replace(config.data, eval_sources=()))
    file = write_run(config, tmp_path / "run.py")
    processes = [start_cli("train", file, "num_steps=100000", **environment) for _ in range(2)]
    until = time.monotonic() + 900
    while all(process.poll() is None for process in processes) and time.monotonic() < until:
        time.sleep(0.05)
    (refused,) = [process for process in processes if process.poll() is not None]
    (going,) = [process for process in processes if process is not refused]
    _, err = refused.communicate()
    assert refused.returncode == 2, err
    (line,) = err.splitlines()
    holder = f"process {going.pid} on {socket.gethostname()} since "
    assert line.startswith(f"error: {run}: in use by {holder}")
    with pytest.raises(LockHeldError, match=holder), only_run_in(run):
        pass
    wait_for_step(going, run, 2)
    going.kill()
    going.wait()
    # The one that was refused wrote no figures.
    assert [figures["step"] for figures in read_metrics(run)][:2] == [1, 2]
    assert holder in (run / "run.lock").read_text()
    with only_run_in(run):
        assert f"process {os.getpid()} on " in (run / "run.lock").read_text()


FULL_DISK = """
import builtins, errno, os, resource, signal, sys
from dsjax.cli import main
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # then writing past the limit is an error, EFBIG
from dsjax.training.checkpoints import RunCheckpoints
save = RunCheckpoints.save
def limited(self, step, *rest):
    if step == 3 and self.latest == 2:
        self.wait()  # the step before is complete
        resource.setrlimit(resource.RLIMIT_FSIZE, (4000, 4000))
    return save(self, step, *rest)
RunCheckpoints.save = limited
sys.argv = ["dsjax", "train", sys.argv[1]]
main()
"""


def test_a_full_disk_is_one_line_and_loses_nothing(whole, tmp_path: Path, environment):
    once_more = replace(whole.checkpoint, retries=1, retry_seconds=0.01)
    config = replace(whole, directory=str(tmp_path / "run"), checkpoint=once_more)
    file = write_run(config, tmp_path / "run.py")
    env = dict(os.environ) | {"XLA_FLAGS": xla_flags(1)} | environment
    env["JAX_ENABLE_COMPILATION_CACHE"] = "false"  # its files have a limit, too
    process = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(file)],
        cwd=REPOSITORY,
        env=env,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert process.returncode == 2, process.stderr
    errors = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1, process.stderr
    assert f"{tmp_path / 'run' / 'checkpoints'}: saving failed: " in errors[0]
    assert errors[0].endswith("(2 times in a row)")
    assert "trying again in 0.01 s, retry 1 of 1" in process.stderr
    # orbax's own thread may add to the log; what the user is told is the one line.
    finished = [p.name for p in (tmp_path / "run" / "checkpoints").iterdir() if p.name.isdigit()]
    assert sorted(finished) == ["1", "2"]
    code, _, err = run_cli("train", file, **environment)
    assert code == 0, err
    assert "resumed at step 2 of 6" in err
    assert_same_end(tmp_path / "run", whole)


@pytest.fixture
def port() -> int:
    return free_port()


def finish(processes: list[subprocess.Popen]) -> list[str]:
    """Waits for processes to end well; returns what each said."""
    found = [process.communicate(timeout=900) for process in processes]
    for process, (_, err) in zip(processes, found, strict=True):
        assert process.returncode == 0, err
    return [err for _, err in found]


def test_two_processes_train_stop_together_and_go_on(corpus, tmp_path: Path, port, environment):
    config = small_run(tmp_path / "two", corpus, num_steps=100_000)
    config = replace(config, batch=BatchConfig(size=8), checkpoint=CheckpointConfig(every=100_000))
    config = replace(config, data=replace(config.data, eval_sources=()))
    file = write_run(config, tmp_path / "run.py")
    processes = start_two(file, port, environment)
    wait_for_step(processes[0], tmp_path / "two", 3)
    processes[1].send_signal(signal.SIGTERM)
    said = finish(processes)
    (checkpoint,) = (tmp_path / "two" / "checkpoints").iterdir()
    step = int(checkpoint.name)
    assert f"stopped by a signal at step {step}; saved" in said[0]
    assert read_metrics(tmp_path / "two")[-1]["step"] == step
    assert read_metrics(tmp_path / "two" / "process_1")[-1]["step"] == step

    config = replace(config, num_steps=step + 3)
    said = finish(start_two(write_run(config, tmp_path / "run.py"), port, environment))
    assert f"resumed at step {step} of {step + 3}" in said[0]
    together = losses(tmp_path / "two")
    assert list(together) == list(range(1, step + 4))
    assert losses(tmp_path / "two" / "process_1") == together


def _held_out(printed: str) -> list[str]:
    """The line of held-out bits per byte; gloo prints lines of its own."""
    found = [line for line in printed.splitlines() if line.startswith("held-out")]
    assert len(found) == 1
    return found


def test_two_processes_have_the_loss_of_one(corpus, tmp_path: Path, port, environment):
    from dsjax.config import SourceConfig
    from dsjax.data.offline import pack

    source = SourceConfig(str(corpus), format="jsonl")
    pack([source], tmp_path / "rows", tokenizer="bytes", length=32, num_shards=2)
    one = small_run(tmp_path / "one", corpus)
    one = replace(one, data=replace(one.data, sources=(SourceConfig(str(tmp_path / "rows")),)))
    code, out, err = run_cli(
        "train", write_run(one, tmp_path / "one.py"), num_devices=2, **environment
    )
    assert code == 0, err
    two = replace(one, directory=str(tmp_path / "two"))
    processes = start_two(write_run(two, tmp_path / "two.py"), port, environment)
    printed = [process.communicate(timeout=900)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    alone, together = losses(tmp_path / "one"), losses(tmp_path / "two")
    np.testing.assert_allclose(list(together.values()), list(alone.values()), rtol=2e-5)
    assert _held_out(printed[0]) == _held_out(out)
