"""Text that ends at a stop string, which may spell special tokens."""

from __future__ import annotations

from collections.abc import Sequence

from dsjax.data.tokenizer import StreamDecoder, Tokenizer


class StoppingDecoder:
    """Decodes ids one by one, up to the first stop string.

    Stop strings are looked for in the text with its special tokens written out, so that one may
    be, begin or end with a special token or hold it. Special tokens are no part of what is given
    out, but for those asked for. What could be the beginning of a stop string is held back.

    Attributes:
        stopped: whether a stop string was found; the text ends before it.
    """

    def __init__(
        self, tokenizer: Tokenizer, stop: Sequence[str] = (), show_tokens: Sequence[int] = ()
    ) -> None:
        self.stopped = False
        self._tokenizer = tokenizer
        self._hidden = tokenizer.special_ids.difference(show_tokens)
        self._decoder = StreamDecoder(tokenizer, hidden=self._hidden)
        self._stop = tuple(stop)
        self._held = ""
        self._shown: list[bool] = []  # of each character of `_held`, whether it is text

    def feed(self, token: int) -> str:
        """Takes one more id, special ones and the end token too; returns the text now certain."""
        if token not in self._hidden:
            return self._release(self._decoder.feed(token), shown=True, ended=False)
        if not self._stop:
            return ""
        spelling = self._tokenizer.bytes_of(token).decode("utf-8", errors="replace")
        return self._release(spelling, shown=False, ended=False)

    def flush(self) -> str:
        """Returns what is left at the end, U+FFFD for an unfinished character included."""
        return self._release(self._decoder.flush(), shown=True, ended=True)

    def _release(self, piece: str, *, shown: bool, ended: bool) -> str:
        if self.stopped:
            return ""
        if not self._stop:
            return piece
        self._held += piece
        self._shown += [shown] * len(piece)
        cuts = [at for at in map(self._held.find, self._stop) if at >= 0]
        if cuts:
            self.stopped = True
            end = min(cuts)
        else:
            end = len(self._held) - (0 if ended else self._possible_stop())
        released = "".join(
            c for c, is_text in zip(self._held[:end], self._shown[:end], strict=True) if is_text
        )
        self._held, self._shown = self._held[end:], self._shown[end:]
        return released

    def _possible_stop(self) -> int:
        """Returns the length of the longest end that a stop string could begin with."""
        longest = max(len(stop) - 1 for stop in self._stop)
        for size in range(min(longest, len(self._held)), 0, -1):
            if any(stop.startswith(self._held[-size:]) for stop in self._stop):
                return size
        return 0
