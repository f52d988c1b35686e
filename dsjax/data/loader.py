"""Rows of tokens for training and evaluation, from packed datasets or straight from documents.

Training is one endless stream of rows that all hosts share. Host p of P takes rows p, p + P, …, so
a step of n rows a host takes the next n * P rows of the stream. Over packed datasets a row follows
from its number, and the state is that number: it restores on another number of hosts. Over
documents the state is each host's own.
"""

from __future__ import annotations

import itertools
import re
import signal
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import grain
import numpy as np

from dsjax.config import DataConfig, SourceConfig
from dsjax.data.packed import PackedRows, Row
from dsjax.data.packing import documents_of, pack_rows, tokenized
from dsjax.data.sources import open_documents
from dsjax.data.tokenizer import Tokenizer, load_tokenizer

Batch = dict[str, np.ndarray]
Rows = Iterable[Row]


class WorkerLostError(RuntimeError):
    """A process that reads documents ended; those that it was to give are in no row."""


class Loader(grain.DatasetIterator[Row]):
    """The endless training stream of one host; each element is a row.

    Its state is a small dict that JSON can hold; being a grain iterator, orbax takes it as it is.
    """

    def __init__(self, rows: grain.IterDataset, *, packed: bool, process_count: int) -> None:
        super().__init__()
        self._iterator = iter(rows)
        self._packed = packed
        self._process_count = process_count

    def __next__(self) -> Row:
        try:
            return next(self._iterator)
        except RuntimeError as error:
            ended = re.search(r"terminated unexpectedly with exit code (-?\d+)", str(error))
            if ended is None:
                raise
            raise WorkerLostError(_lost_worker(int(ended[1]))) from error

    def next_batch(self, num_rows: int) -> Batch:
        """Returns the next rows of this host, stacked.

        Args:
            num_rows: this host's share of the batch; may differ from call to call.

        Returns:
            `tokens`, `targets`, `segment_ids`, `positions`, int32 [num_rows, length]; `weights`,
            float32 [num_rows, length]; `num_bytes`, int32 [num_rows].
        """
        return stack_rows([next(self) for _ in range(num_rows)])

    def get_state(self) -> dict[str, Any]:
        """Returns the place in the stream; over packed datasets the same on every host."""
        state = self._iterator.get_state()
        if self._packed:
            return {"num_rows": state["next_index"] * self._process_count}
        return {"process_count": self._process_count, "iterator": state}

    def set_state(self, state: dict[str, Any]) -> None:
        """Goes to a place in the stream.

        Args:
            state: what `get_state` gave.

        Raises:
            ValueError: when the state is of the other kind of data, or of a number of hosts that
                this one cannot go on from.
        """
        if self._packed != ("num_rows" in state):
            kind = "packed data" if "num_rows" in state else "documents"
            raise ValueError(f"data state is of {kind}, data.sources are not")
        count = self._process_count
        if self._packed:
            if state["num_rows"] % count:
                raise ValueError(
                    f"data state num_rows={state['num_rows']} must be a multiple of the "
                    f"{count} hosts"
                )
            self._iterator.set_state({"next_index": state["num_rows"] // count})
        else:
            if state["process_count"] != count:
                raise ValueError(
                    f"data state is of {state['process_count']} hosts, this run has {count}: only "
                    "packed data (dsjax data pack) restores on another number"
                )
            self._iterator.set_state(state["iterator"])

    def start_prefetch(self) -> None:
        """Starts reading ahead before the first row is asked for."""
        self._iterator.start_prefetch()

    def close(self) -> None:
        """Ends threads and processes that read ahead."""
        self._iterator.close()


def make_loader(data: DataConfig, *, process_index: int = 0, process_count: int = 1) -> Loader:
    """Opens the training stream.

    Args:
        data: the mixture, its tokenizer, length and seed.
        process_index: this host.
        process_count: hosts in all.

    Returns:
        The stream of this host's rows. Every source is shuffled again in each epoch and has no
        end; sources are mixed by weight, counted in rows.

    Raises:
        ValueError: when a source is missing, empty or unfinished, or was packed with another
            length or tokenizer.
    """
    assert 0 <= process_index < process_count
    tokenizer = load_tokenizer(data.tokenizer)
    packed = all(source.format == "arrayrecord" for source in data.sources)
    weights = [source.weight for source in data.sources]
    share = slice(process_index, None, process_count)
    if packed:
        streams = [
            grain.MapDataset.source(_open_packed(source, data, tokenizer))
            .seed(data.seed + i)
            .shuffle()
            .repeat(None)
            for i, source in enumerate(data.sources)
        ]
        mixed = grain.MapDataset.mix(streams, weights) if len(streams) > 1 else streams[0]
        # Hosts take turns within the shared stream, so it does not depend on their number.
        rows = mixed[share].to_iter_dataset(
            grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
        )
        return Loader(rows, packed=True, process_count=process_count)
    shares = []
    for i, source in enumerate(data.sources):
        if source.format == "arrayrecord":
            items: Any = _open_packed(source, data, tokenizer)
        else:
            items = open_documents(source)
        endless = grain.MapDataset.source(items).seed(data.seed + i).shuffle().repeat(None)[share]
        if source.format == "arrayrecord":
            shares.append(endless.to_iter_dataset())
        else:
            shares.append(_packed(endless, data, tokenizer))
    rows = grain.IterDataset.mix(shares, weights) if len(shares) > 1 else shares[0]
    return Loader(rows, packed=False, process_count=process_count)


class EvalBatches:
    """Held-out rows in order, as batches of one size; may be iterated again.

    A part of the rows is spread evenly over all of them, so that it holds of every document what
    its share is: the first rows can be those of one long document. It is the same each time.

    Every host sees the same number of batches. The last one is filled with padding: weights,
    segment ids and byte counts of 0. Sums over all hosts do not depend on their number.
    """

    def __init__(
        self,
        data: DataConfig,
        batch_size: int,
        *,
        process_index: int = 0,
        process_count: int = 1,
        max_rows: int = 0,
    ) -> None:
        tokenizer = load_tokenizer(data.tokenizer)
        self._data = data
        self._batch_size = batch_size
        self._process_index = process_index
        self._process_count = process_count
        self._max_rows = max_rows
        self._drawn: list[Row] | None = None
        self._sources = [_eval_rows(source, data, tokenizer) for source in data.eval_sources]

    def __iter__(self) -> Iterator[Batch]:
        wanted, rows = self._batch_size * self._process_count, []
        first = self._process_index * self._batch_size
        for row in self._rows():
            rows.append(row)
            if len(rows) == wanted:
                yield stack_rows(rows[first : first + self._batch_size])
                rows = []
        if rows:
            padding = {name: np.zeros_like(value) for name, value in rows[0].items()}
            rows += [padding] * (wanted - len(rows))
            yield stack_rows(rows[first : first + self._batch_size])

    def _rows(self) -> Iterator[Row]:
        if not self._max_rows:
            return itertools.chain.from_iterable(map(_read_ahead, self._sources))
        if self._drawn is None:
            # Rows packed as they are read have no number before they have been read once.
            counts = [_count_rows(source) for source in self._sources]
            wanted = set(spread_evenly(self._max_rows, sum(counts)))
            self._drawn = list(_rows_at(self._sources, counts, wanted))
        return iter(self._drawn)


def spread_evenly(count: int, total: int) -> list[int]:
    """Returns `count` of the numbers below `total`, at even distances; all of them if fewer."""
    return (
        [(2 * i + 1) * total // (2 * count) for i in range(count)]
        if count < total
        else [*range(total)]
    )


def _read_ahead(source: Rows) -> Rows:
    if not isinstance(source, PackedRows):
        return source
    options = grain.ReadOptions(num_threads=2, prefetch_buffer_size=64)
    return grain.MapDataset.source(source).to_iter_dataset(options)


def _count_rows(source: Rows) -> int:
    return len(source) if isinstance(source, PackedRows) else sum(1 for _ in source)


def _rows_at(sources: list[Rows], counts: list[int], wanted: set[int]) -> Iterator[Row]:
    first = 0
    for source, count in zip(sources, counts, strict=True):
        inside = [number - first for number in sorted(wanted) if first <= number < first + count]
        first += count
        if isinstance(source, PackedRows):
            yield from (source[number] for number in inside)
        else:
            chosen = set(inside)
            yield from (row for number, row in enumerate(source) if number in chosen)


def make_eval_batches(
    data: DataConfig,
    batch_size: int,
    *,
    process_index: int = 0,
    process_count: int = 1,
    max_rows: int = 0,
) -> EvalBatches:
    """Opens the held-out data.

    Args:
        data: its `eval_sources`, one after the other, with tokenizer and length; no weights.
        batch_size: rows of a batch on each host.
        process_index: this host.
        process_count: hosts in all.
        max_rows: rows over all hosts, spread evenly over all sources and kept in memory; 0 for all.

    Returns:
        An iterable of batches as `Loader.next_batch` gives them.

    Raises:
        ValueError: as `make_loader`, and when there are no eval_sources.
    """
    assert 0 <= process_index < process_count
    if not data.eval_sources:
        raise ValueError("data.eval_sources is empty: there is nothing to evaluate on")
    return EvalBatches(
        data,
        batch_size,
        process_index=process_index,
        process_count=process_count,
        max_rows=max_rows,
    )


def _lost_worker(exit_code: int) -> str:
    """Says in one line how a process of `data.num_workers` ended; signals are negative."""
    if exit_code < 0:
        how = f"was ended by signal {-exit_code}"
        if -exit_code in set(signal.Signals):
            how += f" ({signal.Signals(-exit_code).name})"
    else:
        how = f"ended with code {exit_code}"
    return (
        f"a process of data.num_workers {how}; where memory ran out, take fewer; run again to go "
        "on from the last checkpoint"
    )


def stack_rows(rows: list[Row]) -> Batch:
    """Stacks rows to one batch, name by name."""
    return {name: np.stack([row[name] for row in rows]) for name in rows[0]}


def _eval_rows(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer) -> Rows:
    if source.format == "arrayrecord":
        return _open_packed(source, data, tokenizer)
    return _packed(documents_of(open_documents(source)), data, tokenizer)


def _packed(
    documents: grain.MapDataset[Any], data: DataConfig, tokenizer: Tokenizer
) -> grain.IterDataset:
    tokens = tokenized(
        documents,
        tokenizer,
        length=data.length,
        long_documents=data.long_documents,
        num_workers=data.num_workers,
    )
    return pack_rows(
        tokens, length=data.length, num_packing_bins=data.num_packing_bins, seed=data.seed
    )


def _open_packed(source: SourceConfig, data: DataConfig, tokenizer: Tokenizer) -> PackedRows:
    rows = PackedRows(Path(source.path))
    if rows.length != data.length:
        raise ValueError(
            f"data.length={data.length} must be the {rows.length} that {source.path} was packed to"
        )
    if rows.manifest["tokenizer"]["sha256"] != tokenizer.sha256:
        raise ValueError(
            f"data.tokenizer={data.tokenizer!r} must be the one that {source.path} was packed "
            f"with, {rows.manifest['tokenizer']['spec']!r}"
        )
    return rows
