"""What packing means, in plain Python, for the tests of packing, of the files and of the loader."""

from collections import Counter
from collections.abc import Iterable

import numpy as np

from dsjax.data.tokenizer import ByteTokenizer

BOS, EOS = 256, 257


def random_texts(num_texts: int, longest: int, seed: int) -> list[str]:
    """Texts of many lengths and alphabets, some of several rows, some empty."""
    random = np.random.default_rng(seed)
    texts = []
    for _ in range(num_texts):
        size = int(random.integers(0, longest) * random.random())
        texts.append("".join(random.choice(list("abcd eé漢🤗\n"), size)))
    return texts


def pieces_of(texts: Iterable[str], length: int) -> Counter[tuple[int, ...]]:
    """The pieces that rows must hold, each as its tokens, with how often each occurs."""
    pieces: Counter[tuple[int, ...]] = Counter()
    for text in texts:
        if not text:
            continue
        tokens = [BOS, *text.encode(), EOS]
        first = True
        while first or len(tokens) > 1:
            pieces[tuple(tokens[:length])] += 1
            tokens = tokens[length - 1 :]
            first = False
    return pieces


def check_row(row: dict[str, np.ndarray], length: int) -> list[tuple[int, ...]]:
    """Checks one row on its own, token by token.

    Args:
        row: of `length` tokens.
        length: its length.

    Returns:
        The pieces of documents in it.
    """
    assert {name: (value.shape, value.dtype.name) for name, value in row.items()} == {
        "tokens": ((length,), "int32"),
        "targets": ((length,), "int32"),
        "weights": ((length,), "float32"),
        "segment_ids": ((length,), "int32"),
        "positions": ((length,), "int32"),
        "num_bytes": ((), "int32"),
    }
    tokens, segments = row["tokens"].tolist(), row["segment_ids"].tolist()
    pieces: list[list[int]] = []
    num_bytes = 0
    for i in range(length):
        if segments[i] == 0:  # padding, and nothing but padding after it
            assert not any(segments[i:])
            assert (tokens[i], row["positions"][i], row["weights"][i]) == (0, 0, 0)
            continue
        if segments[i] > len(pieces):
            pieces.append([])
        assert segments[i] == len(pieces)
        assert row["positions"][i] == len(pieces[-1])
        pieces[-1].append(tokens[i])
        follows = i + 1 < length and segments[i + 1] == segments[i]
        assert row["weights"][i] == float(follows)
        assert row["targets"][i] == (tokens[i + 1] if follows else 0)
        num_bytes += follows and tokens[i + 1] < BOS
    assert row["num_bytes"] == num_bytes
    return [tuple(piece) for piece in pieces]


def check_rows(rows: Iterable[dict[str, np.ndarray]], texts: Iterable[str], length: int) -> None:
    """Checks that rows hold the documents, each exactly once and nothing else (bytes as tokens)."""
    texts = list(texts)
    found: Counter[tuple[int, ...]] = Counter()
    num_bytes = num_targets = 0
    for row in rows:
        found.update(check_row(row, length))
        num_bytes += int(row["num_bytes"])
        num_targets += int(row["weights"].sum())
    assert found == pieces_of(texts, length)
    assert num_bytes == sum(len(text.encode()) for text in texts)
    # Every token but BOS is a target exactly once.
    tokenizer = ByteTokenizer()
    assert num_targets == sum(len(tokenizer.encode(text)) + 1 for text in texts if text)
