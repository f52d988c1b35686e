"""Texts for some prompts, by an engine that is made for them and no larger."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace

from dsjax.config import EngineConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.engine.engine import Engine
from dsjax.engine.request import (
    Event,
    Generation,
    Request,
    TextPiece,
    TokenMask,
    fault_of_prompt,
)
from dsjax.engine.sizes import fitting_pages, page_tokens
from dsjax.inference.sampling import Sampling
from dsjax.model import DeepSeekV2

# Sizes are rounded, so that other prompts need no other programs.
_MAX_BATCH = 64
_MIN_CHUNK, _MAX_CHUNK = 64, 2048
_LENGTH_STEP = 256


def generate(
    model: DeepSeekV2,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    on_text: Callable[[int, str], None] | None = None,
    *,
    samples: Sequence[int] | None = None,
    masks: Sequence[TokenMask | None] | None = None,
    end_ids: Iterable[int] | None = None,
) -> list[Generation]:
    """Continues prompts; each gets what it would get alone.

    That holds to the last bit of a logit only where the shapes of the computation are the same,
    and to rounding elsewhere: in float32 a token is another one only where two were equally good,
    in bfloat16 where two were nearly so. On a CPU that was one token in 128 of a random model,
    which has many near ties, and none in 4,096 of a small trained one (BENCHMARKS.md).

    Args:
        model: the model.
        tokenizer: decodes tokens and knows the one that ends a text.
        prompts: token ids, BOS included.
        sampling: how, for all prompts or for each.
        on_text: called with a prompt's index and each piece of text as soon as it is certain.
        samples: number of each text among those of one prompt and seed; None numbers all 0.
        masks: which tokens may come in each text, as a grammar says; None allows all.
        end_ids: tokens that end a text; None takes the tokenizer's EOS.

    Raises:
        ValueError: an empty prompt, or one that leaves no room in the model's context.
    """
    if not isinstance(sampling, Sampling) and len(sampling) != len(prompts):
        raise ValueError(f"sampling: {len(sampling)} given for {len(prompts)} prompts")
    if not prompts:
        return []
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else sampling
    numbers = samples or [0] * len(prompts)
    requests = [
        _request(model, *one)
        for one in zip(range(len(prompts)), prompts, samplings, numbers, strict=True)
    ]
    if masks is not None:
        pairs = zip(requests, masks, strict=True)
        requests = [replace(request, mask=mask) for request, mask in pairs]

    def take(index: int, event: Event) -> None:
        if on_text is not None and isinstance(event, TextPiece) and event.text:
            on_text(index, event.text)

    config = engine_config(model, requests)
    with Engine(model, tokenizer, config, end_ids=end_ids) as engine:
        found = engine.generate(requests, take)
    for index, one in enumerate(found):
        if one.finish == "error":
            text = f"prompt {index}: stopped after {len(one.tokens)} tokens: {one.error}"
            warnings.warn(text, stacklevel=2)
    return found


def stream(
    model: DeepSeekV2,
    tokenizer: Tokenizer,
    prompt: Sequence[int],
    sampling: Sampling,
    *,
    end_ids: Iterable[int] | None = None,
) -> Iterator[TextPiece]:
    """Continues one prompt, piece by piece as they come; see `generate`.

    Whoever stops iterating stops the generation.
    """
    request = _request(model, 0, prompt, sampling, 0)
    config = engine_config(model, [request])

    def pieces() -> Iterator[TextPiece]:
        with Engine(model, tokenizer, config, end_ids=end_ids) as engine:
            yield from engine.submit(request)

    return pieces()


def engine_config(model: DeepSeekV2, requests: Sequence[Request]) -> EngineConfig:
    """Returns the sizes of an engine for these requests, of which few differ."""
    lengths = sorted((len(r.prompt) + r.sampling.max_tokens for r in requests), reverse=True)
    prompts = sorted(len(r.prompt) for r in requests)
    batch = min(_power_of_two(len(requests)), _MAX_BATCH)
    longest = _power_of_two(min(max(prompts[-1], _MIN_CHUNK), _MAX_CHUNK))
    usual = _power_of_two(min(max(prompts[len(prompts) // 2], _MIN_CHUNK), longest))
    together = min(batch, max(1, _MAX_CHUNK // usual))
    config = EngineConfig(
        max_batch=batch,
        batch_sizes=(batch,),
        chunks=tuple(dict.fromkeys(((1, longest), (together, usual)))),
        max_length=min(-(-lengths[0] // _LENGTH_STEP) * _LENGTH_STEP, model.config.max_length),
        warm_up=False,
    )
    page_size = page_tokens(model, config)
    pages = _power_of_two(sum(-(-length // page_size) for length in lengths[:batch]))
    return replace(config, num_pages=fitting_pages(model, config, pages))


def _power_of_two(size: int) -> int:
    return 1 << max(0, size - 1).bit_length()


def _request(
    model: DeepSeekV2, index: int, prompt: Sequence[int], sampling: Sampling, sample: int
) -> Request:
    """Returns a prompt's request, with no more tokens than the model's context has room for."""
    if (fault := fault_of_prompt(prompt, model.config.vocab_size)) is not None:
        raise ValueError(f"prompt {index}: {fault}")
    room = model.config.max_length - len(prompt)
    if room < 1:
        raise ValueError(
            f"prompt {index}: its {len(prompt)} tokens leave no room in "
            f"model.max_length={model.config.max_length}"
        )
    sampling = replace(sampling, max_tokens=min(room, sampling.max_tokens))
    return Request(tuple(int(token) for token in prompt), sampling, sample)
