"""How far an interrupted conversion got, and of what: the journal in its work folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

from dsjax.config.run_file import RUN_FILE
from dsjax.weights.param_store import ITEM, METADATA_FILE
from dsjax.weights.sources import MANIFEST, CheckpointSource, HFSource


class Journal:
    """Which tensors are safely on the disk, one a line; the first line says of what.

    Attributes:
        done: their names.
    """

    def __init__(self, work: FilePath, identity: Mapping[str, Any]):
        """Opens the journal of a work folder, or begins one.

        Raises:
            ValueError: it is of another conversion.
            BlockingIOError: another process is at work there.
        """
        path = work / "journal"
        self._file = path.open("a+", encoding="utf-8")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._file.close()
            raise BlockingIOError(f"{work}: another process converts there") from None
        self._file.seek(0)
        text = self._file.read()
        complete = text[: text.rfind("\n") + 1]  # a line that a kill cut short does not count
        self._file.truncate(len(complete.encode()))
        head, *names = complete.splitlines() or [""]
        expected = json.dumps(identity, sort_keys=True)
        if head and head != expected:
            self._file.close()
            raise ValueError(
                f"{work}: holds the unfinished conversion of something else, or of this source "
                "before it changed; remove it to begin again"
            )
        self.done = set(names)
        if not head:
            self._append([expected])

    def add(self, names: list[str]) -> None:
        """Notes that tensors are finished."""
        self.done |= set(names)
        self._append(names)

    def _append(self, lines: list[str]) -> None:
        self._file.write("".join(line + "\n" for line in lines))
        self._file.flush()
        os.fsync(self._file.fileno())

    def __enter__(self) -> Journal:
        return self

    def __exit__(self, *_: object) -> None:
        self._file.close()


def identity_of(source: HFSource | CheckpointSource) -> dict[str, Any]:
    """Returns what tells a source from another, or from itself after a change.

    Args:
        source: what is converted.
    """
    files = [
        source.where / name
        for name in ("config.json", MANIFEST, f"{ITEM}/{METADATA_FILE}", f"../../{RUN_FILE}")
    ]
    texts = [file for file in files if file.is_file()]
    identity: dict[str, Any] = {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in texts
    }
    if isinstance(source, HFSource):
        files = [source.where / name for name in source.folder.headers]
    else:
        files = texts
    stats = [(file.name, file.stat()) for file in files]
    identity["files"] = [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats]
    return identity
