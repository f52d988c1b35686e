"""`dsjax convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsjax.cli.arguments import DType


def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face folder or Hub name, or ours.")],
    destination: Annotated[str, typer.Argument(help="Folder to make.")],
    dtype: Annotated[DType | None, typer.Option(help="Of the result; default as stored.")] = None,
) -> None:
    """Converts a checkpoint from Hugging Face to ours, or from ours to Hugging Face."""
    from dsjax.weights.convert import convert as run

    run(source, destination, dtype=dtype)
