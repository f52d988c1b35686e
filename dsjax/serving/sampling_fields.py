"""A request's fields as the engine's `Sampling`."""

from __future__ import annotations

from typing import Any

from dsjax.inference.sampling import Sampling
from dsjax.serving.request_models import ChatCompletionRequest, CompletionRequest
from dsjax.serving.service import Service

_TAKEN = ("presence_penalty", "frequency_penalty", "stop", "ignore_eos")


def sampling_of(
    service: Service,
    request: CompletionRequest | ChatCompletionRequest,
    max_tokens: int,
    logprobs: int | None,
    **more: Any,
) -> Sampling:
    """Returns how the texts of a request are made.

    What the request leaves out is what the model's makers say, or else what OpenAI's API does:
    temperature 1, and all tokens.

    Args:
        service: the service.
        request: what is asked.
        max_tokens: tokens generated at most.
        logprobs: of how many best tokens log-probabilities are wanted, or None.
        **more: further fields of `Sampling`.

    Raises:
        ValueError: names a field and why its value cannot be.
    """
    fields: dict[str, Any] = {"temperature": 1.0}
    for name in ("temperature", "top_k", "top_p", "min_p", "repetition_penalty"):
        for value in (getattr(service.defaults, name), getattr(request, name)):
            if value is not None:
                fields[name] = value
    if fields.get("top_k") == -1:  # as vLLM's clients say it
        fields["top_k"] = 0
    for name in _TAKEN:
        value = getattr(request, name)
        if value is not None:
            fields[name] = value
    return Sampling(
        max_tokens=max_tokens,
        logit_bias={int(token): value for token, value in (request.logit_bias or {}).items()},
        stop_tokens=tuple(request.stop_token_ids or ()),
        seed=service.seed(request.seed),
        logprobs=logprobs,
        **fields,
        **more,
    )
