"""A request while it is being answered: its text, its log-probabilities, how it chooses next."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from dsjax.data.tokenizer import Tokenizer
from dsjax.engine.packing import Choice
from dsjax.engine.request import Event, Finish, Generation, Request, TextPiece, TokenLogProb
from dsjax.engine.state import Piece, Sequence
from dsjax.inference.sampler import PACKED_INDEX, LogProbs, allowed_bits, pack
from dsjax.inference.text import TextStream


class Active:
    """One request under way.

    Attributes:
        request: what was asked.
        sequence: what the scheduler knows of it.
        generation: what it gave, once it has ended.
        arrived: when, in seconds of `time.monotonic`.
    """

    def __init__(
        self,
        request: Request,
        tokenizer: Tokenizer,
        end_ids: frozenset[int],
        vocab_size: int,
        on_event: Callable[[Event], None],
    ) -> None:
        sampling = request.sampling
        self.request = request
        self.sequence = Sequence(
            list(request.prompt),
            len(request.prompt),
            sampling.max_tokens,
            request.priority,
            shares=sampling.prompt_logprobs is None,
        )
        self.generation: Generation | None = None
        self.arrived = time.monotonic()
        self.newest_at: float | None = None
        self._on_event = on_event
        stops = frozenset(sampling.stop_tokens)
        ends = stops if sampling.ignore_eos else stops | end_ids
        self._text = TextStream(
            tokenizer, sampling.stop, sampling.max_tokens, ends, sampling.show_tokens
        )
        self._tokens: list[int] = []
        self._logprobs: list[TokenLogProb] = []
        self._prompt_logprobs: dict[int, TokenLogProb] = {}
        self._choice = _choice_of(request, vocab_size)

    @property
    def counts_tokens(self) -> bool:
        """Whether its choice depends on the tokens before."""
        return self.request.sampling.changes_logits

    def choice(self) -> Choice:
        """Returns how the newest pending token is chosen, when all before it are known."""
        sequence, choice, mask = self.sequence, self._choice, self.request.mask
        choice.packed[PACKED_INDEX] = sequence.length - sequence.num_prompt - 1
        # What is chosen after the end is thrown away, and a grammar has nothing to say of it.
        if mask is None or self.generation is not None or (bits := mask.allowed()) is None:
            return choice
        return replace(choice, allowed=bits if choice.allowed is None else choice.allowed & bits)

    def feed(self, token: int, logprobs: LogProbs | None, row: int) -> None:
        """Takes the next token, which may end the text."""
        request = self.request
        if request.mask is not None:
            request.mask.advance(token)
        self._tokens.append(token)
        new_logprobs: tuple[TokenLogProb, ...] = ()
        if request.sampling.logprobs is not None:
            assert logprobs is not None
            new_logprobs = (_logprob(logprobs, row, token, request.sampling.logprobs),)
            self._logprobs += new_logprobs
        text = self._text.feed(token)
        self._on_event(TextPiece(text, (token,), new_logprobs))
        if self._text.finish is not None:
            self._end(_finish(self._text.finish))

    def feed_prompt(self, piece: Piece, logprobs: LogProbs, first_row: int) -> None:
        """Takes the log-probabilities of the tokens that follow those of a piece."""
        count = self.request.sampling.prompt_logprobs
        if count is None:
            return
        for index in range(piece.num_tokens):
            position = piece.start + index + 1
            if position < self.sequence.num_prompt:
                token = self.sequence.tokens[position]
                found = _logprob(logprobs, first_row + index, token, count)
                self._prompt_logprobs[position] = found

    def end(self, finish: Finish, error: str | None = None) -> None:
        """Ends the text from outside, with what it has."""
        if self.generation is None:
            held = self._text.fail()
            if held:
                self._on_event(TextPiece(held, ()))
            self._end(finish, error)

    def _end(self, finish: Finish, error: str | None = None) -> None:
        sampling = self.request.sampling
        of_prompt = (self._prompt_logprobs[i] for i in sorted(self._prompt_logprobs))
        self.generation = Generation(
            self._text.text,
            tuple(self._tokens),
            finish,
            error,
            None if sampling.logprobs is None else tuple(self._logprobs),
            None if sampling.prompt_logprobs is None else tuple(of_prompt),
            self.sequence.num_shared,
        )
        self._on_event(self.generation)


def _choice_of(request: Request, vocab_size: int) -> Choice:
    """Returns how all tokens are chosen, without what a grammar says of the next."""
    sampling = request.sampling
    allowed = bias = None
    if sampling.allowed_tokens is not None:
        allowed = allowed_bits(np.asarray(sampling.allowed_tokens), vocab_size)
    if sampling.logit_bias:
        ids, numbers = zip(*sampling.logit_bias.items(), strict=True)
        bias = (np.asarray(ids, np.int32), np.asarray(numbers, np.float32))
    return Choice(
        pack(sampling, sampling.key(request.prompt, request.sample), 0),
        draws=sampling.draws,
        limits=sampling.draws and sampling.limits,
        changes=sampling.changes_logits or request.mask is not None,
        logprobs=sampling.logprobs is not None,
        allowed=allowed,
        bias=bias,
    )


def _finish(finish: str) -> Finish:
    return "stop" if finish == "stop" else "length"


def _logprob(logprobs: LogProbs, row: int, token: int, count: int) -> TokenLogProb:
    ids, best = logprobs.best_ids_BK[row, :count], logprobs.best_BK[row, :count]
    pairs = tuple((int(i), float(x)) for i, x in zip(ids, best, strict=True))
    return TokenLogProb(token, float(logprobs.chosen_B[row]), pairs)
