"""`dsjax data`: prepare data."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

import typer

app = typer.Typer(help="Prepares data.", no_args_is_help=True, rich_markup_mode=None)


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="Folder or file of documents.")],
    destination: Annotated[str, typer.Argument(help="Folder for the packed rows.")],
    length: Annotated[int, typer.Option(help="Tokens in a row.", min=1)],
    tokenizer: Annotated[str, typer.Option(help='"bytes" or a tokenizer.json.')],
    format: Annotated[
        Literal["text", "jsonl", "parquet"] | None,
        typer.Option(help="Of the documents; told by suffix and first bytes where not named."),
    ] = None,
    glob: Annotated[str, typer.Option(help="Pattern of the files below a folder.")] = "",
    text_field: Annotated[str, typer.Option(help="JSON field or Parquet column.")] = "text",
    long_documents: Annotated[
        Literal["split", "truncate", "error"], typer.Option(help="Those longer than a row.")
    ] = "split",
    on_error: Annotated[
        Literal["stop", "skip"],
        typer.Option(help="A document that cannot be read; skip lists it in skipped.txt."),
    ] = "stop",
    seed: Annotated[int, typer.Option(help="Of the order of documents.")] = 0,
    workers: Annotated[
        int, typer.Option(help="Processes; 0 works in this one.", min=0)
    ] = os.cpu_count() or 1,
) -> None:
    """Packs documents into ArrayRecord rows of tokens; run again to go on after a stop."""
    from dsjax.config import SourceConfig
    from dsjax.data.find_files import infer_format
    from dsjax.data.offline import pack as run

    path = Path(source).expanduser()
    if format is None:
        format = infer_format(path) if path.exists() and not glob else "text"
    manifest = run(
        [SourceConfig(source, format=format, glob=glob, text_field=text_field)],
        destination,
        tokenizer=tokenizer,
        length=length,
        num_workers=workers,
        seed=seed,
        long_documents=long_documents,
        on_error=on_error,
    )
    counts: tuple[str, ...] = ("num_documents", "num_rows", "num_tokens", "num_bytes")
    if manifest.get("num_skipped"):
        counts += ("num_skipped",)
    print(" ".join(f"{name}={manifest[name]:,}" for name in counts))
