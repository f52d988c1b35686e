"""`dsjax`: one file a family of commands; each command parses, loads and calls.

What a command needs beyond parsing it imports when it is called, so that `dsjax info` does not
wait for what training imports.
"""

from __future__ import annotations

import logging
import os
import sys

import typer

from dsjax.cli import convert, data, generate, info, train

app = typer.Typer(
    help="DeepSeek-V2 in JAX: train, generate, convert.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for command in (info.info, train.train, generate.generate, convert.convert, info.check):
    app.command()(command)
app.add_typer(data.app, name="data")


def main() -> None:
    """Runs the command line; what a user can mend is one line, not a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("orbax", "jax", "httpx", "tensorstore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # orbax logs a failed save with its traceback and then raises it; a user needs one line of it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if not os.environ.get("DSJAX_TRACEBACK"):
        sys.unraisablehook = lambda _: None  # what orbax's threads leave
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("DSJAX_TRACEBACK"):
            raise
        first, *rest = str(error).strip().splitlines() or [type(error).__name__]
        more = " (DSJAX_TRACEBACK=1 shows all of it)" if rest else ""
        print(f"error: {first}{more}", file=sys.stderr)
        sys.exit(2)
