"""Generating from a batch of prompts: one prefill, then a token a step from the latent cache."""

from __future__ import annotations

import dataclasses
import functools
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.cache import LatentPool, Part, View, allocate_pool
from dsjax.data.tokenizer import Tokenizer
from dsjax.inference.sampler import Sampling, SamplingArrays, sample
from dsjax.inference.text import TextStream
from dsjax.kernels import PAGE_SIZE
from dsjax.model import DeepSeekV2


@dataclass(frozen=True)
class Generation:
    """What one prompt gave.

    Attributes:
        text: the generated text, without end token and stop string.
        tokens: the generated ids, the end token included.
        finish: "stop", "length", or "error" where the logits were NaN or infinite.
    """

    text: str
    tokens: tuple[int, ...]
    finish: str


def generate(
    model: DeepSeekV2,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    sampling: Sampling | Sequence[Sampling],
    on_text: Callable[[int, str], None] | None = None,
) -> list[Generation]:
    """Continues prompts; each gets what it would get alone.

    Args:
        model: the model.
        tokenizer: decodes tokens and knows the one that ends a text.
        prompts: token ids, BOS included.
        sampling: how, for all prompts or for each.
        on_text: called with a prompt's index and each piece of text as soon as it is certain.

    Raises:
        ValueError: an empty prompt, or one that leaves no room in the model's context.
    """
    samplings = [sampling] * len(prompts) if isinstance(sampling, Sampling) else list(sampling)
    if len(samplings) != len(prompts):
        raise ValueError(f"sampling: {len(samplings)} given for {len(prompts)} prompts")
    if not prompts:
        return []
    limits = [_room(model, i, prompt, samplings[i]) for i, prompt in enumerate(prompts)]
    streams = [
        TextStream(tokenizer, s.stop, limit) for s, limit in zip(samplings, limits, strict=True)
    ]
    tokens: list[list[int]] = [[] for _ in prompts]

    graphdef, state = nnx.split(model)
    padded_BT, lengths_B = _pad(prompts)
    # A sequence that has ended goes on being decoded with the others, so all need this much.
    longest = int(lengths_B.max()) + max(limits)
    pool, table_BP = _room_for(model, len(prompts), _round_up(longest, 256))
    prompt = Part(
        table_BP,
        jnp.zeros(len(prompts), jnp.int32),
        jnp.asarray(lengths_B),
        num_tokens=padded_BT.shape[1],
        is_first=True,
    )
    arrays = SamplingArrays.of(samplings)
    num_ids = jnp.int32(tokenizer.vocab_size)
    newest_B, pool, part = _step(
        graphdef,
        state,
        jnp.asarray(padded_BT.reshape(-1)),
        pool,
        prompt,
        arrays,
        jnp.int32(0),
        num_ids,
    )
    ones_B = jnp.ones_like(part.num_new_B)
    part = dataclasses.replace(part, num_new_B=ones_B, num_tokens=1, is_first=False)
    for index in range(max(limits)):
        following_B = newest_B
        if index + 1 < max(limits):
            # The next step is under way before this step's tokens are looked at.
            following_B, pool, part = _step(
                graphdef, state, newest_B, pool, part, arrays, jnp.int32(index + 1), num_ids
            )
        for i, token in enumerate(np.asarray(newest_B)):
            if streams[i].finish is None:
                if token < 0:
                    warnings.warn(
                        f"prompt {i}: stopped after {len(tokens[i])} tokens: "
                        "the model's logits are NaN or infinite",
                        stacklevel=2,
                    )
                    piece = streams[i].fail()
                else:
                    tokens[i].append(int(token))
                    piece = streams[i].feed(int(token))
                if piece and on_text is not None:
                    on_text(i, piece)
        if all(stream.finish is not None for stream in streams):
            break
        newest_B = following_B
    return [
        Generation(stream.text, tuple(ids), stream.finish or "length")
        for stream, ids in zip(streams, tokens, strict=True)
    ]


def _room(model: DeepSeekV2, index: int, prompt: Sequence[int], sampling: Sampling) -> int:
    """Returns how many tokens a prompt may get."""
    if len(prompt) == 0:
        raise ValueError(f"prompt {index}: is empty")
    room = model.config.max_length - len(prompt)
    if room < 1:
        raise ValueError(
            f"prompt {index}: its {len(prompt)} tokens leave no room in "
            f"model.max_length={model.config.max_length}"
        )
    vocab_size = model.config.vocab_size
    for token in prompt:
        if not 0 <= token < vocab_size:
            raise ValueError(
                f"prompt {index}: token {token} is outside model.vocab_size={vocab_size}"
            )
    return min(room, sampling.max_tokens)


def _pad(prompts: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Pads prompts at the end, to a length that few compilations cover."""
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    padded_BT = np.zeros((len(prompts), _round_up(int(lengths_B.max()), 64)), np.int32)
    for row, prompt in zip(padded_BT, prompts, strict=True):
        row[: len(prompt)] = prompt
    return padded_BT, lengths_B


def _round_up(size: int, step: int) -> int:
    return -(-size // step) * step


def _room_for(model: DeepSeekV2, batch_size: int, length: int) -> tuple[LatentPool, jax.Array]:
    """Allocates a pool for sequences of a length, and gives each its pages of it."""
    options = model.options
    pages = -(-length // PAGE_SIZE)
    pool = allocate_pool(
        model.config,
        batch_size * pages,
        options.dtype,
        page_size=PAGE_SIZE,
        decode_kernel=options.kernels.mla_decode,
    )
    return pool, jnp.arange(batch_size * pages, dtype=jnp.int32).reshape(batch_size, pages)


@functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
def _step(
    graphdef: nnx.GraphDef[DeepSeekV2],
    state: nnx.State,
    tokens_T: jax.Array,
    pool: LatentPool,
    part: Part,
    sampling: SamplingArrays,
    index: jax.Array,
    num_ids: jax.Array,
) -> tuple[jax.Array, LatentPool, Part]:
    """Reads a part; returns each sequence's next token, the pool, and the part moved on."""
    first_B = jnp.arange(part.num_sequences) * part.num_tokens
    last_B = first_B + part.num_new_B - 1
    model = nnx.merge(graphdef, state)
    # A sequence without a next token (-1) is still decoded with the others.
    logits_BW, pool = model.extend(jnp.maximum(tokens_T, 0), pool, View((part,)), last_B)
    return sample(logits_BW, sampling, index, num_ids), pool, part.advanced()
