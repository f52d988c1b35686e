"""Packing documents into rows, and rows into records."""

import re
from typing import Any, Literal

import grain
import numpy as np
import pytest

from dsjax.data.packed import decode_row, encode_row
from dsjax.data.packing import documents_of, pack_rows, tokenized
from dsjax.data.sources import Document
from dsjax.data.tokenizer import ByteTokenizer
from tests.dsjax.data.packing_oracle import BOS, check_row, check_rows, pieces_of, random_texts


def packed(
    texts: list[str],
    length: int,
    bins: int = 4,
    long_documents: Literal["split", "error", "truncate"] = "split",
):
    documents: Any = [Document(text, f"file-{i}") for i, text in enumerate(texts)]
    tokens = tokenized(
        documents_of(documents), ByteTokenizer(), length=length, long_documents=long_documents
    )
    return pack_rows(tokens, length=length, num_packing_bins=bins, seed=0)


@pytest.mark.parametrize("length", [2, 3, 16, 64, 300])
@pytest.mark.parametrize("seed", range(4))
def test_rows_hold_every_document_once(length: int, seed: int) -> None:
    texts = random_texts(60, 150, seed)
    check_rows(packed(texts, length, bins=1 + seed * 3), texts, length)


@pytest.mark.parametrize("size", [13, 14, 15, 28, 29, 30, 31])
def test_cuts_at_the_edges_of_a_row(size: int) -> None:
    # BOS + 14 + EOS is a row of 16; 31 tokens are two full pieces that share one token.
    text = "abcdefghijklmnopqrstuvwxyz01234"[:size]
    check_rows(packed([text], 16), [text], 16)
    assert len(pieces_of([text], 16)) == (1 if size <= 14 else 2 if size <= 29 else 3)


def test_a_document_is_not_cut_if_it_fits() -> None:
    texts = [text for text in random_texts(200, 40, 7) if 0 < len(text.encode()) <= 30]
    pieces = [piece for row in packed(texts, 32) for piece in check_row(row, 32)]
    assert len(pieces) == len(texts)
    assert all(piece[0] == BOS for piece in pieces)


def test_rows_are_nearly_full() -> None:
    texts = random_texts(2000, 200, 3)
    full = {
        bins: np.mean([row["segment_ids"] > 0 for row in packed(texts, 128, bins)])
        for bins in (8, 32)
    }
    assert 0.85 < full[8] < full[32]
    assert full[32] > 0.92


def test_truncate_keeps_the_beginning() -> None:
    (row,) = packed(["abcdefgh"], 4, long_documents="truncate")
    assert check_row(row, 4) == [(BOS, 97, 98, 99)]


def test_error_names_file_and_lengths() -> None:
    rows = iter(packed(["ab", "abcdefgh"], 8, long_documents="error"))
    message = "file-1: document of 10 tokens is longer than a row, length=8"
    with pytest.raises(ValueError, match=re.escape(message)):
        next(rows)


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="length=1 must be at least 2"):
        packed(["a"], 1)
    with pytest.raises(ValueError, match="long_documents='drop' must be split, error or truncate"):
        packed(["a"], 8, long_documents="drop")  # type: ignore[arg-type]


def test_iterator_state_restores_exactly() -> None:
    rows = packed(random_texts(25, 60, 1), 32)
    grain.experimental.assert_equal_output_after_checkpoint(rows)


def test_records_give_the_same_rows() -> None:
    length = 32
    for row in packed(random_texts(100, 60, 2), length):
        record = encode_row(row)
        num_tokens, num_segments = (row["segment_ids"] > 0).sum(), row["segment_ids"].max()
        assert len(record) == 4 * (2 + num_segments + num_tokens)  # no padding on the disk
        again = decode_row(record, length)
        assert again.keys() == row.keys()
        for name, value in row.items():
            np.testing.assert_array_equal(again[name], value, strict=True)


@pytest.mark.parametrize("damage", ["empty", "odd", "longer", "starts", "count"])
def test_damaged_records_are_refused(damage: str) -> None:
    record = encode_row(next(iter(packed(["abc", "defg"], 16))))
    values = np.frombuffer(record, "<i4").copy()
    if damage == "starts":
        values[3] = 99
    elif damage == "count":
        values[0] = -1
    changed = {"empty": b"", "odd": record[:-1], "longer": record + bytes(40)}
    with pytest.raises(ValueError, match="is no row of 16 tokens"):
        decode_row(changed.get(damage, values.tobytes()), 16)
