"""What clients may ask: OpenAI's fields, and some that vLLM's clients know.

A field that is not listed is refused by name, as OpenAI's API does. What OpenAI's has and means
nothing here (who the user is, what is stored) is taken and has no effect; what would change the
answer and is not done here is refused by name.

Each list and each object is refused at its first fault: pydantic keeps every fault there is, and of
a body of some megabytes that is millions, which took gigabytes and stopped the server for as long.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    StrictStr,
    ValidationError,
    model_validator,
)

from dsjax.inference.sampling import MAX_BIASED_TOKENS, MAX_LOGPROBS

Int31 = Annotated[StrictInt, Field(ge=0, lt=2**31)]
# What bounds the work of a check; the model's own vocabulary is checked later.
TokenIds = Annotated[list[Int31], Field(fail_fast=True)]
# No server takes so many of them; each takes a hundred times its two bytes of JSON.
_MOST = 100_000
Number = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Object = dict[str, Any]
Messages = Annotated[list[Object], Field(min_length=1, max_length=_MOST, fail_fast=True)]


class _Model(BaseModel):
    model_config = ConfigDict(extra="forbid", allow_inf_nan=False, protected_namespaces=())

    @model_validator(mode="before")
    @classmethod
    def _refuse_one_unknown(cls, given: Any) -> Any:
        if isinstance(given, dict):
            for name in given:
                if name not in cls.model_fields:
                    fault: Any = {"type": "extra_forbidden", "loc": (name,), "input": None}
                    raise ValidationError.from_exception_data(cls.__name__, [fault])
        return given


def _not_too_many(given: Any) -> Any:
    if isinstance(given, dict) and len(given) > MAX_BIASED_TOKENS:
        raise ValueError(f"must be of {MAX_BIASED_TOKENS} tokens at most")
    return given


class StreamOptions(_Model):
    """What a stream holds besides text."""

    include_usage: StrictBool | None = False
    include_obfuscation: StrictBool | None = Field(False, description="Has no effect.")


class StructuredOutputs(_Model):
    """What a text must match, as vLLM's clients say it; JSON goes into `response_format`."""

    regex: StrictStr | None = None


class _Sampled(_Model):
    """What completions and chat have in common."""

    model: StrictStr | None = Field(None, description="A name of the model; the one served.")
    n: Annotated[StrictInt, Field(ge=1, le=_MOST)] | None = Field(1, description="Texts.")
    temperature: Annotated[Number, Field(ge=0, le=100)] | None = Field(
        None, description="0 takes the best token. Default: the model's own, or 1."
    )
    top_p: Annotated[Number, Field(gt=0, le=1)] | None = None
    top_k: Annotated[StrictInt, Field(ge=-1, lt=2**31)] | None = Field(
        None, description="Not OpenAI's: keep the best so many; 0 and -1 keep all."
    )
    min_p: Annotated[Number, Field(ge=0, le=1)] | None = Field(
        None, description="Not OpenAI's: keep tokens of this share of the best one's probability."
    )
    repetition_penalty: Annotated[Number, Field(gt=0, le=100)] | None = Field(
        None, description="Not OpenAI's."
    )
    presence_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = 0.0
    frequency_penalty: Annotated[Number, Field(ge=-2, le=2)] | None = 0.0
    logit_bias: (
        Annotated[
            dict[
                Annotated[str, Field(pattern=r"^[0-9]{1,9}$")],
                Annotated[Number, Field(ge=-100, le=100)],
            ],
            Field(max_length=MAX_BIASED_TOKENS),
            BeforeValidator(_not_too_many),
        ]
        | None
    ) = None
    seed: Annotated[StrictInt, Field(ge=-(2**63), lt=2**63)] | None = None
    stop: (
        Annotated[StrictStr, Field(min_length=1, max_length=1000)]
        | Annotated[
            list[Annotated[StrictStr, Field(min_length=1, max_length=1000)]],
            Field(max_length=16, fail_fast=True),
        ]
        | None
    ) = None
    stop_token_ids: Annotated[TokenIds, Field(max_length=256)] | None = Field(
        None, description="Not OpenAI's: ids that end a text."
    )
    ignore_eos: StrictBool | None = Field(
        False, description="Not OpenAI's: read on past end tokens."
    )
    priority: Annotated[StrictInt, Field(ge=-1000, le=1000)] | None = Field(
        0, description="Not OpenAI's: the lower, the sooner."
    )
    stream: StrictBool | None = False
    stream_options: StreamOptions | None = None
    user: StrictStr | None = Field(None, description="Has no effect.")


class CompletionRequest(_Sampled):
    """`POST /v1/completions`."""

    prompt: (
        StrictStr
        | Annotated[TokenIds, Field(min_length=1)]
        | Annotated[list[StrictStr], Field(min_length=1, max_length=_MOST, fail_fast=True)]
        | Annotated[
            list[Annotated[TokenIds, Field(min_length=1)]],
            Field(min_length=1, max_length=_MOST, fail_fast=True),
        ]
    ) = Field(description="A text, token ids, or a list of either.")
    suffix: StrictStr | None = Field(
        None, description="What follows the text: fill-in-the-middle, of models tuned on it."
    )
    max_tokens: Annotated[StrictInt, Field(ge=0, lt=2**31)] | None = Field(
        16, description="0 only with echo."
    )
    echo: StrictBool | None = Field(False, description="Whether the prompt comes first.")
    logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    best_of: None = Field(None, description="Refused: ask for `n` texts and choose.")
    response_format: Object | None = Field(None, description="Not OpenAI's: as in chat.")
    structured_outputs: StructuredOutputs | None = Field(None, description="Not OpenAI's.")


class ChatCompletionRequest(_Sampled):
    """`POST /v1/chat/completions`."""

    messages: Messages = Field(
        description="Objects with `role` and `content`, a text or parts of type text."
    )
    max_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = Field(
        None, description="Default: the model's own, or what the context has room for."
    )
    max_completion_tokens: Annotated[StrictInt, Field(ge=1, lt=2**31)] | None = None
    logprobs: StrictBool | None = False
    top_logprobs: Annotated[StrictInt, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    tools: Annotated[list[Object], Field(max_length=1024, fail_fast=True)] | None = None
    tool_choice: StrictStr | Object | None = None
    parallel_tool_calls: StrictBool | None = True
    response_format: Object | None = None
    structured_outputs: StructuredOutputs | None = Field(None, description="Not OpenAI's.")
    chat_template_kwargs: Object | None = Field(
        None, description="Not OpenAI's: further names that the chat template reads."
    )
    modalities: Annotated[list[Literal["text"]], Field(fail_fast=True)] | None = Field(
        None, description="Text alone."
    )
    # These mean nothing here and change no answer.
    metadata: Object | None = Field(None, description="Has no effect.")
    store: StrictBool | None = Field(None, description="Has no effect: nothing is stored.")
    service_tier: StrictStr | None = Field(None, description="Has no effect.")
    safety_identifier: StrictStr | None = Field(None, description="Has no effect.")
    prompt_cache_key: StrictStr | None = Field(None, description="Has no effect.")


class TokenizeRequest(_Model):
    """`POST /tokenize`: a text, or a conversation."""

    model: StrictStr | None = None
    prompt: StrictStr | None = Field(None, description="A text.")
    messages: Messages | None = None
    tools: Annotated[list[Object], Field(max_length=1024, fail_fast=True)] | None = None
    add_special_tokens: StrictBool = Field(True, description="Whether a text gets BOS.")
    return_token_strs: StrictBool = False


class DetokenizeRequest(_Model):
    """`POST /detokenize`."""

    model: StrictStr | None = None
    tokens: TokenIds
