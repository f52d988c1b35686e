"""`run.json`: what a training run is, kept in its folder for those who load its checkpoints."""

from __future__ import annotations

from pathlib import Path

from dsjax.config.stored import run_from_json, run_to_json
from dsjax.config.train import TrainConfig
from dsjax.files import read_json, write_json

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"  # beside it: the figures of its steps, a line each


def write_run_file(run: Path, config: TrainConfig) -> None:
    """Writes the config of the run in a folder."""
    write_json(run / RUN_FILE, run_to_json(config))


def read_run_file(run: Path) -> TrainConfig:
    """Reads what `write_run_file` wrote, or an earlier version of it.

    Raises:
        OSError: there is no such file.
        ValueError: it is damaged or of a later version; names the file.
    """
    path = run / RUN_FILE
    return run_from_json(read_json(path), str(path))
