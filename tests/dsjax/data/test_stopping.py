"""Stop strings in text and special tokens alike, however the ids cut them."""

import numpy as np
import pytest

from dsjax.data.stopping import StoppingDecoder
from dsjax.data.tokenizer import Tokenizer, load_tokenizer
from dsjax.data.tokenizer_files import write_byte_tokenizer

BOS, EOS = 256, 257
BOS_TEXT, EOS_TEXT = "<|begin_of_text|>", "<|end_of_text|>"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory) -> Tokenizer:
    """The raw bytes with special tokens that have a spelling."""
    folder = tmp_path_factory.mktemp("bytes")
    write_byte_tokenizer(folder)
    return load_tokenizer(str(folder))


def decode(tokenizer: Tokenizer, ids: list[int], stop: tuple[str, ...]) -> tuple[list[str], bool]:
    decoder = StoppingDecoder(tokenizer, stop)
    pieces = [decoder.feed(token) for token in ids]
    return [*pieces, decoder.flush()], decoder.stopped


@pytest.mark.parametrize(
    ("stop", "text", "stopped"),
    [
        ((), "ab\nx\ny", False),
        ((f"x{EOS_TEXT}",), "ab\n", True),
        ((EOS_TEXT,), "ab\nx", True),
        ((f"{EOS_TEXT}\n",), "ab\nx", True),
        ((f"b{BOS_TEXT}\nx{EOS_TEXT}\n",), "a", True),
        ((f"x{EOS_TEXT}z", "y"), "ab\nx\n", True),
        ((f"{EOS_TEXT}\ny!",), "ab\nx\ny", False),  # held back and given out at the end
        (("\nx\n",), "ab\nx\ny", False),  # the special token lies between
    ],
)
def test_a_stop_string_may_hold_special_tokens(tokenizer, stop, text, stopped):
    ids = [*b"ab", BOS, *b"\nx", EOS, *b"\ny"]
    pieces, found = decode(tokenizer, ids, stop)
    assert ("".join(pieces), found) == (text, stopped)


def test_nothing_of_a_stop_string_is_given_out_early(tokenizer):
    pieces, _ = decode(tokenizer, [*b"abx", EOS, *b"?"], (f"bx{EOS_TEXT}!",))
    assert pieces == ["a", "", "", "", "bx?", ""]


def test_random_ids_end_where_the_spelled_text_has_the_stop_string(tokenizer):
    random = np.random.default_rng(0)
    alphabet = [*"aé<".encode(), BOS, EOS]
    for _ in range(300):
        ids = random.choice(alphabet, 24).tolist()
        size = random.integers(1, 4)
        stop = tokenizer.decode(random.choice(alphabet, size).tolist())
        if "\ufffd" in stop:
            continue
        pieces, found = decode(tokenizer, ids, (stop,))
        spelled = tokenizer.decode(ids)
        if "\ufffd" in spelled:  # a special token inside a character; only the ids say where
            continue
        assert found == (stop in spelled)
        expected = spelled.split(stop)[0] if found else spelled
        for special in (BOS_TEXT, EOS_TEXT):
            expected = expected.replace(special, "")
        # A stop string of text may begin inside of a special token's spelling.
        assert "".join(pieces) in (expected, expected.split("<|")[0])
