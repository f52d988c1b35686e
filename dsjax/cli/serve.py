"""`dsjax serve`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer

from dsjax.cli.arguments import (
    CacheDType,
    DeviceMemory,
    Kernels,
    ModelDType,
    Quantize,
    Step,
    Verbose,
    say_traffic,
)
from dsjax.config import EngineConfig, KernelConfig, MeshConfig, ServeConfig
from dsjax.config.load import override

_KEY_VARIABLE = "DSJAX_API_KEY"
_USUAL = ServeConfig()


def serve(
    checkpoint: Annotated[str, typer.Argument(help="Model folder, training run or Hub name.")],
    host: Annotated[str, typer.Option(help="Address to listen on.")] = _USUAL.host,
    port: Annotated[int, typer.Option(help="Port; 0 takes a free one.")] = _USUAL.port,
    api_key_file: Annotated[
        str | None,
        typer.Option(help=f"File of API keys, one a line; else {_KEY_VARIABLE}; else none needed."),
    ] = None,
    served_model_name: Annotated[
        list[str] | None, typer.Option(help="Name in requests; repeatable. Default: CHECKPOINT.")
    ] = None,
    max_model_len: Annotated[
        int | None, typer.Option(help="Tokens of prompt and text; else the model's.", min=1)
    ] = None,
    max_batch: Annotated[
        int, typer.Option(help="Texts made at once.", min=1)
    ] = EngineConfig().max_batch,
    memory_fraction: Annotated[
        float, typer.Option(help="Of the device's memory, for weights and latents.")
    ] = EngineConfig().memory_fraction,
    mesh: Annotated[
        list[str] | None, typer.Option(help="AXIS=DEVICES, such as tensor=2; repeatable.")
    ] = None,
    engine: Annotated[
        list[str] | None, typer.Option(help="FIELD=VALUE of EngineConfig; repeatable.")
    ] = None,
    limit: Annotated[
        list[str] | None,
        typer.Option(help="FIELD=VALUE of ServeConfig, such as max_open=256; repeatable."),
    ] = None,
    allow_origin: Annotated[
        list[str] | None, typer.Option(help="Web origin that may call (CORS); repeatable.")
    ] = None,
    log_prompts: Annotated[
        bool, typer.Option("--log-prompts", help="Log requests and texts too.")
    ] = False,
    step: Step = None,
    dtype: ModelDType = "bfloat16",
    quantize: Quantize = None,
    latent_dtype: CacheDType = None,
    device_memory: DeviceMemory = None,
    kernels: Kernels = None,
    verbose: Verbose = False,
) -> None:
    """Serves a model by OpenAI's API."""
    named = override(KernelConfig(), kernels or ())
    names = tuple(served_model_name or (Path(checkpoint).name or checkpoint,))
    config = ServeConfig(
        host=host,
        port=port,
        model_names=names,
        allowed_origins=tuple(allow_origin or ()),
        log_prompts=log_prompts,
    )
    config = override(config, limit or ())
    sizes = EngineConfig(
        max_batch=max_batch, max_length=max_model_len, memory_fraction=memory_fraction
    )
    sizes = override(sizes, engine or ())
    keys = _keys(api_key_file)
    try:
        from dsjax.serving.server import bind
        from dsjax.serving.server import serve as run
    except ModuleNotFoundError as error:
        raise ImportError(f"{error.name} is missing: pip install 'dsjax[serve]'") from None
    from dsjax.api import load
    from dsjax.engine import Engine
    from dsjax.mesh import make_mesh
    from dsjax.serving.gate import log_as_json

    bind(config).close()  # a taken port is said before minutes of reading weights
    axes = override(MeshConfig(fsdp=1), mesh) if mesh else None
    devices = None if axes is None else make_mesh(axes)
    model = load(
        checkpoint,
        dtype=dtype,
        mesh=devices,
        kernels=named,
        step=step,
        quantize=quantize,
        latent_dtype=latent_dtype,
        device_memory=device_memory,
    )
    if model.tokenizer is None:
        raise ValueError(f"{checkpoint}: holds no tokenizer.json, so text cannot be served")
    log_as_json()
    defaults = model.generation_defaults
    with Engine(model, model.tokenizer, sizes, end_ids=defaults.eos_ids) as made:
        run(made, config, defaults, keys)
    say_traffic(model)


def _keys(file: str | None) -> list[str]:
    """Returns the API keys of a file, or the environment's."""
    if file is None:
        given = os.environ.get(_KEY_VARIABLE)
        if given is not None and not given.strip():
            raise ValueError(f"{_KEY_VARIABLE}: is set and empty")
        return [] if given is None else [given.strip()]
    lines = Path(file).expanduser().read_text(encoding="utf-8").splitlines()
    keys = [line.strip() for line in lines]
    keys = [key for key in keys if key and not key.startswith("#")]
    if not keys:
        raise ValueError(f"--api-key-file {file}: holds no key")
    return keys
