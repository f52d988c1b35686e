"""Where a run's figures go: always `metrics.jsonl`, and TensorBoard or Weights & Biases if asked."""

from __future__ import annotations

import json
from pathlib import Path
from types import TracebackType
from typing import Any

from dsjax.config import LogConfig


class MetricsWriter:
    """Writes one line of figures per call, in the order of the steps."""

    def __init__(self, directory: Path, config: LogConfig, run: dict[str, Any]):
        """Opens the sinks that the config asks for.

        Args:
            directory: the run's; `metrics.jsonl` is appended to.
            config: which further sinks to open.
            run: the run's configuration as JSON, which Weights & Biases shows.

        Raises:
            ImportError: a sink's package is not installed; names the extra.
        """
        self._file = (directory / "metrics.jsonl").open("a", encoding="utf-8")
        self._tensorboard = self._wandb = None
        if config.tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ImportError(
                    "log.tensorboard=True: needs tensorboardX; pip install 'dsjax[tensorboard]'"
                ) from None
            self._tensorboard = SummaryWriter(str(directory / "tensorboard"))
        if config.wandb_project:
            try:
                import wandb
            except ImportError:
                raise ImportError(
                    f"log.wandb_project={config.wandb_project!r}: needs wandb; "
                    "pip install 'dsjax[wandb]'"
                ) from None
            self._wandb = wandb.init(
                project=config.wandb_project, dir=str(directory), config=run, resume="allow"
            )

    def write(self, step: int, figures: dict[str, Any]) -> None:
        """Writes the figures of a step; a list goes to the JSON lines alone."""
        self._file.write(json.dumps({"step": step} | figures) + "\n")
        self._file.flush()
        scalars = {k: v for k, v in figures.items() if isinstance(v, int | float)}
        if self._tensorboard is not None:
            for name, value in scalars.items():
                self._tensorboard.add_scalar(name, value, step)
        if self._wandb is not None:
            self._wandb.log(scalars, step=step)

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._file.close()
        if self._tensorboard is not None:
            self._tensorboard.close()
        if self._wandb is not None:
            self._wandb.finish()
