"""Arguments that several commands take."""

from __future__ import annotations

import logging
import sys
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from dsjax.config.engine import memory_bytes
from dsjax.config.runtime import LatentDType

Overrides = Annotated[
    list[str] | None, typer.Argument(help="Config fields to change: field.subfield=value.")
]
DType = Literal["bfloat16", "float32"]
ModelDType = Annotated[DType, typer.Option(help="Of parameters and computation.")]
Step = Annotated[int | None, typer.Option(help="Of a training run, else the newest.")]
Quantize = Annotated[
    str | None,
    typer.Option(help="int8, fp8 or int4, or a recipe's file: weights in fewer bits."),
]
CacheDType = Annotated[
    LatentDType | None,
    typer.Option(help="Cached latents in 8 bits: nearly twice the context. Not on TPUs."),
]
Kernels = Annotated[
    list[str] | None, typer.Option(help="OP=IMPLEMENTATION, such as mla_decode=xla.")
]


def _check_size(size: str | None) -> str | None:
    """Says what is wrong with a size before anything is read."""
    if size is not None:
        memory_bytes(size)
    return size


DeviceMemory = Annotated[
    str | None,
    typer.Option(
        help="What the model may take, as 16GiB; experts that do not fit stay in host memory.",
        callback=_check_size,
    ),
]

# How tokens are chosen.
Temperature = Annotated[
    float | None, typer.Option(help="0 takes the best token; else the model's, or 0.")
]
TopK = Annotated[int | None, typer.Option(help="Keep the best so many; 0 keeps all.")]
TopP = Annotated[float | None, typer.Option(help="Keep the best tokens of this probability.")]
MinP = Annotated[
    float | None, typer.Option(help="Keep tokens of this share of the best one's probability.")
]
Seed = Annotated[int, typer.Option(help="Of the draws.")]
Stop = Annotated[list[str] | None, typer.Option(help="String that ends a text.")]

if TYPE_CHECKING:
    from dsjax.model import DeepSeekV2

_DETAILS = ("dsjax.kernels",)  # what only -v shows, of their lines that are no warnings


def _show_details(verbose: bool) -> bool:
    for name in _DETAILS:
        logging.getLogger(name).setLevel(logging.INFO if verbose else logging.WARNING)
    return verbose


Verbose = Annotated[
    bool,
    typer.Option("--verbose", "-v", help="Also say which kernels run.", callback=_show_details),
]


def sampling_options(*, stop: list[str] | None, **options: Any) -> dict[str, Any]:
    """Returns how tokens are chosen, as far as the command line says.

    Raises:
        ValueError: an option is wrong, which is said before minutes of reading weights.
    """
    from dsjax.inference.sampling import Sampling

    options["stop"] = tuple(stop or ())
    said = {name: value for name, value in options.items() if value is not None}
    Sampling(**said)
    return said


def say_traffic(model: DeepSeekV2) -> None:
    """Says on standard error what was copied of experts in the host's memory, if any are there."""
    from dsjax.weights.host_experts import host_experts_of

    if (experts := host_experts_of(model)) is not None:
        print(experts.traffic, file=sys.stderr)
