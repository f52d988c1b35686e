"""`dsjax`: parse, load, call. What is imported at the top is what every command needs."""

from __future__ import annotations

import json
import logging
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from dsjax.config import ModelConfig, TrainConfig
from dsjax.config.load import load_config, load_model_config, load_train_config

app = typer.Typer(
    help="DeepSeek-V2 in JAX: train, generate, convert.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
data_app = typer.Typer(help="Prepare data.", no_args_is_help=True)
app.add_typer(data_app, name="data")

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Config fields to change: field.subfield=value.")
]


@app.command()
def info(
    config: Annotated[str, typer.Argument(help="A config file, config.json or model folder.")],
    overrides: Overrides = None,
    length: Annotated[int, typer.Option(help="Tokens of a training sequence.")] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Prints a model's size, cache and FLOPs."""
    from dsjax.counts import describe

    figures = describe(load_model_config(config, overrides or ()), length)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", box=None)
    for name, value in figures.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)


@app.command()
def train(
    config: Annotated[str, typer.Argument(help="A run's config file, configs/runs/….py.")],
    overrides: Overrides = None,
) -> None:
    """Trains a model; run again to go on from the last complete checkpoint."""
    from dsjax.processes import initialize_processes
    from dsjax.training.loop import fit

    run = load_train_config(config, overrides or ())
    initialize_processes()
    result = fit(run)
    if result.bits_per_byte is not None:
        print(f"held-out bits per byte: {result.bits_per_byte:.4f}")
    print(
        f"{run.directory}: step {result.step}{'' if result.finished else ', stopped by a signal'}"
    )


@app.command()
def generate(
    checkpoint: Annotated[str, typer.Argument(help="Model folder, training run or Hub name.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text to continue; repeatable.")],
    chat: Annotated[bool, typer.Option(help="Apply the chat template to the prompt.")] = False,
    system: Annotated[str, typer.Option(help="System message, with --chat.")] = "",
    max_tokens: Annotated[int, typer.Option(help="Tokens generated at most.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 takes the best token.")] = 0.0,
    top_k: Annotated[int, typer.Option(help="Keep the best so many tokens; 0 keeps all.")] = 0,
    top_p: Annotated[float, typer.Option(help="Keep the best tokens of this probability.")] = 1.0,
    seed: Annotated[int, typer.Option(help="Of the draws.")] = 0,
    stop: Annotated[list[str] | None, typer.Option(help="String that ends a text.")] = None,
    dtype: Annotated[str, typer.Option(help="bfloat16 or float32.")] = "bfloat16",
) -> None:
    """Continues prompts, streamed to the terminal."""
    from dsjax.api import load

    model = load(checkpoint, dtype=dtype)  # type: ignore[arg-type]
    prompts: list[Any] = list(prompt)
    if chat:
        before = [{"role": "system", "content": system}] if system else []
        prompts = [[*before, {"role": "user", "content": text}] for text in prompt]

    def show(index: int, text: str) -> None:
        if len(prompts) == 1:  # several at once would be mixed up on the terminal
            print(text, end="", flush=True)

    texts = model.generate(
        prompts,
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        seed=seed,
        stop=stop or (),
        on_text=show,
    )
    if len(texts) == 1:
        print()
        return
    for text, answer in zip(prompt, texts, strict=True):
        print(f"--- {text!r}\n{answer}")


@app.command()
def convert(
    source: Annotated[str, typer.Argument(help="Hugging Face folder or Hub name, or ours.")],
    destination: Annotated[str, typer.Argument(help="Folder to make.")],
    dtype: Annotated[str | None, typer.Option(help="Of the result; default as stored.")] = None,
) -> None:
    """Converts a checkpoint from Hugging Face to ours, or from ours to Hugging Face."""
    from dsjax.weights.convert import convert as run

    run(source, destination, dtype=dtype)


@data_app.command()
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


@app.command()
def check(
    config: Annotated[str, typer.Argument(help="A config file.")], overrides: Overrides = None
) -> None:
    """Loads a config, applies overrides, and prints what it comes to."""
    from rich.pretty import pprint

    loaded: ModelConfig | TrainConfig = load_config(config, overrides or ())
    pprint(loaded)


def main() -> None:
    """Runs the command line; what a user can mend is one line, not a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    for name in ("orbax", "jax", "httpx", "tensorstore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # orbax logs a failed save with its traceback, from its threads, and then raises it: the one
    # line below is what a user needs of it.
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    if not os.environ.get("DSJAX_TRACEBACK"):
        sys.unraisablehook = lambda _: None  # what those threads leave behind
    sys.path.insert(0, str(Path.cwd()))  # configs/ of the checkout, where run from it
    try:
        app()
    except (ValueError, OSError, ImportError, RuntimeError) as error:
        if os.environ.get("DSJAX_TRACEBACK"):
            raise
        first, *rest = str(error).strip().splitlines() or [type(error).__name__]
        more = " (DSJAX_TRACEBACK=1 shows all of it)" if rest else ""
        print(f"error: {first}{more}", file=sys.stderr)
        sys.exit(2)
