"""Arguments that several commands take."""

from __future__ import annotations

from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Config fields to change: field.subfield=value.")
]
