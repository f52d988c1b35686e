"""`dsjax train`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsjax.cli.arguments import Overrides, Verbose
from dsjax.config import TrainConfig
from dsjax.config.load import load_train_config


def train(
    config: Annotated[str, typer.Argument(help="A run's name, such as quickstart, or its file.")],
    overrides: Overrides = None,
    step: Annotated[
        int | None,
        typer.Option(
            help="The checkpoint to go on from, instead of the newest; later ones are set aside."
        ),
    ] = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Build and compile everything, print its sizes, train and write nothing.",
        ),
    ] = False,
    status_if_stopped: Annotated[
        int,
        typer.Option(
            min=0,
            max=255,
            help="Exit status where a signal stopped the run: 75 makes a scheduler start it again.",
        ),
    ] = 0,
    verbose: Verbose = False,
) -> None:
    """Trains a model; run again, it goes on from the last checkpoint."""
    run = load_train_config(config, overrides or ())
    if dry_run:
        _show_sizes(run, step)
        return
    from dsjax.api import train as train_here

    result = train_here(run, step=step)
    if result.bits_per_byte is not None:
        print(f"held-out bits per byte: {result.bits_per_byte:.4f}")
    print(
        f"{run.directory}: step {result.step}{'' if result.finished else ', stopped by a signal'}"
    )
    if not result.finished:
        raise typer.Exit(status_if_stopped)


def _show_sizes(run: TrainConfig, step: int | None) -> None:
    import jax

    from dsjax.processes import initialize_processes
    from dsjax.training.dry_run import dry_run

    initialize_processes()
    figures = dry_run(run, step=step)
    if jax.process_index() != 0:
        return
    for name, value in figures.items():
        if name.endswith("_bytes"):
            text = "unknown" if value is None else f"{value / 2**30:.3f} GiB"
        else:
            text = f"{value:,}" if isinstance(value, int) else str(value)
        print(f"{name:18} {text}")
