"""`dsjax chat`."""

from __future__ import annotations

from typing import Annotated

import typer

from dsjax.cli.arguments import (
    CacheDType,
    DeviceMemory,
    Kernels,
    MinP,
    ModelDType,
    Quantize,
    Seed,
    Step,
    Stop,
    Temperature,
    TopK,
    TopP,
    Verbose,
    sampling_options,
    say_traffic,
)
from dsjax.config import EngineConfig, KernelConfig
from dsjax.config.load import override

# Where the user does not say: released models have room for 163,840 tokens, gigabytes of latents.
_USUAL_LENGTH = 16_384
_PAGE = EngineConfig().page_size


def chat(
    checkpoint: Annotated[str, typer.Argument(help="Model folder, training run or Hub name.")],
    system: Annotated[str, typer.Option(help="System message.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens of an answer at most; else the model's, or all room.")
    ] = None,
    max_model_len: Annotated[
        int | None,
        typer.Option(
            help=f"Tokens of all that is said; else the model's, {_USUAL_LENGTH} at most."
        ),
    ] = None,
    temperature: Temperature = None,
    top_k: TopK = None,
    top_p: TopP = None,
    min_p: MinP = None,
    seed: Seed = 0,
    stop: Stop = None,
    step: Step = None,
    dtype: ModelDType = "bfloat16",
    quantize: Quantize = None,
    latent_dtype: CacheDType = None,
    device_memory: DeviceMemory = None,
    kernels: Kernels = None,
    verbose: Verbose = False,
) -> None:
    """Talks with a model on the terminal: /help says how."""
    named = override(KernelConfig(), kernels or ())
    options = sampling_options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )
    # One conversation: a step has one sequence, and room for a short message or a long one.
    sizes = EngineConfig(
        max_batch=1,
        batch_sizes=(1,),
        chunks=((1, 64), (1, 1024)),
        max_length=max_model_len,
        prompt_logprobs=False,
        warm_up=False,  # the first answer waits for what it needs, and for no more
    )
    from dataclasses import replace

    from rich.console import Console

    from dsjax.api import load
    from dsjax.cli.terminal import Terminal, make_reader
    from dsjax.engine import Engine
    from dsjax.engine.sizes import fitting_pages
    from dsjax.serving.dialogue import Dialogue
    from dsjax.weights.load_save import locate

    found = locate(checkpoint, step)
    if found.tokenizer is None:  # said before minutes of reading weights
        raise ValueError(f"{found.path}: holds no tokenizer.json, so there is no chat with it")
    model = load(
        checkpoint,
        dtype=dtype,
        kernels=named,
        step=step,
        quantize=quantize,
        latent_dtype=latent_dtype,
        device_memory=device_memory,
    )
    assert model.tokenizer is not None
    length = max_model_len or min(model.config.max_length, _USUAL_LENGTH)
    sizes = replace(sizes, max_length=length)
    sizes = replace(sizes, num_pages=fitting_pages(model, sizes, -(-length // _PAGE)))
    defaults = model.generation_defaults
    with Engine(model, model.tokenizer, sizes, end_ids=defaults.eos_ids) as engine:
        dialogue = Dialogue(engine, defaults, system, **options)
        Terminal(dialogue, make_reader(), Console(), Console(stderr=True)).run()
    say_traffic(model)
