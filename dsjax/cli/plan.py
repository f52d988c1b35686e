"""`dsjax plan`."""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from typing import Annotated, Any, Literal

import typer

from dsjax.cli.arguments import Overrides, Quantize
from dsjax.config import EngineConfig, MeshConfig, TrainConfig
from dsjax.config.load import load_model_and_runtime, load_recipe, load_train_config, override

Use = Literal["train", "prefill", "decode"]


def plan(
    config: Annotated[
        str, typer.Argument(help="A run's name or its file; for prefill and decode also a model's.")
    ],
    overrides: Overrides = None,
    topology: Annotated[
        str,
        typer.Option(
            help="One slice of the pod by libtpu's name, like v5p:4x4x4; or cards, like h100:8."
        ),
    ] = "v5p:4x4x4",
    slices: Annotated[int, typer.Option(help="Slices that DCN joins.", min=1)] = 1,
    use: Annotated[Use, typer.Option("--for", help="Which step: of a run, or of the engine.")] = (
        "train"
    ),
    mesh: Annotated[
        list[str] | None,
        typer.Option(help="AXIS=DEVICES for the engine, such as expert=8; else experts divided."),
    ] = None,
    engine: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=VALUE of EngineConfig, such as max_batch=128 or max_length=4096."),
    ] = None,
    quantize: Quantize = None,
    search: Annotated[
        int | None,
        typer.Option(
            help="Try so many variants of a run's mesh, rows, remat and exchange; each compiles.",
            min=1,
        ),
    ] = None,
    picture: Annotated[str | None, typer.Option(help="Also write a PNG there.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Compiles a step for a TPU pod or cards that are not here.

    Prints memory, FLOPs, bytes sent and, of TPUs, a modelled time of a chip; for the engine also
    the tokens that its cache holds. Needs the extra tpu (libtpu) or cuda, no TPU and no card.
    """
    if picture is not None and not picture.endswith(".png"):  # said before minutes of compiling
        raise ValueError(f"picture {picture!r}: must end in .png")
    if use == "train":
        given = {"mesh": mesh, "engine": engine, "quantize": quantize}
        name = next((name for name, value in given.items() if value), None)
        if name is not None:
            raise ValueError(f"--{name}: is of the engine, so with --for prefill or decode")
        run = load_train_config(config, overrides or ())
        from dsjax.plan.cards import is_cards, plan_on_cards
        from dsjax.plan.plan import plan_training

        if is_cards(topology):
            if search is not None or slices > 1:
                option = "--slices" if search is None else "--search"
                raise ValueError(f"{option}: is of TPUs, so not with --topology {topology}")
            figures = plan_on_cards(run, topology)
        elif search is not None:
            _search(run, topology, slices, search, picture, as_json)
            return
        else:
            figures = plan_training(run, topology, slices)
    else:
        if search is not None:
            raise ValueError(f"--search: is of a run's step, so not with --for {use}")
        figures = _serving(
            config, overrides or (), topology, slices, use, mesh or (), engine or (), quantize
        )
    if picture is not None:
        from dsjax.plan.picture import draw_plan

        draw_plan(figures, picture)
    if as_json:
        print(json.dumps(figures, indent=2))
    else:
        _print(figures)


def _search(
    run: TrainConfig, topology: str, slices: int, most: int, picture: str | None, as_json: bool
) -> None:
    """Says each trial as it ends on standard error, then the ranking."""
    from dsjax.plan.plan import plan_training
    from dsjax.plan.search import ranked, search
    from dsjax.plan.topology import tpu_devices

    if picture is not None:
        raise ValueError("--picture: draws one plan, so not with --search")
    chips = len(tpu_devices(topology, slices))
    trials = []
    for trial in search(run, chips, most, lambda each: plan_training(each, topology, slices)):
        trials.append(trial)
        print(f"{len(trials)} of at most {most}: {trial}", file=sys.stderr, flush=True)
    best = ranked(trials)
    if not best:
        raise ValueError(f"none of {len(trials)} trials fits {topology}; the last: {trials[-1]}")
    if as_json:
        found = [{"changes": list(each.changes), **(each.figures or {})} for each in best]
        print(json.dumps(found, indent=2))
        return
    for place, trial in enumerate(best, 1):
        print(f"{place}. {trial}")


def _serving(
    config: str,
    overrides: Sequence[str],
    topology: str,
    slices: int,
    use: Literal["prefill", "decode"],
    mesh: Sequence[str],
    engine: Sequence[str],
    quantize: str | None,
) -> dict[str, Any]:
    """Plans a step of the engine: parameters in the type of computation, as `load` has them."""
    model, runtime = load_model_and_runtime(config, overrides)
    recipe = runtime.quantisation if quantize is None else load_recipe(quantize)
    runtime = dataclasses.replace(runtime, param_dtype=runtime.dtype, quantisation=recipe)
    axes = override(MeshConfig(fsdp=1), mesh) if mesh else None
    sizes = override(EngineConfig(), engine)
    from dsjax.plan.serving import plan_serving

    return plan_serving(model, runtime, sizes, topology, use, mesh=axes, num_slices=slices)


def _print(figures: dict[str, Any]) -> None:
    for name, value in figures.items():
        if name.endswith("_bytes"):
            print(f"{name:28} {value / 2**30:.2f} GiB")
        elif name == "collectives":
            for kind, use in value.items():
                seconds = f", {use['seconds']:.4f} s" if "seconds" in use else ""
                print(
                    f"  {kind:40} {use['executions']:6} times, "
                    f"{use['expected_bytes'] / 2**30:9.3f} GiB{seconds}"
                )
        elif name == "assumptions":
            print("assumptions")
            for figure, entry in value.items():
                print(f"  {figure:24} {entry['value']:<10.4g} {entry['source']}")
        elif isinstance(value, int) and not isinstance(value, bool):
            print(f"{name:28} {value:,}")
        else:
            print(f"{name:28} {f'{value:.4g}' if isinstance(value, float) else value}")
