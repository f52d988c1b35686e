"""Random-access sources of documents: text files, JSON lines, Parquet.

A source keeps an index in memory (paths, or the offsets of lines), never the corpus; it is
picklable, so that workers can open it again. Sources of packed rows are in `packed.py`.
"""

from __future__ import annotations

import bisect
import codecs
import json
import logging
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from dsjax.config import SourceConfig
from dsjax.data.find_files import (
    PlainCopies,
    matching_files,
    open_plain,
    read_plain,
    refuse_binary,
)

_DEFAULT_GLOBS = {"text": "**/*.txt", "jsonl": "**/*.jsonl", "parquet": "**/*.parquet"}
_SUFFIXES = ("", ".gz", ".zst")
_SCAN_BYTES = 1 << 24
_FIRST_BYTES = 4096

logger = logging.getLogger(__name__)


class Document(NamedTuple):
    """One document.

    Attributes:
        text: its text.
        origin: where it lies, for messages: the file, with a line or row where it has one.
        intact: False when bytes that are no UTF-8 were replaced by U+FFFD.
    """

    text: str
    origin: str
    intact: bool = True


class DocumentSource(Protocol):
    """Documents by index, in an order that depends on names alone."""

    files: list[Path]

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Document: ...


class TextSource:
    """Each non-empty file is a document; gzip and zstd are read through."""

    def __init__(self, files: list[Path]) -> None:
        self.files = [file for file in files if file.stat().st_size > 0]

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: int) -> Document:
        file = self.files[index]
        data = read_plain(file)
        refuse_binary(data, str(file))
        return _document(data, str(file))


class JsonLinesSource:
    """Each non-blank line of the files is a JSON object with the text in one field.

    Files of gzip or zstd are unpacked to the temporary folder, where lines are found at random.
    """

    def __init__(self, files: list[Path], text_field: str) -> None:
        self.text_field = text_field
        for file in files:
            with open_plain(file) as stream:
                refuse_binary(stream.read(_FIRST_BYTES), str(file))
        self._copies = PlainCopies(files)
        spans = [_line_spans(file) for file in self._copies.files]
        kept = [i for i, span in enumerate(spans) if len(span)]
        self.files = [files[i] for i in kept]
        self._plain = [self._copies.files[i] for i in kept]
        self._spans = [spans[i] for i in kept]
        self._ends = np.cumsum([len(span) for span in self._spans]).tolist()

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        which, row = _locate(self._ends, index)
        start, end, number = self._spans[which][row].tolist()
        origin = f"{self.files[which]}:{number}"
        with self._plain[which].open("rb") as stream:
            stream.seek(start)
            line = stream.read(end - start)
        if not line.removeprefix(codecs.BOM_UTF8).strip():
            return Document("", origin)
        try:
            text, intact = _decode(line)
            value = json.loads(text)[self.text_field]
            if not isinstance(value, str):
                raise TypeError(f"field {self.text_field!r} is {type(value).__name__}, not text")
        except json.JSONDecodeError as error:
            problem = f"not JSON: {error.msg}"
        except RecursionError:
            problem = "JSON nested too deeply"
        except KeyError:
            problem = f"no field {self.text_field!r}"
        except TypeError as error:
            problem = str(error) if "field" in str(error) else "not a JSON object"
        except ValueError as error:  # a number of too many digits
            problem = f"not JSON: {error}"
        else:
            # A lone surrogate is legal JSON but no text: it cannot be written as UTF-8.
            clean = value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
            if clean != value:
                logger.warning("%s: lone surrogates replaced by U+FFFD", origin)
            return Document(clean, origin, intact and clean == value)
        raise ValueError(f"{origin}: {problem}")


class ParquetSource:
    """Each row of the files is a document, its text in one column.

    A row group is read whole, and the last one is kept. Reading in order is fast; reading shuffled
    is slow, so pack such a corpus first.
    """

    def __init__(self, files: list[Path], text_field: str) -> None:
        self._parquet: Any = _import_parquet()
        self.text_field = text_field
        self.files = files
        self._groups: list[tuple[int, int]] = []
        lengths = []
        for which, file in enumerate(files):
            with self._open(file) as reader:
                if text_field not in reader.schema_arrow.names:
                    raise ValueError(f"{file}: no column {text_field!r}")
                for group in range(reader.num_row_groups):
                    self._groups.append((which, group))
                    lengths.append(reader.metadata.row_group(group).num_rows)
        self._ends = np.cumsum(lengths).tolist()
        self._cached: tuple[int, Any] = (-1, None)

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_cached": (-1, None), "_parquet": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _parquet=_import_parquet())

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __getitem__(self, index: int) -> Document:
        position, row = _locate(self._ends, index)
        which, group = self._groups[position]
        cached, column = self._cached
        if cached != position:
            with self._open(self.files[which]) as reader:
                column = reader.read_row_group(group, columns=[self.text_field]).column(0)
            self._cached = (position, column)
        origin = f"{self.files[which]}:row {row} of row group {group}"
        value = column[row].as_py()
        if isinstance(value, bytes):
            return _document(value, origin)
        if not isinstance(value, str):
            kind = "null" if value is None else type(value).__name__
            raise ValueError(f"{origin}: column {self.text_field!r} is {kind}, not text")
        return Document(value, origin)

    def _open(self, file: Path) -> Any:
        try:
            return self._parquet.ParquetFile(file)
        except Exception as error:  # pyarrow's own errors, which do not name the file
            raise ValueError(f"{file}: not a Parquet file: {error}") from None


def open_documents(source: SourceConfig) -> DocumentSource:
    """Opens a source of documents.

    Args:
        source: where they lie and in which format ("text", "jsonl" or "parquet").

    Returns:
        The documents by index, ordered by file name, then by place in the file.

    Raises:
        ValueError: when the path does not exist, no file matches, or there is no document.
    """
    if source.format not in _DEFAULT_GLOBS:
        raise ValueError(f"source.format={source.format!r} must be one of {list(_DEFAULT_GLOBS)}")
    files = _find_files(source)
    documents: DocumentSource
    if source.format == "text":
        documents = TextSource(files)
    elif source.format == "jsonl":
        documents = JsonLinesSource(files, source.text_field)
    else:
        documents = ParquetSource(files, source.text_field)
    if len(documents) == 0:
        raise ValueError(f"source.path={source.path!r} is empty: no document in {len(files)} files")
    return documents


def _find_files(source: SourceConfig) -> list[Path]:
    path = Path(source.path).expanduser()
    if path.is_file():
        return [path]
    if not path.is_dir():
        raise ValueError(f"source.path={source.path!r} must be a folder or a file that exists")
    pattern = source.glob or _DEFAULT_GLOBS[source.format]
    suffixes = _SUFFIXES if not source.glob and source.format != "parquet" else ("",)
    files = sorted({f for end in suffixes for f in matching_files(path, pattern + end)})
    if not files:
        raise ValueError(f"source.path={source.path!r} is empty: no file matches {pattern!r}")
    return files


def _locate(ends: list[int], index: int) -> tuple[int, int]:
    if not 0 <= index < ends[-1]:
        raise IndexError(index)
    part = bisect.bisect_right(ends, index)
    return part, index - (ends[part - 1] if part else 0)


def _line_spans(file: Path) -> np.ndarray:
    """Returns start, end and number, int64 [num_lines, 3], of the lines that are not blank."""
    breaks = []
    offset = 0
    with file.open("rb") as stream:
        while block := stream.read(_SCAN_BYTES):
            found = np.flatnonzero(np.frombuffer(block, np.uint8) == ord("\n"))
            breaks.append(found.astype(np.int64) + offset)
            offset += len(block)
    ends = np.append(np.concatenate(breaks) if breaks else np.empty(0, np.int64), offset)
    starts = np.insert(ends[:-1] + 1, 0, 0)
    spans = np.stack([starts, ends, np.arange(1, len(ends) + 1)], axis=1)
    # Two bytes are the least a JSON value that can hold a field takes ("{}"), so "" and "\r" go.
    return spans[ends - starts >= 2]


def _decode(data: bytes) -> tuple[str, bool]:
    try:
        return data.decode("utf-8-sig"), True  # a byte order mark is no text
    except UnicodeDecodeError:
        return data.decode("utf-8-sig", errors="replace"), False


def _document(data: bytes, origin: str) -> Document:
    text, intact = _decode(data)
    if not intact:
        logger.warning("%s: bytes that are no UTF-8 replaced by U+FFFD", origin)
    return Document(text, origin, intact)


def _import_parquet() -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise ValueError(
            'source.format="parquet" needs pyarrow: pip install "dsjax[parquet]"'
        ) from None
    return pyarrow.parquet
