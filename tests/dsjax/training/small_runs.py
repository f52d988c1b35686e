"""Runs small enough to train in a test: a corpus that can be learned, and a two-layer model."""

import json
import os
import socket
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dsjax.config import (
    BatchConfig,
    CheckpointConfig,
    DataConfig,
    LogConfig,
    OptimizerConfig,
    SourceConfig,
    TrainConfig,
    to_json,
)
from tests.cpu_compiler import xla_flags
from tests.small_models import LOSS, RUNTIME, SMALL, SMALL_MOE

REPOSITORY = Path(__file__).resolve().parents[3]
LENGTH = 32
STARTED: list[subprocess.Popen] = []  # so that a test that fails leaves none behind

# One dense and one sparse layer; all widths can be divided over eight devices.
MODEL = replace(
    SMALL,
    vocab_size=264,
    num_layers=2,
    intermediate_dim=48,
    max_length=64,
    attention=replace(SMALL.attention, qk_nope_head_dim=16, v_head_dim=16),
    moe=replace(SMALL_MOE, top_k=2, intermediate_dim=16, num_shared_experts=1, routed_scale=1.0),
    init_std=0.1,
)


def write_corpus(folder: Path, num_documents: int = 60) -> Path:
    """Writes short documents, one a line of JSON: sums with their results."""
    rng = np.random.default_rng(0)
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / "sums.jsonl").open("w", encoding="utf-8") as stream:
        for a, b in rng.integers(0, 50, (num_documents, 2)):
            stream.write(json.dumps({"text": f"{a} + {b} = {a + b}; é"}) + "\n")
    return folder


def small_run(directory: Path, corpus: Path, **changes: Any) -> TrainConfig:
    """Returns a run of six steps over a corpus; `changes` are fields of TrainConfig."""
    source = (SourceConfig(str(corpus), format="jsonl"),)
    config = TrainConfig(
        directory=str(directory),
        model=MODEL,
        data=DataConfig(sources=source, eval_sources=source, length=LENGTH, num_packing_bins=4),
        batch=BatchConfig(size=8),
        num_steps=6,
        runtime=RUNTIME,
        optimizer=OptimizerConfig(peak_learning_rate=3e-3, warmup_steps=2),
        loss=LOSS,
        checkpoint=CheckpointConfig(every=100),
        log=LogConfig(every=1, eval_every=0),
    )
    return replace(config, **changes)


def write_run(config: TrainConfig, path: Path) -> Path:
    """Writes a config file that `dsjax train` reads."""
    path.write_text(
        "import json\nfrom dsjax.config import TrainConfig, from_json\n"
        f"config = from_json(TrainConfig, json.loads({json.dumps(to_json(config))!r}))\n",
        encoding="utf-8",
    )
    return path


def start_cli(*arguments: object, num_devices: int = 1, **environment: str) -> subprocess.Popen:
    """Starts `dsjax` as a process of its own."""
    env = dict(os.environ) | {
        "XLA_FLAGS": xla_flags(num_devices),
        "PYTHONUNBUFFERED": "1",
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "dsjax", *map(str, arguments)],
        cwd=REPOSITORY,
        env=env | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    STARTED.append(process)
    return process


def run_cli(*arguments: object, num_devices: int = 1, **environment: str) -> tuple[int, str, str]:
    """Runs `dsjax` to its end; returns exit code, standard output and standard error."""
    process = start_cli(*arguments, num_devices=num_devices, **environment)
    out, err = process.communicate(timeout=900)
    return process.returncode, out, err


def read_metrics(run: Path) -> list[dict]:
    """Reads a run's figures."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def losses(run: Path) -> dict[int, float]:
    """Returns the loss of every step, without a step being there twice."""
    found: dict[int, float] = {}
    for line in read_metrics(run):
        if "loss" in line:
            assert line["step"] not in found
            found[line["step"]] = line["loss"]
    return found


def wait_for_step(process: subprocess.Popen, run: Path, step: int) -> None:
    """Waits until a run has written the figures of a step."""
    until = time.monotonic() + 900
    path = run / "metrics.jsonl"
    while time.monotonic() < until and process.poll() is None:
        if path.exists() and len(path.read_bytes().splitlines()) >= step:
            return
        time.sleep(0.01)
    pytest.fail(f"step {step} was never reached: {process.communicate()[1]}")


def free_port() -> int:
    """Returns a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def start_two(file: Path, port: int, environment: dict[str, Any]) -> list[subprocess.Popen]:
    """Starts a run in two processes."""
    return [
        start_cli(
            "train",
            file,
            **environment,
            JAX_COORDINATOR_ADDRESS=f"localhost:{port}",
            JAX_NUM_PROCESSES="2",
            JAX_PROCESS_ID=str(index),
        )
        for index in range(2)
    ]
