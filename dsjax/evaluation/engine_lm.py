"""An engine as lm-eval sees a model: log-likelihoods of texts, and texts that are generated."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import normalize_gen_kwargs
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from dsjax.data.tokenizer import Tokenizer
from dsjax.engine import Engine, Generation, Request
from dsjax.inference.sampling import Sampling
from dsjax.progress import JobProgress

_LOG = logging.getLogger(__name__)

# Requests that the engine holds at once: enough to be full, few enough to bound memory.
_BLOCK = 4096
_DEFAULT_MAX_TOKENS = 256  # lm-eval's
_SAMPLING_FIELDS = {field.name for field in fields(Sampling)} - {
    "max_tokens",
    "stop",
    "logprobs",
    "prompt_logprobs",
}

# A pair of texts, the ids of the first, the ids of the second.
_Scored = tuple[tuple[str, str] | None, list[int], list[int]]


class EngineLM(TemplateLM):
    """lm-eval's interface over an `Engine`.

    A log-likelihood is asked for as a prompt of all tokens but the last, which is then the only
    token allowed: so a text may fill the whole context, and continuations of one token (the usual
    multiple choice) share what the pool holds of their prompt. Probabilities are among the tokens
    that the tokenizer has, as the engine chooses no others.
    """

    def __init__(
        self,
        engine: Engine,
        *,
        name: str = "",
        add_bos: bool = True,
        shown: bool = True,
    ) -> None:
        """Wraps an engine, which stays its caller's.

        Args:
            engine: made with `prompt_logprobs`.
            name: of the checkpoint, for reports and caches.
            add_bos: whether texts begin with BOS, as these models are trained. lm-eval's
                `local-completions` does the same with `add_bos_token=true`.
            shown: whether progress is shown.

        Raises:
            ValueError: the engine gives no log-probabilities of prompts.
        """
        super().__init__()
        if not engine.config.prompt_logprobs:
            raise ValueError("engine.prompt_logprobs=False: log-likelihoods need them")
        self._engine = engine
        self._name = name
        self._add_bos = add_bos
        self._shown = shown

    @property
    def _tokenizer(self) -> Tokenizer:
        return self._engine.tokenizer

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        return self._tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """The token that stands before a text without context: BOS."""
        return self._tokenizer.bos_id

    @property
    def max_length(self) -> int:
        """Tokens of context and continuation together."""
        return self._engine.max_length

    @property
    def tokenizer_name(self) -> str:
        """What tells this tokenizer from others, for lm-eval's caches."""
        return f"{self._name or 'dsjax'}--{self._tokenizer.sha256[:16]}"

    def get_model_info(self) -> dict[str, Any]:
        """Returns what the report says of the model."""
        return {
            "checkpoint": self._name,
            "max_length": self.max_length,
            "add_bos_token": self._add_bos,
            "tokenizer_sha256": self._tokenizer.sha256,
        }

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Returns the ids of a text, with BOS once unless it is told not to."""
        del kwargs
        add_bos = self._add_bos if add_special_tokens is None else add_special_tokens
        encode = self._tokenizer.encode_prompt if add_bos else self._tokenizer.encode
        return encode(string)

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Returns a conversation as the model's template writes it."""
        return self._tokenizer.apply_chat_template(
            chat_history, add_generation_prompt=add_generation_prompt
        )

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """Returns the template that `apply_chat_template` uses; there is one, the default."""
        if chat_template is False:
            return None
        template = self._tokenizer.chat_template
        if template is None:
            raise ValueError(f"tokenizer {self._tokenizer.spec!r} has no chat template")
        if isinstance(chat_template, str) and chat_template != "default":
            raise ValueError(
                f"apply_chat_template={chat_template!r}: only the default template is used"
            )
        return template.sources["default"]

    # Log-likelihoods

    def _loglikelihood_tokens(
        self, requests: Sequence[_Scored], **kwargs: Any
    ) -> list[tuple[float, bool]]:
        del kwargs
        prompts, num_cut = [], 0
        for pair, context, continuation in requests:
            if not continuation:
                raise ValueError(
                    f"lm-eval: a continuation adds no token to its context: {_shown(pair)}"
                )
            if len(continuation) >= self.max_length:
                raise ValueError(
                    f"lm-eval: a continuation of {len(continuation)} tokens does not fit "
                    f"max_length={self.max_length} after a token of context: {_shown(pair)}"
                )
            whole = context + continuation
            num_cut += len(whole) > self.max_length
            prompts.append(whole[-self.max_length :])
        if num_cut:
            _LOG.warning(
                "lm-eval: %d of %d contexts are cut at the left to fit max_length=%d",
                num_cut,
                len(requests),
                self.max_length,
            )

        def made(index: int) -> Request:
            *prompt, last = prompts[index]
            several = len(requests[index][2]) > 1
            sampling = Sampling(
                max_tokens=1,
                allowed_tokens=(last,),
                ignore_eos=True,
                logprobs=1,
                prompt_logprobs=1 if several else None,
            )
            return Request(tuple(prompt), sampling)

        def score(index: int, generation: Generation) -> tuple[float, bool]:
            pair, _, continuation = requests[index]
            assert generation.logprobs is not None
            before = (generation.prompt_logprobs or ())[-(len(continuation) - 1) :]
            found = [*(before if len(continuation) > 1 else ()), *generation.logprobs]
            result = (
                sum(one.logprob for one in found),
                all(one.logprob >= one.best[0][1] for one in found),
            )
            if pair is not None:
                self.cache_hook.add_partial("loglikelihood", pair, result)
            return result

        return self._run(len(requests), made, score, "log-likelihoods")

    def loglikelihood_rolling(
        self, requests: Sequence[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Returns each text's log-likelihood after BOS, in windows as long as the context."""
        del disable_tqdm
        windows: list[_Scored] = []
        counts = []
        for request in requests:
            ids = self.tok_encode(request.args[0], add_special_tokens=False)
            cut = get_rolling_token_windows(ids, self.prefix_token_id, self.max_length - 1, 1)
            found = [(None, *make_disjoint_window(window)) for window in cut]
            windows += found
            counts.append(len(found))
        scores = iter(self._loglikelihood_tokens(windows))
        totals = []
        for request, count in zip(requests, counts, strict=True):
            totals.append(sum(next(scores)[0] for _ in range(count)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    # Texts

    def generate_until(self, requests: Sequence[Instance], disable_tqdm: bool = False) -> list[str]:
        """Continues contexts until a stop string, an end token or `max_gen_toks`.

        Raises:
            ValueError: a field of `generation_kwargs` that is not known here.
        """
        del disable_tqdm
        seen: Counter[str] = Counter()
        asked = []
        for request in requests:
            context, options = request.args
            sampling = self._sampling(options)
            room = self.max_length - sampling.max_tokens
            if room < 1:
                raise ValueError(
                    f"generation_kwargs: max_gen_toks={sampling.max_tokens} leaves no room for a "
                    f"context in max_length={self.max_length}"
                )
            key = f"{context}\0{options}"
            # The same request again is another sample.
            asked.append(Request(tuple(self.tok_encode(context)[-room:]), sampling, seen[key]))
            seen[key] += 1

        def text(index: int, generation: Generation) -> str:
            self.cache_hook.add_partial("generate_until", requests[index].args, generation.text)
            return generation.text

        return self._run(len(asked), asked.__getitem__, text, "texts")

    @staticmethod
    def _sampling(options: Mapping[str, Any]) -> Sampling:
        """Returns lm-eval's `generation_kwargs` in our words; greedy unless `do_sample`."""
        given = dict(normalize_gen_kwargs(dict(options), _DEFAULT_MAX_TOKENS))
        sampled = given.pop("do_sample", False)
        fields_given = {
            "max_tokens": given.pop("max_gen_toks"),
            "stop": tuple(one for one in given.pop("until", ()) if one),
        }
        if (unknown := sorted(given.keys() - _SAMPLING_FIELDS)) != []:
            raise ValueError(
                f"generation_kwargs: {unknown[0]} is not known here, only "
                f"{', '.join(sorted(_SAMPLING_FIELDS))}, until, max_gen_toks and do_sample"
            )
        if not sampled:
            given["temperature"] = 0.0
        elif "temperature" not in given:
            given["temperature"] = 1.0
        return Sampling(**fields_given, **given)

    def _run[T](
        self,
        count: int,
        request: Callable[[int], Request],
        take: Callable[[int, Generation], T],
        what: str,
    ) -> list[T]:
        """Answers requests, block by block, and returns what `take` makes of each."""
        found: list[T] = []
        with JobProgress(f"eval: {what}", count, unit="requests", shown=self._shown) as progress:
            for start in range(0, count, _BLOCK):
                block = range(start, min(start + _BLOCK, count))

                def count_one(_: int, event: object) -> None:
                    if isinstance(event, Generation):
                        progress.advance(1)

                given = self._engine.generate([request(index) for index in block], count_one)
                for index, generation in zip(block, given, strict=True):
                    if generation.finish not in ("stop", "length"):
                        raise RuntimeError(
                            f"lm-eval: request {index} ended with {generation.finish}: "
                            f"{generation.error}"
                        )
                    found.append(take(index, generation))
        return found


def _shown(pair: Iterable[str] | None) -> str:
    text = repr(pair)
    return text if len(text) <= 120 else f"{text[:117]}..."
