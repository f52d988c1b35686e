"""`generation_config.json`: how a model's makers want its text to be generated.

It is read as transformers reads it for a call of `generate` without arguments
(`GenerationConfig` there), except that a text is not cut off after 20 tokens where no length is
given.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dsjax.config.fitting import MISFIT, describe, fit
from dsjax.config.model import require
from dsjax.files import read_json

_LOG = logging.getLogger(__name__)

GENERATION_FILE = "generation_config.json"


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


# What transformers takes for sampling where the file does not say.
_TOP_K = 50
# Fields that ask for nothing that changes the tokens.
_HARMLESS_FIELDS = _names(
    "_commit_hash _from_model_config assistant_confidence_threshold assistant_lookbehind "
    "bos_token_id cache_config cache_implementation compile_config decoder_start_token_id "
    "disable_compile early_stopping is_assistant length_penalty low_memory max_matching_ngram_size "
    "num_assistant_tokens num_assistant_tokens_schedule output_attentions output_hidden_states "
    "output_logits output_scores pad_token_id prefill_chunk_size prompt_lookup_num_tokens "
    "return_dict_in_generate target_lookbehind transformers_version use_cache"
)
# Fields that ask for nothing where they are 1; all others, where they are null, false, 0 or empty.
_NEUTRAL_AT_ONE = _names(
    "encoder_repetition_penalty guidance_scale num_beam_groups num_beams num_return_sequences "
    "typical_p"
)


@dataclass(frozen=True)
class GenerationDefaults:
    """What holds where a caller does not say; None where nothing is said here either.

    Attributes:
        eos_ids: ids that end a text, each by itself.
        temperature: 0 takes the best token.
        top_k: keep the best so many tokens; 0 keeps all.
        top_p: keep the smallest set of best tokens with this probability.
        min_p: keep the tokens that are at least so probable, relative to the best one.
        repetition_penalty: divides the positive logits of tokens that prompt or text already
            have, and multiplies the negative ones; 1 changes nothing.
        max_tokens: tokens generated at most.
        max_length: tokens of prompt and text together at most; used where `max_tokens` is None.
        ignored: fields of the file that ask for what is not done here.
    """

    eos_ids: tuple[int, ...] = ()
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    max_tokens: int | None = None
    max_length: int | None = None
    ignored: tuple[str, ...] = ()

    def ending_at(self, eos_id: int) -> GenerationDefaults:
        """Returns these defaults with one more id that ends a text."""
        return replace(self, eos_ids=tuple(dict.fromkeys((*self.eos_ids, eos_id))))

    def sampling_fields(self) -> dict[str, float | int]:
        """Returns what is said of how tokens are chosen, as fields of `Sampling`."""
        names = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
        found = {name: getattr(self, name) for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def max_tokens_after(self, prompt_length: int) -> int | None:
        """Returns how many tokens a prompt of so many tokens gets at most; None without a limit.

        Raises:
            ValueError: the prompt alone fills `max_length`.
        """
        if self.max_tokens is not None or self.max_length is None:
            return self.max_tokens
        if prompt_length >= self.max_length:
            raise ValueError(
                f"{GENERATION_FILE}: max_length={self.max_length}: the prompt has {prompt_length} "
                "tokens already; give max_tokens"
            )
        return self.max_length - prompt_length


def read_generation_defaults(files: Mapping[str, Path]) -> GenerationDefaults:
    """Reads a model's defaults from `generation_config.json`, as far as it has them.

    Without `do_sample` the best token is taken; top-k, top-p and min-p then wait for a caller who
    gives a temperature. Fields for what is not done here are warned of. Without the file, the end
    token of `config.json` is all there is.

    Args:
        files: a model's small files, by name.

    Raises:
        ValueError: a value that a field cannot have; names the file and the field.
    """
    if GENERATION_FILE not in files:
        file = files.get("config.json")
        return GenerationDefaults(() if file is None else _eos_ids(read_json(file), file))
    file = files[GENERATION_FILE]
    content = read_json(file)
    read = {"do_sample", "eos_token_id"}

    def field(name: str, kind: Any, holds: Callable[[Any], bool], constraint: str) -> Any:
        read.add(name)
        value = _field(content, name, kind, file)
        require(value is None or holds(value), f"{file}: {name}", value, constraint)
        return value

    sampled = _field(content, "do_sample", bool, file)
    not_negative = "must be finite and not negative"
    temperature = field("temperature", float, lambda x: 0 <= x < math.inf, not_negative)
    top_k = field("top_k", int, lambda x: -1 <= x < 2**31, "must be in [0, 2**31)")
    if top_k is None:
        top_k = _TOP_K if sampled else None
    defaults = GenerationDefaults(
        eos_ids=_eos_ids(content, file),
        temperature=(1.0 if temperature is None else temperature) if sampled else 0.0,
        top_k=0 if top_k == -1 else top_k,  # -1 is how vLLM spells it
        top_p=field("top_p", float, lambda x: 0 < x <= 1, "must be in (0, 1]"),
        min_p=field("min_p", float, lambda x: 0 <= x <= 1, "must be in [0, 1]"),
        repetition_penalty=field(
            "repetition_penalty", float, lambda x: 0 < x < math.inf, "must be finite and positive"
        ),
        max_tokens=field("max_new_tokens", int, lambda x: x > 0, "must be positive"),
        max_length=field("max_length", int, lambda x: x > 0, "must be positive"),
    )
    ignored = tuple(
        name
        for name, value in content.items()
        if name not in read and name not in _HARMLESS_FIELDS and not _is_neutral(name, value)
    )
    if ignored:
        _LOG.warning("%s: not done here: %s", file, ", ".join(ignored))
    return replace(defaults, ignored=ignored)


def _eos_ids(content: Mapping[str, Any], file: Path) -> tuple[int, ...]:
    ids: tuple[int, ...] = _field(content, "eos_token_id", tuple[int, ...], file) or ()
    for token in ids:
        require(0 <= token < 2**31, f"{file}: eos_token_id", token, "must be in [0, 2**31)")
    return tuple(dict.fromkeys(ids))


def _field(content: Mapping[str, Any], name: str, kind: Any, file: Path) -> Any:
    value = content.get(name)
    if value is None:
        return None
    fitted = fit(value, kind)
    require(fitted is not MISFIT, f"{file}: {name}", value, f"must be {describe(kind)}")
    return fitted


def _is_neutral(name: str, value: Any) -> bool:
    if name in _NEUTRAL_AT_ONE and value == 1:
        return True
    return value is None or value in (False, 0, "", [], {})
