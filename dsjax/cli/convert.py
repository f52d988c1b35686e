"""`dsjax convert`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsjax.cli.arguments import DType, Step


def convert(
    source: Annotated[
        str, typer.Argument(help="Hugging Face folder, Hub name, or checkpoint or run of ours.")
    ],
    destination: Annotated[str, typer.Argument(help="Folder to make.")],
    dtype: Annotated[DType | None, typer.Option(help="Of the result; default as stored.")] = None,
    step: Step = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            help="int8, fp8 or int4, or a recipe's file: ours, with weights in fewer bits."
        ),
    ] = None,
    calibrate: Annotated[
        str | None,
        typer.Option(
            metavar="TEXT",
            help="With int4: a file or folder of text, by which its numbers are searched for.",
        ),
    ] = None,
    ema: Annotated[
        bool, typer.Option("--ema", help="Of a training run: the moving average of its weights.")
    ] = False,
    allow_nonfinite: Annotated[
        bool, typer.Option("--allow-nonfinite", help="Convert NaN and infinite weights too.")
    ] = False,
) -> None:
    """Converts a checkpoint from Hugging Face to ours, or back."""
    from dsjax.weights.convert import convert as run

    run(
        source,
        destination,
        dtype=dtype,
        step=step,
        allow_nonfinite=allow_nonfinite,
        quantize=quantize,
        calibrate=calibrate,
        ema=ema,
    )
