"""`dsjax`: one file a family of commands; each command parses, loads and calls.

What a command needs beyond parsing it imports when it is called, so that `dsjax info` does not
wait for what training imports.
"""

from __future__ import annotations

import io
import logging
import os
import sys
import warnings
from typing import Annotated, Any

import typer

from dsjax import __version__
from dsjax.cli import chat, convert, data, evaluate, generate, info, plan, serve, train
from dsjax.cli.errors import one_line_errors

app = typer.Typer(
    help="DeepSeek-V2 in JAX: train, generate, convert.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # rich's boxes cut long names of options on 80 columns
    context_settings={"help_option_names": ["-h", "--help"]},
)
# Typer exports no base of its usage errors, which is its own class or click's, by its version.
_USAGE_ERROR: type[Any] = typer.BadParameter.__mro__[1]
_COMMANDS = (info.info, train.train, plan.plan, generate.generate, chat.chat, serve.serve)
for command in (*_COMMANDS, convert.convert, info.check):
    app.command()(command)
app.command("eval")(evaluate.evaluate)
app.add_typer(data.app, name="data")


def _version(wanted: bool) -> None:
    if wanted:
        print(f"dsjax {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    pass


def main() -> None:
    """Runs the command line; what a user can mend is one line, not a traceback."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal of ASCII shows "?" for the rest
            stream.reconfigure(errors="replace")
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("orbax", "jax", "httpx", "tensorstore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # orbax logs a failed save with its traceback and then raises it; a user needs one line of it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if not os.environ.get("DSJAX_TRACEBACK"):
        # What orbax leaves of a checkpoint that it could not read, beside the error that it raises.
        sys.unraisablehook = lambda _: None
        warnings.filterwarnings("ignore", r"coroutine '.*' was never awaited", RuntimeWarning)
    with one_line_errors():
        for argument in sys.argv[1:]:
            if any("\ud800" <= letter <= "\udfff" for letter in argument):
                raise ValueError(f"argument {argument!r} is not UTF-8")
        _run()


def _run() -> None:
    """Runs a command; what is wrong with its options is one line too."""
    command = typer.main.get_command(app)
    try:
        sys.exit(command.main(prog_name="dsjax", standalone_mode=False) or 0)
    except typer.Abort:
        sys.exit(130)
    except _USAGE_ERROR as error:
        if type(error).__name__ == "NoArgsIsHelpError":
            error.show()
            sys.exit(2)
        message = " ".join(error.format_message().split()).replace("Value error, ", "")
        hint = error.ctx.command_path if getattr(error, "ctx", None) else "dsjax"
        print(f"error: {message} (see {hint} --help)", file=sys.stderr)
        sys.exit(2)
