"""`dsjax plan`."""

from __future__ import annotations

import json
from typing import Annotated, Any

import typer

from dsjax.cli.arguments import Overrides
from dsjax.config.load import load_train_config


def plan(
    config: Annotated[str, typer.Argument(help="A run's name or its file.")],
    overrides: Overrides = None,
    topology: Annotated[
        str, typer.Option(help="One slice of the pod by libtpu's name, like v5p:4x4x4.")
    ] = "v5p:4x4x4",
    slices: Annotated[int, typer.Option(help="Slices that DCN joins.", min=1)] = 1,
    picture: Annotated[str | None, typer.Option(help="Also write a PNG there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compiles a run's training step for a TPU pod that is not here: memory, FLOPs, time."""
    run = load_train_config(config, overrides or ())
    if picture is not None and not picture.endswith(".png"):  # said before minutes of compiling
        raise ValueError(f"picture {picture!r}: must end in .png")
    from dsjax.plan.plan import plan_training

    figures = plan_training(run, topology, slices)
    if picture is not None:
        from dsjax.plan.picture import draw_plan

        draw_plan(figures, picture)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        _print(figures)


def _print(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if name.endswith("_bytes"):
            print(f"{name:28} {value / 2**30:.2f} GiB")
        elif name == "collectives":
            for kind, use in value.items():
                print(
                    f"  {kind:40} {use['executions']:6} times, "
                    f"{use['expected_bytes'] / 2**30:9.3f} GiB, {use['seconds']:.4f} s"
                )
        elif name == "assumptions":
            print("assumptions")
            for figure, entry in value.items():
                print(f"  {figure:24} {entry['value']:<10.4g} {entry['source']}")
        else:
            print(f"{name:28} {f'{value:.4g}' if isinstance(value, float) else value}")
