"""Which files a source is, and what they hold: found by pattern, told by suffix and first bytes."""

from __future__ import annotations

import gzip
import logging
import os
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import IO, Any, Literal, cast

Format = Literal["text", "jsonl", "parquet"]
SUFFIXES: dict[str, Format] = {
    ".txt": "text",
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".parquet": "parquet",
}
_COMPRESSED = {b"\x1f\x8b": ".gz", b"\x28\xb5\x2f\xfd": ".zst"}
_PARQUET = b"PAR1"
# What is text in no encoding that we read; a NUL byte tells the others.
_BINARY = {
    b"PK\x03\x04": "zip archive",
    b"%PDF-": "PDF document",
    b"\xfd7zXZ\x00": "xz archive",
    b"BZh": "bzip2 archive",
    b"\xff\xfe": "UTF-16 text",
    b"\xfe\xff": "UTF-16 text",
    _PARQUET: "Parquet file",
}
_FIRST_BYTES = 4096

logger = logging.getLogger(__name__)


def matching_files(folder: Path, pattern: str) -> list[Path]:
    """Finds the files below a folder.

    Links to folders are followed, each folder once, so that a link to one above ends nowhere.
    What macOS leaves beside files on foreign disks (`._NAME`, `__MACOSX`) is left out.

    Args:
        folder: where to look.
        pattern: as `pathlib.Path.glob` takes them; "**" stands for any number of folders.

    Returns:
        The files that match, by name.
    """
    wanted = pattern.split("/")
    found: list[Path] = []
    seen: set[tuple[int, int]] = set()
    links: list[Path] = []
    folders = [folder]
    while folders or links:
        # Links last: a folder that is also reached without one goes by its own name.
        here = folders.pop() if folders else links.pop(0)
        status = here.stat()
        if (status.st_dev, status.st_ino) in seen:
            continue
        seen.add((status.st_dev, status.st_ino))
        for entry in sorted(os.scandir(here), key=lambda entry: entry.name):
            path = here / entry.name
            if entry.name.startswith("._") or entry.name == "__MACOSX":
                continue
            if entry.is_dir():
                (links if entry.is_symlink() else folders).append(path)
            elif not _matches(path.relative_to(folder).parts, wanted):
                continue
            elif entry.is_file():
                found.append(path)
            elif entry.is_symlink():
                logger.warning("%s: a link to nothing, left out", path)
    return sorted(found)


def _matches(parts: Sequence[str], pattern: Sequence[str]) -> bool:
    if not pattern:
        return not parts
    if pattern[0] == "**":
        return any(_matches(parts[skip:], pattern[1:]) for skip in range(len(parts) + 1))
    return bool(parts) and fnmatchcase(parts[0], pattern[0]) and _matches(parts[1:], pattern[1:])


def infer_format(path: Path) -> Format:
    """Tells what a file of documents holds.

    Args:
        path: the file; or a folder, whose files must all have suffixes of one format.

    Returns:
        "text", "jsonl" or "parquet".

    Raises:
        ValueError: the first bytes are no text that we read, or a folder holds several formats.
    """
    if path.is_dir():
        kinds = {kind for file in matching_files(path, "**/*") if (kind := _by_suffix(file))}
        if len(kinds) > 1:
            raise ValueError(f"{path}: holds files of {sorted(kinds)}: name the format (--format)")
        return kinds.pop() if kinds else "text"
    by_suffix = _by_suffix(path)
    with open_plain(path) as stream:
        first = stream.read(_FIRST_BYTES)
    if first.startswith(_PARQUET):
        return "parquet"
    if by_suffix != "parquet":
        refuse_binary(first, str(path))
    if by_suffix:
        return by_suffix
    if path.with_suffix("").suffix == ".json" or path.suffix == ".json":
        raise ValueError(f"{path}: JSON documents are read as lines (.jsonl), one object a line")
    return "text"


def _by_suffix(path: Path) -> Format | None:
    name = path.with_suffix("") if path.suffix.lower() in _COMPRESSED.values() else path
    return SUFFIXES.get(name.suffix.lower())


def refuse_binary(first: bytes, origin: str) -> None:
    """Raises ValueError where the first bytes of a document are of no text."""
    for magic, kind in _BINARY.items():
        if first.startswith(magic):
            raise ValueError(f"{origin}: a {kind}, not UTF-8 text")
    if b"\0" in first[:_FIRST_BYTES]:
        raise ValueError(f"{origin}: binary data, not text (it holds NUL bytes)")


def open_plain(path: Path) -> IO[bytes]:
    """Opens a file for reading, through gzip or zstd where its first bytes are theirs.

    Raises:
        ValueError: zstd without pyarrow.
    """
    stream = path.open("rb")
    first = stream.read(4)
    stream.seek(0)
    if first.startswith(b"\x1f\x8b"):
        stream.close()
        return cast(IO[bytes], gzip.open(path))
    if first == b"\x28\xb5\x2f\xfd":
        stream.close()
        return _open_zstd(path)
    return stream


def read_plain(path: Path) -> bytes:
    """Reads a whole file as `open_plain` opens it; a damaged one is a ValueError that names it."""
    try:
        with open_plain(path) as stream:
            return stream.read()
    except (EOFError, gzip.BadGzipFile) as error:
        raise ValueError(f"{path}: damaged compressed file: {error}") from None
    except OSError as error:
        if error.filename is not None:
            raise
        raise ValueError(f"{path}: damaged compressed file: {error}") from None


def is_compressed(path: Path) -> bool:
    """Returns whether the first bytes are those of gzip or zstd."""
    with path.open("rb") as stream:
        first = stream.read(4)
    return any(first.startswith(magic) for magic in _COMPRESSED)


def _open_zstd(path: Path) -> Any:
    try:
        import pyarrow
    except ImportError:
        raise ValueError(f'{path}: zstd needs pyarrow: pip install "dsjax[parquet]"') from None
    return pyarrow.input_stream(str(path), compression="zstd")


class PlainCopies:
    """Compressed files unpacked to the temporary folder, for reading at any place.

    They are removed with this object, in the process that made it; copies of it in workers only
    read them.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        packed = [i for i, file in enumerate(files) if is_compressed(file)]
        if not packed:
            return
        folder = tempfile.mkdtemp(prefix="dsjax_")
        self._remove = weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        for i in packed:
            self.files[i] = Path(folder) / str(i)
            with self.files[i].open("wb") as copy:
                for block in _blocks(files[i]):
                    copy.write(block)

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files}


def _blocks(path: Path) -> Iterator[bytes]:
    try:
        with open_plain(path) as stream:
            while block := stream.read(1 << 22):
                yield block
    except (EOFError, OSError) as error:
        raise ValueError(f"{path}: damaged compressed file: {error}") from None
