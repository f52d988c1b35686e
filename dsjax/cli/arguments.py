"""Arguments that several commands take."""

from __future__ import annotations

import logging
from typing import Annotated, Literal

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Config fields to change: field.subfield=value.")
]
DType = Literal["bfloat16", "float32"]

_DETAILS = ("dsjax.kernels",)  # what only -v shows, of their lines that are no warnings


def _show_details(verbose: bool) -> bool:
    for name in _DETAILS:
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)
    return verbose


Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also say which kernels run.", callback=_show_details),
]
