"""`dsjax generate`."""

from __future__ import annotations

from typing import Annotated, Any

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
from dsjax.config import KernelConfig
from dsjax.config.load import override


def generate(
    checkpoint: Annotated[str, typer.Argument(help="Model folder, training run or Hub name.")],
    prompt: Annotated[list[str], typer.Option("--prompt", help="Text to continue; repeatable.")],
    chat: Annotated[bool, typer.Option(help="Apply the chat template to the prompt.")] = False,
    system: Annotated[str, typer.Option(help="System message, with --chat.")] = "",
    max_tokens: Annotated[
        int | None, typer.Option(help="Tokens generated at most; else the model's, or 128.")
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
    """Continues prompts, streamed to the terminal."""
    named = override(KernelConfig(), kernels or ())
    if system and not chat:
        raise ValueError("--system needs --chat: only a chat has a system message")
    options = sampling_options(
        max_tokens=max_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        seed=seed,
        stop=stop,
    )
    from dsjax.api import load

    model = load(
        checkpoint,
        dtype=dtype,
        kernels=named,
        step=step,
        quantize=quantize,
        latent_dtype=latent_dtype,
        device_memory=device_memory,
    )
    prompts: list[Any] = list(prompt)
    if chat:
        before = [{"role": "system", "content": system}] if system else []
        prompts = [[*before, {"role": "user", "content": text}] for text in prompt]

    def show(index: int, text: str) -> None:
        if len(prompts) == 1:  # several at once would be mixed up on the terminal
            print(text, end="", flush=True)

    texts = model.generate(prompts, **options, on_text=show)
    if len(texts) == 1:
        print()
    say_traffic(model)
    if len(texts) == 1:
        return
    for text, answer in zip(prompt, texts, strict=True):
        print(f"--- {text!r}\n{answer}")
