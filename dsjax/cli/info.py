"""`dsjax info` and `dsjax check`: what a config comes to, and whether files are whole."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from dsjax.cli.arguments import CacheDType, DeviceMemory, Overrides, Quantize
from dsjax.config import ModelConfig
from dsjax.config.engine import memory_bytes
from dsjax.config.load import load_config, load_recipe, named_configs, override
from dsjax.config.runtime import LatentDType
from dsjax.families import find_model_config

_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def info(
    config: Annotated[
        str, typer.Argument(help="A config's name or file, or a model as for generate.")
    ],
    overrides: Overrides = None,
    length: Annotated[int, typer.Option(help="Tokens of a training sequence.", min=1)] = 4096,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    quantize: Quantize = None,
    latent_dtype: CacheDType = None,
    device_memory: DeviceMemory = None,
    link: Annotated[
        float,
        typer.Option(help="GB/s from the host's memory: 25 by PCIe 4, 50 by PCIe 5.", min=0.1),
    ] = 25.0,
) -> None:
    """Prints a model's size, cache and FLOPs, and where weights lie."""
    from dsjax.counts import describe

    model = _model_config(config, overrides or ())
    figures = describe(model, length)
    if any(given is not None for given in (quantize, latent_dtype, device_memory)):
        figures |= _figures_of_fit(model, quantize, latent_dtype, device_memory, link)
    if as_json:
        print(json.dumps(figures, indent=2))
        return
    from rich.console import Console
    from rich.table import Table

    table = Table("figure", "value", box=None)
    for name, value in figures.items():
        table.add_row(name, f"{value:,}" if isinstance(value, int) else f"{value:.4f}")
    Console().print(table)


def _figures_of_fit(
    model: ModelConfig,
    quantize: str | None,
    latent_dtype: LatentDType | None,
    device_memory: str | None,
    link: float,
) -> dict[str, float]:
    """Returns where the weights lie, what a token reads of them, and what the link allows."""
    from dsjax.cache import full_bytes_per_token
    from dsjax.engine.fit import fit

    memory = None if device_memory is None else memory_bytes(device_memory)
    recipe = None if quantize is None else load_recipe(quantize)
    found = fit(model, recipe, memory, latent_dtype=latent_dtype)
    figures: dict[str, float] = {
        "latent_cache_bytes_per_token": found.latents_per_token,
        "cache_saving": 1 - found.latents_per_token / full_bytes_per_token(model),
        "weight_bytes": found.weights,
        "read_bytes_per_token": found.read_per_token,
    }
    if found.context_tokens is not None:
        figures |= {
            "device_weight_bytes": found.device_weights,
            "host_expert_bytes": found.host_experts,
            "context_tokens": found.context_tokens,
        }
    if found.host_experts:
        figures |= {
            "experts_kept_on_device": found.device_experts,
            "link_bytes_per_token": found.link_per_token,
            "link_tokens_per_second": link * 1e9 / found.link_per_token,
        }
    return figures


def _model_config(name: str, overrides: Sequence[str]) -> ModelConfig:
    path = Path(name).expanduser()
    ours_or_json = name in named_configs() or path.is_file() or (path / "config.json").is_file()
    if ours_or_json or not (path.exists() or _HUB_NAME.fullmatch(name)):
        return find_model_config(name, overrides)
    # Only here, so that a config's figures need not wait for what checkpoints import.
    from dsjax.weights.sources import describe

    if path.exists():
        return override(describe(path)[0], overrides)
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:  # the config alone: the weights can be hundreds of gigabytes
        file = huggingface_hub.hf_hub_download(name, "config.json")
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name}: no such config or folder, and not to be had from the Hugging Face Hub: "
            f"{first_line}"
        ) from None
    return find_model_config(file, overrides)


def check(
    config: Annotated[
        str, typer.Argument(help="A config's name or file; a model's folder or a run's.")
    ],
    overrides: Overrides = None,
) -> None:
    """Prints a config, or reads a model or a run and names faults.

    Of a folder all is read: checksums, NaN, small files. The status is 1 where there is a fault.
    """
    path = Path(config).expanduser()
    if config not in named_configs() and path.is_dir():
        _check_files(path, overrides or ())
        return
    from rich.pretty import pprint

    pprint(load_config(config, overrides or ()))


def _check_files(path: Path, overrides: Sequence[str]) -> None:
    if overrides:
        raise ValueError(f"{overrides[0]}: {path} is a folder: only a config takes other fields")
    from dsjax.weights.check import faults_of

    count = 0
    for fault in faults_of(path):
        print(fault, flush=True)
        count += 1
    if count:
        raise typer.Exit(1)
    print(f"{path}: all was read; no fault")
