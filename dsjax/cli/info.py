"""`dsjax info` and `dsjax check`: what a config comes to, and whether files are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dsjax.cli.arguments import Overrides
from dsjax.config import ModelConfig
from dsjax.config.load import load_config, named_configs, override
from dsjax.families import find_model_config

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def info(
    config: Annotated[
        str, typer.Argument(help="A config's name or file, or a model as for generate.")
    ],
    overrides: Overrides = None,
    length: Annotated[int, typer.Option(help="Tokens of a training sequence.", min=1)] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prints a model's size, cache and FLOPs."""
    from dsjax.counts import describe

    figures = describe(_model_config(config, overrides or ()), length)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", box=None)
    for name, value in figures.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)


def _model_config(name: str, overrides: Sequence[str]) -> ModelConfig:
    path = Path(name).expanduser()
    ours_or_json = name in named_configs() or path.is_file() or (path / "config.json").is_file()
    if ours_or_json or not (path.exists() or _HUB_NAME.fullmatch(name)):
        return find_model_config(name, overrides)
    # Only here, so that a config's figures need not wait for what checkpoints import.
    from dsjax.weights.sources import describe

    if path.exists():
        return override(describe(path)[0], overrides)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:  # the config alone: the weights can be hundreds of gigabytes
        file = huggingface_hub.hf_hub_download(name, "config.json")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name}: no such config or folder, and not to be had from the Hugging Face Hub: "
            f"{first_line}"
        ) from None
    return find_model_config(file, overrides)


def check(
    config: Annotated[
        str, typer.Argument(help="A config's name or file; a model's folder or a run's.")
    ],
    overrides: Overrides = None,
) -> None:
    """Prints what a config comes to, or reads all of a model or a run and names every fault."""
    path = Path(config).expanduser()
    if config not in named_configs() and path.is_dir():
        _check_files(path, overrides or ())
        return
    from rich.pretty import pprint

    pprint(load_config(config, overrides or ()))


def _check_files(path: Path, overrides: Sequence[str]) -> None:
    if overrides:
        raise ValueError(f"{overrides[0]}: {path} is a folder: only a config takes other fields")
    from dsjax.weights.check import faults_of

    count = 0
    for fault in faults_of(path):
        print(fault, flush=True)
        count += 1
    if count:
        raise typer.Exit(1)
    print(f"{path}: all was read; no fault")
