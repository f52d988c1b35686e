"""Tokens and their log-probabilities, as answers spell them."""

from __future__ import annotations

from collections.abc import Sequence

from dsjax.data.tokenizer import Tokenizer
from dsjax.engine import TokenLogProb
from dsjax.serving.answer_models import (
    ChatLogprobs,
    CompletionLogprobs,
    TokenLogprob,
    TopLogprob,
)

# What JSON cannot hold is said as OpenAI's API says it.
_LEAST = -9999.0


def spelled(tokenizer: Tokenizer, token: int) -> str:
    """Returns a token's text; bytes that are no UTF-8 as numbers: no two are alike."""
    data = tokenizer.bytes_of(token)
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in data)
    return text or f"token:{token}"


def completion_logprobs(
    tokenizer: Tokenizer,
    first: int | None,
    logprobs: Sequence[TokenLogProb],
    offset: int,
    count: int,
) -> CompletionLogprobs:
    """Returns log-probabilities as completions have them.

    Args:
        tokenizer: of the model.
        first: a token before all others, which has none; None where there is none.
        logprobs: of the tokens after it.
        offset: characters of text before the first.
        count: how many of the best are given for each.
    """
    found = CompletionLogprobs(tokens=[], token_logprobs=[], top_logprobs=[], text_offset=[])
    if first is not None:
        text = spelled(tokenizer, first)
        found.tokens.append(text)
        found.token_logprobs.append(None)
        found.top_logprobs.append(None)
        found.text_offset.append(offset)
        offset += _width(tokenizer, first)
    for one in logprobs:
        text = spelled(tokenizer, one.token)
        found.tokens.append(text)
        found.token_logprobs.append(_number(one.logprob))
        top = {spelled(tokenizer, token): _number(value) for token, value in one.best[:count]}
        if count > 0:
            top.setdefault(text, _number(one.logprob))
        found.top_logprobs.append(top if count > 0 else None)
        found.text_offset.append(offset)
        offset += _width(tokenizer, one.token)
    return found


def chat_logprobs(
    tokenizer: Tokenizer, logprobs: Sequence[TokenLogProb], count: int
) -> ChatLogprobs:
    """Returns log-probabilities as chats have them, with the `count` best of each token."""
    content = []
    for one in logprobs:
        best = [TopLogprob(**_said(tokenizer, *pair)) for pair in one.best[:count]]
        said = _said(tokenizer, one.token, one.logprob)
        content.append(TokenLogprob(**said, top_logprobs=best))
    return ChatLogprobs(content=content)


def _said(tokenizer: Tokenizer, token: int, logprob: float) -> dict:
    data = tokenizer.bytes_of(token)
    return {
        "token": spelled(tokenizer, token),
        "logprob": _number(logprob),
        "bytes": list(data) if data else None,
    }


def _number(logprob: float) -> float:
    return max(logprob, _LEAST)


def _width(tokenizer: Tokenizer, token: int) -> int:
    """Returns the characters that begin in a token, those that end later too."""
    if token in tokenizer.special_ids:
        return 0
    return sum(byte & 0xC0 != 0x80 for byte in tokenizer.bytes_of(token))
