"""What a caller may give as a prompt, and its token ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.data.tokenizer import Tokenizer


def encode_prompt(
    tokenizer: Tokenizer, prompt: Any, chat: bool, parse_special: bool | None
) -> list[int]:
    """Returns the ids of a prompt; see `LanguageModel.generate` for what it may be.

    Args:
        tokenizer: of the model.
        prompt: a text, ids or a conversation.
        chat: whether a text is a user's message.
        parse_special: whether special tokens in it become their ids; None: in a text they do.
    """
    if _is_ids(prompt):
        return [int(token) for token in prompt]
    if isinstance(prompt, str) and chat:
        prompt = [{"role": "user", "content": prompt}]
    if not isinstance(prompt, str):
        return tokenizer.encode_chat(prompt, parse_special=bool(parse_special))
    return tokenizer.encode_prompt(prompt, parse_special=parse_special is not False)


def check_tokens(tokens: Any, vocab_size: int) -> None:
    """Checks what a model is called with; inside jit ids are not known yet, their shape is.

    Raises:
        TypeError: it is no array of whole numbers with two dims.
        ValueError: it is empty, or an id is outside the model's table.
    """
    kind, shape = getattr(tokens, "dtype", None), getattr(tokens, "shape", ())
    if kind is None or not jnp.issubdtype(kind, jnp.integer) or len(shape) != 2:
        what = type(tokens).__name__ if kind is None else f"{kind} {list(shape)}"
        raise TypeError(f"tokens: must be an array of whole numbers [batch, length], not {what}")
    if tokens.size == 0:
        raise ValueError(f"tokens: shape {shape} holds none")
    if isinstance(tokens, jax.core.Tracer):
        return
    for token in (int(tokens.min()), int(tokens.max())):
        if not 0 <= token < vocab_size:
            raise ValueError(f"token {token} is outside model.vocab_size={vocab_size}")


def is_prompt(value: Any) -> bool:
    """Whether a value is one prompt."""
    return isinstance(value, str) or _is_ids(value) or _is_conversation(value)


def list_of_prompts(value: Any) -> list[Any]:
    """Returns the prompts of a list; a TypeError names what is none."""
    allowed = "a text, token ids, one conversation (a list of messages) or a list of any of these"
    if not _is_list(value):
        raise TypeError(f"prompt must be {allowed}, not {type(value).__name__}")
    for index, one in enumerate(value):
        if not is_prompt(one):
            shown = repr(one)
            shown = shown if len(shown) <= 60 else shown[:57] + "..."
            raise TypeError(f"prompt {index}: must be {allowed}, not {shown}")
    return list(value)


def _is_list(value: Any) -> bool:
    return isinstance(value, Sequence | np.ndarray | jax.Array) and not isinstance(
        value, str | bytes
    )


def _is_ids(value: Any) -> bool:
    if isinstance(value, np.ndarray | jax.Array):
        return value.ndim == 1 and bool(np.issubdtype(value.dtype, np.integer))
    return (
        _is_list(value)
        and len(value) > 0
        and all(isinstance(x, int | np.integer) and not isinstance(x, bool) for x in value)
    )


def _is_conversation(value: Any) -> bool:
    return (
        _is_list(value)
        and len(value) > 0
        and all(isinstance(m, Mapping) and "role" in m for m in value)
    )
