"""Tokens as they come, as text that may be shown: whole characters, cut at stop strings."""

from __future__ import annotations

from dsjax.data.tokenizer import StreamDecoder, Tokenizer


class TextStream:
    """The text of one sequence, piece by piece.

    Attributes:
        text: what has been given out.
        finish: "stop" at a stop string or end token, "length", "error", or None while it goes on.
    """

    def __init__(self, tokenizer: Tokenizer, stop: tuple[str, ...], max_tokens: int):
        self.text = ""
        self.finish: str | None = None
        self._decoder = StreamDecoder(tokenizer)
        self._eos_id = tokenizer.eos_id
        self._stop = stop
        # Special tokens give no text in which a stop string could be found.
        self._stop_ids = {
            token
            for token in (tokenizer.special_ids if stop else ())
            if tokenizer.bytes_of(token).decode("utf-8", errors="replace") in stop
        }
        self._left = max_tokens
        self._held = ""  # could be the beginning of a stop string

    def feed(self, token: int) -> str:
        """Takes the next token and returns the text that it makes certain."""
        if self.finish is not None:
            return ""
        self._left -= 1
        if token == self._eos_id or token in self._stop_ids:
            return self._end("stop", self._decoder.flush())
        piece = self._decoder.feed(token)
        if self._left == 0:
            return self._end("length", piece + self._decoder.flush())
        return self._release(piece, ended=False)

    def fail(self) -> str:
        """Ends the text where no next token could be chosen; returns what was held back."""
        return self._end("error", self._decoder.flush())

    def _end(self, finish: str, piece: str) -> str:
        released = self._release(piece, ended=True)
        self.finish = self.finish or finish
        return released

    def _release(self, piece: str, *, ended: bool) -> str:
        pending = self._held + piece
        cuts = [at for at in (pending.find(stop) for stop in self._stop) if at >= 0]
        if cuts:
            self.finish = "stop"
            released, self._held = pending[: min(cuts)], ""
        else:
            keep = 0 if ended else self._possible_stop(pending)
            released, self._held = pending[: len(pending) - keep], pending[len(pending) - keep :]
        self.text += released
        return released

    def _possible_stop(self, pending: str) -> int:
        """Returns the length of the longest end that a stop string could begin with."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for size in range(min(longest, len(pending)), 0, -1):
            if any(stop.startswith(pending[-size:]) for stop in self._stop):
                return size
        return 0
