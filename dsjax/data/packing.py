"""Documents to fixed-length rows, whole documents side by side.

A document is BOS + text + EOS. Documents share a row but not their attention: each has a segment id
and positions of its own. A document longer than a row is split so that each piece begins with the
last token of the piece before it: every token but BOS is a target exactly once, though the model
sees no context across the cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import grain
import numpy as np

from dsjax.data.packed import Row, make_row
from dsjax.data.sources import Document, DocumentSource
from dsjax.data.tokenizer import Tokenizer

LongDocuments = Literal["split", "error", "truncate"]


class Tokenize(grain.transforms.Map):
    """Turns a document into its tokens and the bytes that each of them stands for."""

    def __init__(self, tokenizer: Tokenizer, length: int, long_documents: LongDocuments) -> None:
        if long_documents not in ("split", "error", "truncate"):
            raise ValueError(f"long_documents={long_documents!r} must be split, error or truncate")
        if length < 2:
            raise ValueError(f"length={length} must be at least 2, a token and its target")
        self._tokenizer = tokenizer
        self._length = length
        self._long_documents = long_documents

    def map(self, element: Document) -> dict[str, np.ndarray]:
        """Returns the tokens of a document; none of one without text."""
        if not element.text:
            return {"tokens": np.empty(0, np.int32), "num_bytes": np.empty(0, np.int32)}
        tokens, num_bytes = self._tokenizer.encode_document(element.text)
        if len(tokens) > self._length and self._long_documents != "split":
            if self._long_documents == "error":
                raise ValueError(
                    f"{element.origin}: document of {len(tokens)} tokens is longer than a row, "
                    f"length={self._length}"
                )
            tokens, num_bytes = tokens[: self._length], num_bytes[: self._length]
        return {"tokens": tokens, "num_bytes": num_bytes}


class Split(grain.experimental.FlatMapTransform):
    """Cuts a tokenized document into pieces no longer than a row."""

    def __init__(self, length: int) -> None:
        self._length = length

    def flat_map(self, element: dict[str, np.ndarray]) -> Sequence[dict[str, np.ndarray]]:
        """Returns the pieces; each but the first begins with a token that is no target again."""
        pieces = []
        for start in range(0, len(element["tokens"]) - 1, self._length - 1):
            piece = {name: values[start : start + self._length] for name, values in element.items()}
            if start:
                piece["num_bytes"] = piece["num_bytes"].copy()
                piece["num_bytes"][0] = 0
            pieces.append(piece)
        return pieces


class _ToRow(grain.transforms.Map):
    def map(self, element: dict[str, np.ndarray]) -> Row:
        return make_row(
            element["tokens"],
            element["tokens_segment_ids"],
            element["tokens_positions"],
            int(element["num_bytes"].sum()),
        )


def pack_rows(
    documents: grain.IterDataset, *, length: int, num_packing_bins: int, seed: int
) -> grain.IterDataset:
    """Packs tokenized documents into rows, first fit.

    Args:
        documents: what `Tokenize` gives.
        length: tokens in a row.
        num_packing_bins: rows filled at a time.
        seed: of the order in which rows filled together come out.

    Returns:
        Rows as `make_row` gives them.
    """
    pieces = grain.experimental.FlatMapIterDataset(documents, Split(length))
    packed = grain.experimental.FirstFitPackIterDataset(
        pieces,
        length_struct={"tokens": length, "num_bytes": length},
        num_packing_bins=num_packing_bins,
        seed=seed,
    )
    return packed.map(_ToRow())


def tokenized(
    documents: grain.MapDataset,
    tokenizer: Tokenizer,
    *,
    length: int,
    long_documents: LongDocuments,
    num_workers: int = 0,
) -> grain.IterDataset:
    """Tokenizes documents, in other processes if asked to; the order does not depend on how many.

    Args:
        documents: the documents, in their final order.
        tokenizer: the tokenizer.
        length: tokens in a row.
        long_documents: what becomes of a document longer than a row.
        num_workers: processes; 0 works in this one, when rows are asked for.

    Returns:
        The documents as tokens.
    """
    # Each document stays one element here. Were it split in the workers, the order and the state to
    # restore would depend on how many they are.
    mapped = documents.map(Tokenize(tokenizer, length, long_documents)).to_iter_dataset(
        grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    )
    if num_workers:
        _parse_absl_flags()
        mapped = mapped.mp_prefetch(grain.MultiprocessingOptions(num_workers=num_workers))
    return mapped


def documents_of(source: DocumentSource) -> grain.MapDataset[Any]:
    """Returns a source of documents as a grain dataset."""
    return grain.MapDataset.source(source)


def _parse_absl_flags() -> None:
    # grain's workers read absl flags, which nobody parses in a program that is not absl's.
    from absl import flags

    if not flags.FLAGS.is_parsed():
        flags.FLAGS.mark_as_parsed()
