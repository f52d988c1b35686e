"""Checksums of the small files of a checkpoint or a run; its arrays have theirs in every chunk.

`checksums.json` holds a CRC-32 of each by its path in the folder. Whoever edits one of the files on
purpose removes it. Folders of older versions have none.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dsjax.files import DRAFT_SUFFIX, read_json, write_json

CHECKSUMS_FILE = "checksums.json"
_SMALL_FILES = (
    "dsjax.json",
    "run.json",
    "safetensors_headers.json",
    "hf/*",
    "params/_METADATA",
    "params/*/zarr.json",
)
_CRC = "crc32"


def write_checksums(folder: Path) -> None:
    """Writes the checksums of a checkpoint's or a run's small files, when all are complete.

    Raises:
        OSError: the disk does not take it; names the file.
    """
    files = sorted(file for pattern in _SMALL_FILES for file in folder.glob(pattern))
    found = {
        str(file.relative_to(folder)): _crc_of(file)
        for file in files
        if file.is_file() and not file.name.endswith(DRAFT_SUFFIX)
    }
    write_json(folder / CHECKSUMS_FILE, found)


def checksum_faults(folder: Path, under: str = "") -> list[str]:
    """Compares files with their checksums.

    Args:
        folder: a checkpoint or a run, with `checksums.json` or without.
        under: how the paths begin of those to compare, such as "hf/"; "" compares all.

    Returns:
        A line for each that is missing or differs; the file is named.
    """
    path = folder / CHECKSUMS_FILE
    if not path.is_file():
        return []
    try:
        stored = read_json(path)
    except ValueError as error:
        return [str(error)]
    faults = []
    for name, crc in stored.items():
        if not name.startswith(under):
            continue
        file = folder / name
        if not file.is_file():
            faults.append(f"{file}: is missing")
        elif _crc_of(file) != crc:
            faults.append(
                f"{file}: damaged, its checksum is not that in {CHECKSUMS_FILE} (if it was edited "
                "on purpose, remove that file)"
            )
    return faults


def require_checksums(folder: Path, under: str = "") -> None:
    """Raises the first of `checksum_faults` as a ValueError."""
    for fault in checksum_faults(folder, under):
        raise ValueError(fault)


def sealed(value: Mapping[str, Any]) -> dict[str, Any]:
    """Returns a JSON object with its checksum in it."""
    return {**value, _CRC: _crc_of_json(value)}


def is_sound(value: Mapping[str, Any]) -> bool:
    """Whether a JSON object still has the checksum that `sealed` gave it, or never had one."""
    rest = {name: item for name, item in value.items() if name != _CRC}
    return value.get(_CRC, _crc_of_json(rest)) == _crc_of_json(rest)


def _crc_of(file: Path) -> str:
    return f"{zlib.crc32(file.read_bytes()):08x}"


def _crc_of_json(value: Mapping[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(value, sort_keys=True).encode()):08x}"
