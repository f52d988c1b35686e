"""Tokens as they come, as text that may be shown: whole characters, cut at stop strings."""

from __future__ import annotations

from dsjax.data.stopping import StoppingDecoder
from dsjax.data.tokenizer import Tokenizer


class TextStream:
    """The text of one sequence, piece by piece.

    Attributes:
        finish: "stop" at a stop string or end token, "length", "error", or None while it goes on.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop: tuple[str, ...],
        max_tokens: int,
        end_ids: frozenset[int] | None = None,
        show_tokens: tuple[int, ...] = (),
    ):
        """Begins an empty text.

        Args:
            tokenizer: turns tokens into text.
            stop: strings that end the text; special tokens in them are written out.
            max_tokens: tokens at most.
            end_ids: tokens that end the text; None takes the tokenizer's EOS.
            show_tokens: special tokens that are part of the text, as they are spelled.
        """
        self.finish: str | None = None
        self._decoder = StoppingDecoder(tokenizer, stop, show_tokens)
        self._end_ids = frozenset({tokenizer.eos_id}) if end_ids is None else end_ids
        self._left = max_tokens
        self._pieces: list[str] = []

    @property
    def text(self) -> str:
        """What has been given out."""
        return "".join(self._pieces)

    def feed(self, token: int) -> str:
        """Takes the next token and returns the text that it makes certain."""
        if self.finish is not None:
            return ""
        self._left -= 1
        piece = self._decoder.feed(token)
        if token in self._end_ids:
            return self._end("stop", piece)
        if self._left == 0:
            return self._end("length", piece)
        if self._decoder.stopped:
            self.finish = "stop"
        self._pieces.append(piece)
        return piece

    def fail(self) -> str:
        """Ends the text where no next token could be chosen; returns what was held back."""
        return self._end("error", "")

    def _end(self, finish: str, piece: str) -> str:
        if not self._decoder.stopped:
            piece += self._decoder.flush()
        self.finish = "stop" if self._decoder.stopped else finish
        self._pieces.append(piece)
        return piece
