"""`dsjax generate`."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from dsjax.cli.arguments import DType, Verbose
from dsjax.config import KernelConfig
from dsjax.config.load import override


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
    step: Annotated[int | None, typer.Option(help="Of a training run, else the newest.")] = None,
    dtype: Annotated[DType, typer.Option(help="Of parameters and computation.")] = "bfloat16",
    kernels: Annotated[
        list[str] | None, typer.Option(help="OP=IMPLEMENTATION, such as mla_decode=xla.")
    ] = None,
    verbose: Verbose = False,
) -> None:
    """Continues prompts, streamed to the terminal."""
    named = override(KernelConfig(), kernels or ())
    if system and not chat:
        raise ValueError("--system needs --chat: only a chat has a system message")
    from dsjax.inference.sampler import Sampling

    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "stop": stop or (),
    }
    Sampling(**options)  # what is wrong with them is said before minutes of reading weights
    from dsjax.api import load

    model = load(checkpoint, dtype=dtype, kernels=named, step=step)
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
        return
    for text, answer in zip(prompt, texts, strict=True):
        print(f"--- {text!r}\n{answer}")
