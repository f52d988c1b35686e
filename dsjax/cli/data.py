"""`dsjax data`: prepare data."""

from __future__ import annotations

import os
from typing import Annotated

import typer

app = typer.Typer(help="Prepare data.", no_args_is_help=True)


@app.command()
def pack(
    source: Annotated[str, typer.Argument(help="Folder or file of documents.")],
    destination: Annotated[str, typer.Argument(help="Folder for the packed rows.")],
    length: Annotated[int, typer.Option(help="Tokens in a row.")],
    tokenizer: Annotated[str, typer.Option(help='"bytes" or a tokenizer.json.')],
    format: Annotated[str, typer.Option(help="text, jsonl or parquet.")] = "text",
    glob: Annotated[str, typer.Option(help="Pattern of the files below a folder.")] = "",
    text_field: Annotated[str, typer.Option(help="JSON field or Parquet column.")] = "text",
    long_documents: Annotated[str, typer.Option(help="split, truncate or error.")] = "split",
    seed: Annotated[int, typer.Option(help="Of the order of documents.")] = 0,
    workers: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
) -> None:
    """Packs documents into ArrayRecord rows of tokens; run again to go on after a stop."""
    from dsjax.config import SourceConfig
    from dsjax.data.offline import pack as run

    manifest = run(
        [SourceConfig(source, format=format, glob=glob, text_field=text_field)],  # type: ignore[arg-type]
        destination,
        tokenizer=tokenizer,
        length=length,
        num_workers=workers,
        seed=seed,
        long_documents=long_documents,  # type: ignore[arg-type]
    )
    counts = ("num_documents", "num_rows", "num_tokens", "num_bytes")
    print(" ".join(f"{name}={manifest[name]:,}" for name in counts))
