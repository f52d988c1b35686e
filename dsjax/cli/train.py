"""`dsjax train`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsjax.cli.arguments import Overrides, Verbose
from dsjax.config.load import load_train_config


def train(
    config: Annotated[str, typer.Argument(help="A run's name, such as quickstart, or its file.")],
    overrides: Overrides = None,
    verbose: Verbose = False,
) -> None:
    """Trains a model; run again to go on from the last complete checkpoint."""
    run = load_train_config(config, overrides or ())
    from dsjax.api import train as train_here

    result = train_here(run)
    if result.bits_per_byte is not None:
        print(f"held-out bits per byte: {result.bits_per_byte:.4f}")
    print(
        f"{run.directory}: step {result.step}{'' if result.finished else ', stopped by a signal'}"
    )
