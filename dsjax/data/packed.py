"""Packed rows on disk: ArrayRecord shards and the manifest that makes them a dataset.

A record is one row, in little-endian int32: the number of documents in it, the UTF-8 bytes its
targets stand for, the first position of each document, then its tokens without the padding. The
row's length is the dataset's and stands in `dataset.json`, which is written last: a folder without
it is an unfinished packing and is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, SupportsIndex, overload

import numpy as np
from array_record.python import array_record_data_source, array_record_module

from dsjax.files import draft_of, read_json

MANIFEST = "dataset.json"
FORMAT = "dsjax rows, version 1"
# One record a group is what random access needs; zstd takes int32 tokens to about two bytes each.
_WRITER_OPTIONS = "group_size:1,zstd:3"

Row = dict[str, np.ndarray]


def make_row(
    tokens: np.ndarray, segment_ids: np.ndarray, positions: np.ndarray, num_bytes: int
) -> Row:
    """Returns a row as the model trains on it.

    Args:
        tokens: int32 [length], 0 in the padding.
        segment_ids: int32 [length], 1, 2, … per document, 0 in the padding.
        positions: int32 [length], from 0 in each document.
        num_bytes: UTF-8 bytes that the row's targets stand for.

    Returns:
        `tokens`, `segment_ids`, `positions`; `targets`, int32, the next token of the same document;
        `weights`, float32, 1 where there is one and 0 at each document's last token and in the
        padding (targets are 0 there); `num_bytes`, int32 [].
    """
    inside = (segment_ids[1:] == segment_ids[:-1]) & (segment_ids[1:] > 0)
    weights = np.append(inside, False)
    targets = np.where(weights, np.append(tokens[1:], 0), 0)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": targets.astype(np.int32),
        "weights": weights.astype(np.float32),
        "segment_ids": segment_ids.astype(np.int32),
        "positions": positions.astype(np.int32),
        "num_bytes": np.array(num_bytes, np.int32),
    }


def encode_row(row: Row) -> bytes:
    """Returns a row as one record."""
    num_tokens = int(np.count_nonzero(row["segment_ids"]))
    (starts,) = np.nonzero(row["positions"][:num_tokens] == 0)
    header = [len(starts), int(row["num_bytes"])]
    return np.concatenate([header, starts, row["tokens"][:num_tokens]]).astype("<i4").tobytes()


def decode_row(record: bytes, length: int) -> Row:
    """Returns the row of a record.

    Args:
        record: what `encode_row` gave.
        length: tokens in a row, the padding included.

    Returns:
        The row, as `make_row` gives it.

    Raises:
        ValueError: when the record does not describe a row of this length.
    """
    values = np.frombuffer(record[: len(record) // 4 * 4], "<i4")
    num_segments = int(values[0]) if len(values) >= 2 else 0
    starts, tokens = values[2 : 2 + num_segments], values[2 + max(num_segments, 0) :]
    rising = len(starts) > 0 and starts[0] == 0 and bool(np.all(np.diff(starts) > 0))
    if not (rising and starts[-1] < len(tokens) <= length and len(record) % 4 == 0):
        raise ValueError(f"a record of {len(record)} bytes is no row of {length} tokens")
    num_tokens = len(tokens)
    firsts = np.zeros(num_tokens, np.int32)
    firsts[starts] = 1
    segment_ids = np.zeros(length, np.int32)
    segment_ids[:num_tokens] = np.cumsum(firsts)
    positions = np.zeros(length, np.int32)
    positions[:num_tokens] = np.arange(num_tokens) - starts[segment_ids[:num_tokens] - 1]
    padded = np.zeros(length, np.int32)
    padded[:num_tokens] = tokens
    return make_row(padded, segment_ids, positions, int(values[1]))


@contextmanager
def new_shard(path: Path) -> Iterator[Callable[[Row], None]]:
    """Gives the function that appends a row to a new shard.

    The shard is there when the `with` block ends well. Nothing is left of one that does not.

    Raises:
        OSError: the disk is full, for instance; names the file.
    """
    with draft_of(path) as draft:
        writer = array_record_module.ArrayRecordWriter(str(draft), _WRITER_OPTIONS)
        try:
            yield lambda row: writer.write(encode_row(row))
        finally:
            try:
                writer.close()
            except RuntimeError as error:  # so the writer reports a full disk
                raise OSError(f"{path}: shard cannot be written: {error}") from None


def read_manifest(folder: str | Path) -> dict[str, Any]:
    """Reads the manifest of a packed dataset.

    Args:
        folder: where it was packed to.

    Returns:
        `dataset.json`: "length", "num_rows", "num_tokens", "num_documents", "num_bytes",
        "tokenizer", "shards" and the settings it was packed with.

    Raises:
        ValueError: when there is none, so nothing was packed there or packing did not finish.
    """
    path = Path(folder).expanduser() / MANIFEST
    try:
        manifest = read_json(path)
    except OSError:
        raise ValueError(
            f"{folder}: no {MANIFEST}, so no packed dataset, or one whose packing did not finish"
        ) from None
    if manifest.get("format") != FORMAT:
        raise ValueError(f"{path}: format {manifest.get('format')!r} must be {FORMAT!r}")
    return manifest


class PackedRows(Sequence[Row]):
    """Rows of a packed dataset as a sequence; reads from the disk what is asked for.

    A slice is a list of rows.

    Attributes:
        folder: where it lies.
        manifest: its `dataset.json`.
        length: tokens in a row.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder).expanduser()
        self.manifest = read_manifest(folder)
        self.length: int = self.manifest["length"]
        shards = [s for s in self.manifest["shards"] if s["num_rows"]]
        if not shards:
            raise ValueError(f"{folder} is empty: it holds no row")
        for shard in shards:
            _check_shard(self.folder / shard["file"], shard["num_rows"])
        self._records = array_record_data_source.ArrayRecordDataSource(
            [f"{self.folder / s['file']}[0:{s['num_rows']}]" for s in shards]
        )

    def __len__(self) -> int:
        return len(self._records)

    @overload
    def __getitem__(self, index: SupportsIndex) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: SupportsIndex | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        given = operator.index(index)
        number = given + len(self) if given < 0 else given
        # An IndexError is how a sequence says where it ends; list() and iter() stop at it.
        if not 0 <= number < len(self):
            raise IndexError(f"{self.folder}: row {given} of {len(self)} rows")
        try:
            return decode_row(self._records[number], self.length)
        except (RuntimeError, ValueError) as error:
            raise ValueError(f"{self.folder}: row {number}: {error}") from None


def _check_shard(path: Path, num_rows: int) -> None:
    try:
        reader = array_record_module.ArrayRecordReader(str(path))
        found = reader.num_records()
        reader.close()
    except (RuntimeError, ValueError, OSError) as error:
        raise ValueError(f"{path}: shard cannot be read: {error}") from None
    if found != num_rows:
        raise ValueError(f"{path}: shard holds {found} rows, {MANIFEST} says {num_rows}")
