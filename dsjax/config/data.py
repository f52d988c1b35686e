"""What a run reads: sources of documents or packed rows, and how they become rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from dsjax.config.fitting import checked
from dsjax.config.model import (
    require,
    require_folder,
    require_not_negative,
    require_positive,
    require_seed,
)


@checked
@dataclass(frozen=True)
class SourceConfig:
    """One source of documents or of packed rows.

    Attributes:
        path: a folder, or one file.
        format: what the files hold; "arrayrecord" is the output of `dsjax data pack`.
        weight: its share of a mixture, relative to the other sources'.
        text_field: field of a JSON line, or column of a Parquet file, that holds the text.
        glob: pattern of the files below a folder; "" takes the format's usual suffix.
    """

    path: str
    format: Literal["text", "jsonl", "parquet", "arrayrecord"] = "arrayrecord"
    weight: float = 1.0
    text_field: str = "text"
    glob: str = ""

    def __post_init__(self) -> None:
        require_positive("source", weight=self.weight)
        require_folder("source.path", self.path)


@checked
@dataclass(frozen=True)
class PrepareConfig:
    """Data that a run makes itself where they are not there yet.

    Documents are collected in `folder`. A tokenizer is trained on them, in the folder
    `data.tokenizer`. They are packed to the one source in `data.sources` and the one in
    `data.eval_sources`.

    Attributes:
        corpus: what the documents are; "python_library" is the source of the running Python's
            standard library.
        folder: where the documents go.
        vocab_size: ids of the tokenizer.
        max_bytes: bytes of documents at most; 0 for all.
    """

    corpus: Literal["python_library"]
    folder: str
    vocab_size: int
    max_bytes: int = 0

    def __post_init__(self) -> None:
        require_positive("data.prepare", vocab_size=self.vocab_size)
        require_not_negative("data.prepare", max_bytes=self.max_bytes)
        require(self.folder != "", "data.prepare.folder", self.folder, "must name a folder")
        require_folder("data.prepare.folder", self.folder)


@checked
@dataclass(frozen=True)
class DataConfig:
    """Where rows of tokens come from.

    Attributes:
        sources: the training mixture.
        eval_sources: held-out data; empty for none.
        tokenizer: "bytes", or the path of a tokenizer.json or of a folder that holds one.
        length: tokens in a row.
        seed: of the shuffle.
        num_workers: processes that read ahead; 0 reads in this one.
        num_packing_bins: rows filled at a time while packing documents.
        long_documents: what becomes of a document longer than a row.
        prepare: how the run makes its data first; None finds them ready.
        on_change: what a run does that goes on with other data than it had: "stop", "keep" its
            place as a count in the new data, or "restart" at their beginning.
    """

    sources: tuple[SourceConfig, ...]
    length: int
    eval_sources: tuple[SourceConfig, ...] = ()
    tokenizer: str = "bytes"
    seed: int = 0
    num_workers: int = 0
    num_packing_bins: int = 32
    long_documents: Literal["split", "error", "truncate"] = "split"
    prepare: PrepareConfig | None = None
    on_change: Literal["stop", "keep", "restart"] = "stop"

    def __post_init__(self) -> None:
        require(len(self.sources) > 0, "data.sources", self.sources, "must name at least one")
        require_positive("data", length=self.length, num_packing_bins=self.num_packing_bins)
        require(0 <= self.num_workers < 2**31, "data.num_workers", self.num_workers, "must be >= 0")
        require_seed("data.seed", self.seed)
        require(self.tokenizer != "", "data.tokenizer", self.tokenizer, 'must be a path or "bytes"')
        require_folder("data.tokenizer", self.tokenizer)
        if self.prepare is not None:
            for name in ("sources", "eval_sources"):
                sources = getattr(self, name)
                fits = len(sources) == 1 and sources[0].format == "arrayrecord"
                require(fits, f"data.{name}", sources, "must be one of packed rows, to prepare")
            require(self.tokenizer != "bytes", "data.tokenizer", "bytes", "must be a folder")
