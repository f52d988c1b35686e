"""What a caller may ask of the choice of tokens, checked before anything runs."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from difflib import get_close_matches
from numbers import Integral, Real
from typing import Any

import numpy as np

from dsjax.config.model import require, require_seed

MAX_BIASED_TOKENS = 320
MAX_LOGPROBS = 20
# What transformers and vLLM call it, where the nearest name would not be found.
_OTHER_NAMES = {
    "do_sample": "temperature, which draws where it is above 0",
    "num_return_sequences": "n, in generate",
    "max_length": "max_tokens, which counts new ones",
    "max_new_tokens": "max_tokens",
    "eos_token_id": "stop_tokens",
    "stop_token_ids": "stop_tokens",
    "stop_strings": "stop",
    "allowed_token_ids": "allowed_tokens",
}


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen and when a text ends.

    Logits are changed in this order: tokens that may not be chosen, bias, penalties, temperature,
    top-k, top-p of what top-k left, min-p.

    Attributes:
        max_tokens: tokens generated at most.
        temperature: 0 takes the best token; otherwise logits are divided by it.
        top_k: keep the best so many tokens; 0 keeps all.
        top_p: keep the smallest set of best tokens with this probability; 1 keeps all.
        min_p: keep tokens of at least this share of the best one's probability; 0 keeps all.
        repetition_penalty: logits of tokens in the prompt or the text so far are divided by it
            where positive, multiplied where negative; 1 changes nothing.
        presence_penalty: taken from the logits of tokens in the text so far.
        frequency_penalty: taken as often as the token is in the text so far.
        logit_bias: added to the logits of these tokens, of 320 at most.
        allowed_tokens: the only tokens that may be chosen; None allows all.
        seed: of the draws; they depend on it, on the prompt and on the number of the sample, and
            on nothing else of the batch.
        stop: strings that end a text; they are not part of it. One string, or None, may be given.
        stop_tokens: ids that end a text, besides the model's own end tokens.
        show_tokens: special tokens that are part of the text, as they are spelled.
        ignore_eos: whether end tokens are read on like any other.
        logprobs: of how many best tokens, beside the chosen one's, the log-probability is returned,
            0 to 20; None returns none. They are the model's own, before all of the above.
        prompt_logprobs: the same for the tokens of the prompt.
    """

    max_tokens: int = 128
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    allowed_tokens: tuple[int, ...] | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    show_tokens: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    prompt_logprobs: int | None = None

    def __post_init__(self) -> None:
        for name in ("max_tokens", "top_k", "seed"):
            require(_is_whole(getattr(self, name)), name, getattr(self, name), _WHOLE)
        for name in _NUMBERS:
            value = getattr(self, name)
            require(_is_number(value), name, value, "must be a number")
        object.__setattr__(self, "stop", _stops(self.stop))
        object.__setattr__(self, "stop_tokens", _ids("stop_tokens", self.stop_tokens))
        object.__setattr__(self, "show_tokens", _ids("show_tokens", self.show_tokens))
        if self.allowed_tokens is not None:
            object.__setattr__(self, "allowed_tokens", _ids("allowed_tokens", self.allowed_tokens))
            require(bool(self.allowed_tokens), "allowed_tokens", (), "must allow a token")
        require(self.max_tokens > 0, "max_tokens", self.max_tokens, "must be positive")
        temperature, penalty = self.temperature, self.repetition_penalty
        fits = 0 <= temperature < float("inf")
        require(fits, "temperature", temperature, "must be finite and not negative")
        fits = 0 < penalty < float("inf")
        require(fits, "repetition_penalty", penalty, "must be finite and positive")
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            require(abs(value) < float("inf"), name, value, "must be finite")
        require(0 <= self.top_k < 2**31, "top_k", self.top_k, "must be in [0, 2**31)")
        require(0 < self.top_p <= 1, "top_p", self.top_p, "must be in (0, 1]")
        require(0 <= self.min_p <= 1, "min_p", self.min_p, "must be in [0, 1]")
        require_seed("seed", self.seed)
        require("" not in self.stop, "stop", self.stop, "must not hold an empty string")
        for name in ("logprobs", "prompt_logprobs"):
            value = getattr(self, name)
            fits = value is None or (_is_whole(value) and 0 <= value <= MAX_LOGPROBS)
            require(fits, name, value, f"must be None or in [0, {MAX_LOGPROBS}]")
        self._check_bias()

    def _check_bias(self) -> None:
        bias = self.logit_bias
        require(isinstance(bias, Mapping), "logit_bias", bias, "must map token ids to numbers")
        require(
            len(bias) <= MAX_BIASED_TOKENS,
            "logit_bias",
            f"of {len(bias)} tokens",
            f"must be of {MAX_BIASED_TOKENS} at most",
        )
        for token, value in bias.items():
            fits = _is_whole(token) and token >= 0 and _is_number(value)
            fits = fits and abs(value) < float("inf")
            require(fits, "logit_bias", {token: value}, "must map token ids to finite numbers")

    def key(self, prompt: Sequence[int], sample: int = 0) -> np.ndarray:
        """Returns the key of a text's draws: uint32 [2], for JAX's threefry.

        Args:
            prompt: its token ids: other prompts get other noise.
            sample: number of the text among several of one prompt.
        """
        words = np.asarray([sample, *prompt], np.int64).tobytes()
        return np.array([zlib.crc32(words), self.seed], np.uint32)

    @property
    def draws(self) -> bool:
        """Whether tokens are drawn, rather than the best ones taken."""
        return self.temperature > 0

    @property
    def limits(self) -> bool:
        """Whether only the best tokens may be drawn."""
        return self.top_k > 0 or self.top_p < 1 or self.min_p > 0

    @property
    def changes_logits(self) -> bool:
        """Whether logits are changed by the text so far, or token by token."""
        penalised = self.repetition_penalty != 1 or self.presence_penalty or self.frequency_penalty
        return bool(penalised or self.logit_bias or self.allowed_tokens is not None)


_WHOLE = "must be a whole number"


def sampling_of(options: Mapping[str, Any]) -> Sampling:
    """Returns how tokens are chosen, from options by name.

    Raises:
        TypeError: there is no such option; names the nearest, or ours for another library's.
        ValueError: an option's value does not fit.
    """
    names = [field.name for field in fields(Sampling)]
    for name in options:
        if name not in names:
            near = _OTHER_NAMES.get(name) or next(iter(get_close_matches(name, names)), None)
            hint = f"did you mean {near}?" if near else f"there are {', '.join(names)}"
            raise TypeError(f"{name}: no such option; {hint}")
    return Sampling(**options)


_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "repetition_penalty",
    "presence_penalty",
    "frequency_penalty",
)


def _is_whole(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _stops(stop: str | Sequence[str] | None) -> tuple[str, ...]:
    """Returns stop strings as a tuple; a string is one of them, not its characters."""
    if stop is None:
        return ()
    if isinstance(stop, str):
        return (stop,)
    listed = isinstance(stop, Sequence) and all(isinstance(one, str) for one in stop)
    require(listed, "stop", stop, "must be a string or a list of strings")
    return tuple(stop)


def _ids(name: str, ids: Sequence[int]) -> tuple[int, ...]:
    listed = isinstance(ids, Sequence | frozenset | set | range | np.ndarray)
    listed = listed and not isinstance(ids, str)
    require(listed and all(_is_whole(i) and i >= 0 for i in ids), name, ids, "must be token ids")
    return tuple(int(token) for token in ids)
