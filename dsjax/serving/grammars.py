"""Grammars that an answer must follow, as masks over tokens; llguidance does the work.

The masks of a step are computed together, by threads of the library's own that hold no lock of
Python's, while the device reads. What a grammar may cost is bounded: its size and depth, the work
of a step, the states it keeps.
"""

from __future__ import annotations

import functools
import json
import os
import re
import threading
import weakref
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dsjax.data.tokenizer import Tokenizer
from dsjax.serving.schemas import check_schema

if TYPE_CHECKING:
    from llguidance import LLMatcher, LLTokenizer

_MAX_REGEX = 4096
_MAX_CACHED = 96  # compiled grammars, those counted that are compiled more than once
# What one grammar may cost: steps of work (50 and 14 in a microsecond), and states of about 2 kB.
_LIMITS = {
    "initial_lexer_fuel": 1_000_000,
    "step_lexer_fuel": 200_000,
    "step_max_items": 50_000,
    "max_lexer_states": 10_000,
    "max_grammar_size": 100_000,
}
# White space where JSON may have any: none, a space, or a new line with its indentation. Without a
# bound a model may write it for ever.
_JSON_SPACE = r"( |\n {0,32})?"
# Texts of so many letters or characters at most share the masks of tokens that fit into all longer
# ones.
_SLICES = (2, 3, 4, 5, 6, 8, 10, 12, 16, 24, 32)
_LETTER = "[a-zA-Z ]"
_CHARACTER = r'[^"\\\x00-\x1F\x7F]'


class Grammars:
    """The grammars of one vocabulary.

    Attributes:
        num_threads: that compute masks.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        vocab_size: int,
        end_ids: Iterable[int] | None = None,
        num_threads: int | None = None,
    ) -> None:
        """Hands the vocabulary to the library.

        Args:
            tokenizer: of the model.
            vocab_size: ids that the model can choose.
            end_ids: tokens that end an answer; None takes the tokenizer's EOS.
            num_threads: None takes four fifths of the cores.

        Raises:
            ValueError: llguidance is not installed.
        """
        ll = _library()
        ends = sorted({tokenizer.eos_id} if end_ids is None else {*end_ids})
        kinds = (_LETTER, _CHARACTER)
        slices = [f"{kind}{{1,{size}}}" for size in _SLICES for kind in kinds]
        self._tokenizer: LLTokenizer = ll.LLTokenizer(
            ll.TokenizerWrapper(_Vocabulary(tokenizer, vocab_size)),
            eos_token=[end for end in ends if end < vocab_size],
            slices=[r"[\x20\x0A\x0D\x09]+", *slices, f"{_CHARACTER}+"],
        )
        self.num_threads = num_threads or max(1, (os.cpu_count() or 1) * 4 // 5)
        self._batch = _Batch(vocab_size, ll.LLExecutor(self.num_threads))
        self._known: OrderedDict[str, list[_Compiled]] = OrderedDict()
        self._lock = threading.Lock()

    def json_schema(self, schema: Any, field: str = "schema") -> GrammarMask:
        """Returns a mask for JSON that a schema allows.

        Raises:
            ValueError: the schema is none, cannot be met, asks for what is not done here, or is
                too large; begins with `field`.
        """
        check_schema(schema, field)
        return self._mask(
            _library().LLMatcher.grammar_from_lark(f"start: {json_rule(schema)}"), field
        )

    def json_object(self) -> GrammarMask:
        """Returns a mask for a JSON object of any form."""
        return self.json_schema({"type": "object"}, "response_format")

    def regex(self, pattern: str, field: str = "regex") -> GrammarMask:
        """Returns a mask for text that a regular expression matches as a whole.

        Args:
            pattern: in the syntax of Rust's `regex`: no look-around, no references back.
            field: named by errors.
        """
        if not isinstance(pattern, str) or not 0 < len(pattern) <= _MAX_REGEX:
            raise ValueError(f"{field}: must be a text of 1 to {_MAX_REGEX} characters")
        return self._mask(_library().LLMatcher.grammar_from_regex(pattern), field)

    def lark(self, grammar: str, field: str) -> GrammarMask:
        """Returns a mask for a grammar in llguidance's dialect of Lark."""
        return self._mask(_library().LLMatcher.grammar_from_lark(grammar), field)

    def _mask(self, grammar: str, field: str) -> GrammarMask:
        """Returns a mask at its beginning.

        Copies of a compiled grammar share its automaton, and a lock: their masks are computed one
        after the other. So a grammar that several answers follow at once is compiled up to once a
        thread.
        """
        with self._lock:
            known = self._known.get(grammar, [])
            if known:
                self._known.move_to_end(grammar)
            # Counted before any is chosen: a mask that is let go of may leave its set at any time.
            users = [len(one.users) for one in known]
        if known and (min(users) == 0 or len(known) >= self.num_threads):
            compiled = known[users.index(min(users))]
        else:
            compiled = _Compiled(self._compile(grammar, field), weakref.WeakSet())
            with self._lock:
                self._known[grammar] = [*self._known.get(grammar, []), compiled]
                while sum(map(len, self._known.values())) > _MAX_CACHED and len(self._known) > 1:
                    self._known.popitem(last=False)
        mask = GrammarMask(self._batch, compiled.matcher.deep_copy())
        compiled.users.add(mask)
        return mask

    def _compile(self, grammar: str, field: str) -> LLMatcher:
        ll = _library()
        limits = ll.LLParserLimits(verbose_errors=False, **_LIMITS)
        matcher = ll.LLMatcher(self._tokenizer, grammar, log_level=0, limits=limits)
        # The first mask finds what blows up at once, and what allows nothing.
        bits = b"" if matcher.is_error() else matcher.compute_bitmask()
        if matcher.is_error():
            raise ValueError(f"{field}: {_reason(matcher)}")
        if not any(bits):
            raise ValueError(f"{field}: no text can meet it")
        return matcher


class _Compiled(NamedTuple):
    """A grammar at its beginning, and the masks whose automaton is its own."""

    matcher: LLMatcher
    users: weakref.WeakSet[GrammarMask]


def json_rule(schema: Any) -> str:
    """Returns the right side of a Lark rule for JSON that a schema allows."""
    if isinstance(schema, bool):
        schema = {} if schema else {"not": {}}
    options = {"whitespace_flexible": True, "whitespace_pattern": _JSON_SPACE}
    return "%json " + json.dumps({**schema, "x-guidance": options})


class GrammarMask:
    """Where one answer stands in a grammar: a `TokenMask`.

    Attributes:
        batch: computes the masks of all requests of a step.
    """

    def __init__(self, batch: _Batch, matcher: LLMatcher) -> None:
        self.batch = batch
        self.matcher = matcher
        self.pending: list[int] = []
        self.bits: np.ndarray | None = None

    def allowed(self) -> np.ndarray:
        """Returns uint32 bits of the tokens allowed now; they hold until the next step's.

        Raises:
            ValueError: the grammar met a limit, or a token came that it does not allow.
        """
        if self.bits is None:
            self.batch.compute([self])
        if self.matcher.is_error():
            raise ValueError(f"the grammar failed: {_reason(self.matcher)}")
        assert self.bits is not None
        return self.bits

    def advance(self, token: int) -> None:
        """Takes the token that was chosen; it is looked at with those of the other requests."""
        self.pending.append(token)
        self.bits = None

    @property
    def is_complete(self) -> bool:
        """Whether what was taken may end here."""
        self.batch.take_tokens([self])
        return bool(self.matcher.is_accepting())


class _Batch:
    """Masks of many requests at once."""

    def __init__(self, vocab_size: int, executor: Any) -> None:
        self._num_words = -(-vocab_size // 32)
        self._executor = executor
        self._rows = np.zeros((0, self._num_words), np.uint32)

    def take_tokens(self, masks: Sequence[GrammarMask]) -> None:
        while waiting := [mask for mask in masks if mask.pending]:
            self._executor.consume_token_par([(m.matcher, m.pending.pop(0)) for m in waiting])

    def compute(self, masks: Sequence[GrammarMask]) -> None:
        self.take_tokens(masks)
        wanted = [mask for mask in masks if mask.bits is None and not mask.matcher.is_error()]
        if not wanted:
            return
        # New memory would cost as much as the masks; one alone gets its own, as it may stay.
        if len(wanted) > len(self._rows):
            self._rows = np.zeros((len(wanted), self._num_words), np.uint32)
        rows = self._rows if len(wanted) > 1 else np.zeros((1, self._num_words), np.uint32)
        places = [(mask.matcher, index) for index, mask in enumerate(wanted)]
        self._executor.unsafe_compute_mask_ptr(
            places, rows.ctypes.data, 4 * self._num_words, len(rows)
        )
        for index, mask in enumerate(wanted):
            mask.bits = rows[index]


class FixedMask:
    """The same tokens all along: a `TokenMask` that bans some."""

    def __init__(self, vocab_size: int, banned: Iterable[int]) -> None:
        bits = np.full(-(-vocab_size // 32), 0xFFFFFFFF, np.uint32)
        for token in banned:
            bits[token // 32] &= ~np.uint32(1 << token % 32)
        self._bits = bits

    def allowed(self) -> np.ndarray:
        """Returns uint32 bits of all others."""
        return self._bits

    def advance(self, token: int) -> None:
        """Takes a token, which changes nothing."""


class _Vocabulary:
    """Our tokenizer as the library wants one."""

    def __init__(self, tokenizer: Tokenizer, vocab_size: int) -> None:
        marks = {index: text for text, index in tokenizer.marker_ids.items()}
        special = {*tokenizer.special_ids, *marks}
        self.tokens = [tokenizer.bytes_of(index) for index in range(vocab_size)]
        for index in special:
            if index < vocab_size:
                # Special tokens are no text; those of raw bytes have no spelling.
                self.tokens[index] = tokenizer.bytes_of(index) or f"<|{index}|>".encode()
        self.special_token_ids = sorted(index for index in special if index < vocab_size)
        self.bos_token_id, self.eos_token_id = tokenizer.bos_id, tokenizer.eos_id
        self._tokenizer = tokenizer

    def __call__(self, text: bytes) -> list[int]:
        return self._tokenizer.encode(text.decode("utf-8", "replace"), parse_special=False)


def _reason(matcher: LLMatcher) -> str:
    lines = (line.strip() for line in matcher.get_error().splitlines())
    # Without the lines of our grammar that it quotes.
    text = " ".join(line for line in lines if line and not re.match(r"<|\||\d+ \|", line))
    return text if len(text) <= 300 else text[:297] + "..."


@functools.cache
def _library() -> Any:
    try:
        import llguidance
    except ImportError:
        raise ValueError(
            "response_format, regex and forced calls need llguidance: pip install 'dsjax[serve]'"
        ) from None
    return llguidance


def lark_string(text: str) -> str:
    """Returns a text as a string of Lark."""
    return json.dumps(text, ensure_ascii=False)
