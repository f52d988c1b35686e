"""`dsjax info` and `dsjax check`: what a config comes to, without a device."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from dsjax.cli.arguments import Overrides
from dsjax.config.load import load_config
from dsjax.families import find_model_config


def info(
    config: Annotated[
        str, typer.Argument(help="A config's name or file, a config.json or a model's folder.")
    ],
    overrides: Overrides = None,
    length: Annotated[int, typer.Option(help="Tokens of a training sequence.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prints a model's size, cache and FLOPs."""
    from dsjax.counts import describe

    figures = describe(find_model_config(config, overrides or ()), length)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", box=None)
    for name, value in figures.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)


def check(
    config: Annotated[str, typer.Argument(help="A config's name or file.")],
    overrides: Overrides = None,
) -> None:
    """Loads a config, applies overrides, and prints what it comes to."""
    from rich.pretty import pprint

    pprint(load_config(config, overrides or ()))
