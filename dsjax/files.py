"""Files that are whole or not there, and JSON with the file named in every error."""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import logging
import os
import re
import shutil
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

# Ends the name of a file that is still being written.
# How the stand-in begins that a clone without Git LFS has in place of a large file.
LFS_POINTER = "version https://git-lfs"
LFS_FAULT = "a Git LFS pointer, not the file itself; run `git lfs pull` in its folder"
DRAFT_SUFFIX = ".draft"

_LOG = logging.getLogger(__name__)
# What a file system says that keeps no locks.
_NO_LOCKS = (errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK)
# What a file system on a network says while it is ill, and no damaged file does.
_PASSING = (
    errno.EIO,
    errno.ESTALE,
    errno.ETIMEDOUT,
    errno.EAGAIN,
    errno.EBUSY,
    errno.ECONNRESET,
    errno.ECONNABORTED,
    errno.EHOSTUNREACH,
    errno.ENETUNREACH,
    errno.EREMOTEIO,
)
# The same in words, of libraries that have their own errors (absl's status codes, HTTP's).
_PASSING_WORDS = re.compile(
    r"\b(UNAVAILABLE|DEADLINE_EXCEEDED|RESOURCE_EXHAUSTED|ABORTED)\b"
    r"|Input/output error|Stale file handle|\b(?:429|502|503|504) "
)


class StorageError(RuntimeError):
    """A storage does not answer, after all retries; what it holds is not known to be damaged."""


def is_passing(error: BaseException) -> bool:
    """Tells whether an error is of a storage that is ill, and not of what it holds."""
    found: BaseException | None = error
    while found is not None:
        if isinstance(found, OSError) and found.errno in _PASSING:
            return True
        if _PASSING_WORDS.search(str(found)):
            return True
        found = found.__cause__
    return False


def retried[T](
    what: str,
    body: Callable[[], T],
    retries: int = 3,
    seconds: float = 2.0,
) -> T:
    """Returns what the body gives, tried again where the storage fails; each time is said.

    Args:
        what: the file or folder, for messages.
        body: reads or writes, and may be repeated.
        retries: attempts after the first.
        seconds: before the first of these; doubled each time.

    Raises:
        StorageError: the last attempt failed as well.
    """
    for number in range(retries + 1):
        try:
            return body()
        except Exception as error:
            if not is_passing(error):
                raise
            first_line = (str(error).splitlines() or [type(error).__name__])[0]
            if number == retries:
                raise StorageError(f"{what}: the storage fails: {first_line}") from error
            delay = seconds * 2**number
            _LOG.warning(
                "%s: %s; trying again in %g s, retry %d of %d",
                what,
                first_line,
                delay,
                number + 1,
                retries,
            )
            time.sleep(delay)
    raise AssertionError


class LockHeldError(RuntimeError):
    """Another process, or another part of this one, holds a lock."""


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Holds a lock on a file while the body runs.

    The lock ends with the process, however it ends: the file stays, but is nothing by itself.

    Args:
        path: the file, made where there is none; says who holds it.

    Raises:
        LockHeldError: it is held already; says by which host and process, and since when.
        OSError: the file cannot be made; names it.
    """
    with naming(path):  # and not the body: its errors are of other files
        file = _open_locked(path)
    with file:
        yield


def _open_locked(path: Path) -> TextIO:
    """Opens a file, takes its lock and writes into it who holds it."""
    while True:
        file = path.open("a+", encoding="utf-8", errors="replace")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                    break
        except BlockingIOError:
            file.seek(0)
            holder = " ".join(file.read(200).replace("\0", "").split()) or "another process"
            file.close()
            raise LockHeldError(f"{path.parent}: in use by {holder}") from None
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                file.close()
                raise
            _LOG.warning("%s: this file system keeps no locks: start nothing else here", path)
            break
        # Its holder removed it between the opening and the lock, which is then of no file.
        file.close()
    try:
        now = datetime.datetime.now().astimezone().isoformat(" ", "seconds")
        file.truncate(0)
        file.write(f"process {os.getpid()} on {socket.gethostname()} since {now}\n")
        file.flush()
    except OSError:
        with contextlib.suppress(OSError):
            file.close()
        raise
    return file


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Gives the path of a draft; it becomes the file when the body ends well.

    The draft lies beside the file, so that a rename puts it there. What the body raises removes
    the draft and leaves the file as it was.

    Args:
        path: the file, new or to be replaced.

    Raises:
        OSError: the disk does not take it; names the file.
    """
    # One per process: a draft that a killed run left is in nobody's way.
    draft = path.with_name(f".{path.name}.{os.getpid()}{DRAFT_SUFFIX}")
    try:
        with naming(path):
            yield draft
            sync(draft)
            draft.replace(path)
            sync(path.parent)
    finally:
        draft.unlink(missing_ok=True)


def write_bytes(path: Path, content: bytes) -> None:
    """Writes a file at once or not at all.

    Raises:
        OSError: the disk does not take it; names the file.
    """
    with draft_of(path) as draft:
        draft.write_bytes(content)


def write_text(path: Path, text: str) -> None:
    """Writes a UTF-8 file at once or not at all; raises as `write_bytes`."""
    write_bytes(path, text.encode())


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes a JSON object at once or not at all; raises as `write_bytes`."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


def copy_file(source: Path, path: Path) -> None:
    """Copies a file at once or not at all; raises as `write_bytes`."""
    with draft_of(path) as draft:
        shutil.copyfile(source, draft)


def read_text(path: Path) -> str:
    """Reads a UTF-8 file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not UTF-8; names the file.
    """
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8: {error.reason} at byte {error.start}") from None


def read_json(path: Path) -> dict[str, Any]:
    """Reads a JSON object.

    Raises:
        OSError: the file cannot be read.
        ValueError: it holds no JSON object; names the file.
    """
    text = read_text(path)
    if text.startswith(LFS_POINTER):
        raise ValueError(f"{path}: {LFS_FAULT}")
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}:{error.lineno}: not JSON: {error.msg}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: holds a {type(value).__name__}, not an object")
    return value


def sync(path: Path) -> None:
    """Returns once what was written to a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Gives an error of the system the name of this file, where it has none or a draft's."""
    try:
        yield
    except OSError as error:
        unnamed = error.filename is None or str(error.filename).endswith(DRAFT_SUFFIX)
        if unnamed and error.errno is not None:
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise
