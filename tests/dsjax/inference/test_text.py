"""Tokens as text that may be shown: characters, stop strings, the end."""

import itertools

import pytest

from dsjax.data.tokenizer import ByteTokenizer
from dsjax.inference.text import TextStream

pytestmark = pytest.mark.core

TOKENIZER = ByteTokenizer()


def feed(data: bytes, stop: tuple[str, ...] = (), limit: int = 10_000) -> tuple[list[str], str]:
    """Feeds bytes one by one until the stream ends; returns its pieces and why it ended."""
    stream = TextStream(TOKENIZER, stop, limit)
    pieces = []
    for byte in data:
        pieces.append(stream.feed(byte))
        if stream.finish is not None:
            break
    assert "".join(pieces) == stream.text
    return pieces, stream.finish or ""


def test_characters_come_whole():
    pieces, _ = feed("aé€😀b".encode())
    assert pieces == ["a", "", "é", "", "", "€", "", "", "", "😀", "b"]


def test_an_unfinished_character_at_the_end_is_shown_as_such():
    pieces, finish = feed("ab€".encode()[:4], limit=4)
    assert ("".join(pieces), finish) == ("ab�", "length")


def test_the_end_token_ends_and_gives_out_what_was_held():
    stream = TextStream(TOKENIZER, ("stop",), 100)
    assert [stream.feed(byte) for byte in b"a st"] == ["a", " ", "", ""]
    assert stream.feed(TOKENIZER.eos_id) == "st"
    assert (stream.text, stream.finish) == ("a st", "stop")
    assert stream.feed(ord("x")) == ""
    assert stream.text == "a st"


def test_other_special_tokens_are_no_text():
    stream = TextStream(TOKENIZER, (), 100)
    assert [stream.feed(t) for t in (97, TOKENIZER.bos_id, 98)] == ["a", "", "b"]


def test_length_ends_and_gives_out_what_was_held():
    assert feed(b"abst", ("stop",), 4) == (["a", "b", "", "st"], "length")


def test_a_stop_string_split_over_tokens_never_shows():
    assert feed(b"one two", (" two",)) == (["o", "n", "e", "", "", "", ""], "stop")


def test_a_stop_string_completed_by_the_last_token_stops():
    assert feed(b"abEND", ("END",), 5) == (["a", "b", "", "", ""], "stop")


def test_the_first_of_several_stop_strings_cuts():
    assert "".join(feed(b"x ab cd", ("cd", "ab"))[0]) == "x "
    # The two end on one token; the longer one began first.
    assert "".join(feed(b"xabc", ("bc", "abc"))[0]) == "x"


def test_a_stop_string_of_more_than_ascii():
    pieces, finish = feed("hé€llo".encode(), ("é€",))
    assert ("".join(pieces), finish) == ("h", "stop")


def test_every_text_is_cut_where_its_first_stop_string_begins():
    for letters in itertools.product("ab", repeat=7):
        text = "".join(letters)
        for stop in (("aab",), ("aba", "bb"), ("abab",), ("baa", "aa")):
            stream = TextStream(TOKENIZER, stop, 100)
            shown = ""
            for i, byte in enumerate(text.encode()):
                shown += stream.feed(byte)
                ends = [text.find(s) + len(s) for s in stop if s in text[: i + 1]]
                assert (stream.finish == "stop") == bool(ends)
                if ends:
                    cut = min(text.find(s) for s in stop if s in text[: i + 1])
                    assert shown == text[:cut]
                    break
                # All is shown but what may yet become a stop string.
                held = max(
                    (n for s in stop for n in range(1, len(s)) if text[: i + 1].endswith(s[:n])),
                    default=0,
                )
                assert shown == text[: i + 1 - held]


def test_a_stop_string_that_is_a_special_token_stops():
    class Spelled(ByteTokenizer):
        def bytes_of(self, token: int) -> bytes:
            return b"<|user|>" if token == self.bos_id else super().bytes_of(token)

    tokenizer = Spelled()
    stream = TextStream(tokenizer, ("<|user|>", "x"), 100)
    assert [stream.feed(token) for token in (97, tokenizer.bos_id)] == ["a", ""]
    assert (stream.text, stream.finish) == ("a", "stop")
