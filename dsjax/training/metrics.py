"""Where a run's figures go: always `metrics.jsonl`, and further sinks if asked."""

from __future__ import annotations

import json
import logging
import math
import re
import secrets
from pathlib import Path
from typing import Any

from dsjax.config import LogConfig
from dsjax.config.run_file import METRICS_FILE
from dsjax.files import write_bytes

_LOG = logging.getLogger(__name__)


class MetricsWriter:
    """Writes one line of figures per call, in the order of the steps."""

    def __init__(self, directory: Path, config: LogConfig, run: dict[str, Any], start: int = 0):
        """Opens the sinks that the config asks for.

        Args:
            directory: the run's; `metrics.jsonl` is appended to.
            config: which further sinks to open.
            run: the run's configuration as JSON, which Weights & Biases shows.
            start: the step that the run goes on from. Later steps come again, so the figures that
                a killed run wrote of them are dropped.

        Raises:
            ImportError: a sink's package is not installed; names the extra.
        """
        self._tensorboard = self._wandb = None
        if config.tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ImportError(
                    "log.tensorboard=True: needs tensorboardX; pip install 'dsjax[tensorboard]'"
                ) from None
            self._tensorboard = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        if config.wandb_project:
            try:
                import wandb
            except ImportError:
                raise ImportError(
                    f"log.wandb_project={config.wandb_project!r}: needs wandb; "
                    "pip install 'dsjax[wandb]'"
                ) from None
            self._wandb = wandb.init(
                project=config.wandb_project,
                dir=str(directory),
                config=run,
                id=_wandb_id(directory),
                resume="allow",
            )
        path = directory / METRICS_FILE
        _drop_lines_after(path, start)
        self._file = path.open("ab", buffering=0)  # what is refused is not written by a later call
        self._refused = False

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Writes the figures of a step; a list goes to the JSON lines alone.

        A disk that does not take them is said once, and the run goes on: figures are expendable.
        """
        # JSON knows neither NaN nor infinity: a figure that is none becomes null.
        line = {name: None if _is_not_finite(v) else v for name, v in figures.items()}
        text = json.dumps({"step": step} | line, allow_nan=False) + "\n"
        try:
            self._file.write(text.encode())
        except OSError as error:
            if not self._refused:
                _LOG.warning("%s: figures are lost: %s", self._file.name, error.strerror)
            self._refused = True
        scalars = {k: v for k, v in figures.items() if isinstance(v, int | float)}
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()


def _is_not_finite(value: Any) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _drop_lines_after(path: Path, step: int) -> None:
    """Drops the lines of later steps, and those that a kill or a power loss damaged."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    steps = [_step_of(line) for line in lines]
    # The last line cut short is what any kill leaves.
    if damaged := steps[:-1].count(None):
        _LOG.warning("%s: %d damaged lines were dropped", path, damaged)
    kept = [line for line, at in zip(lines, steps, strict=True) if at is not None and at <= step]
    if kept != lines:
        write_bytes(path, b"".join(kept))


def _step_of(line: bytes) -> int | None:
    """Returns the step of a whole line, or None."""
    try:
        step = json.loads(line)["step"] if line.endswith(b"\n") else None
    except (ValueError, TypeError, KeyError):  # UnicodeDecodeError is a ValueError
        return None
    return step if isinstance(step, int) else None


def _wandb_id(directory: Path) -> str:
    """Returns the id by which Weights & Biases knows the run, the same after every restart."""
    path = directory / "wandb_id"
    found = path.read_bytes() if path.exists() else b""
    if not re.fullmatch(rb"[0-9a-f]{16}", found):  # absent, or damaged
        found = secrets.token_hex(8).encode()
        write_bytes(path, found)
    return found.decode()
