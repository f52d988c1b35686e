"""Safetensors files in pieces: headers that are checked before use, and ranges of tensors.

The library's own reader maps whole files. Here a range of a tensor costs just its bytes. A header
that lies is refused with the file and the tensor named. A file can be written tensor by tensor, at
offsets known from the start, so that an interrupted conversion can go on.
"""

from __future__ import annotations

import json
import math
import os
import threading
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from dsjax.families.tensors import few
from dsjax.files import LFS_FAULT, LFS_POINTER
from dsjax.weights.finite import require_finite

INDEX_NAME = "model.safetensors.index.json"

# Bytes of one element; of these the model takes F32 and BF16 only.
_ITEM_SIZES = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 8),
}
_FLOAT_NAMES = {"F32": "float32", "BF16": "bfloat16"}
_OTHER_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".h5", ".msgpack")  # of other formats
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class StoredTensor:
    """A tensor as a header describes it.

    Attributes:
        dtype: the format's name, such as "BF16".
        shape: its dims.
        start: first byte in the file.
        stop: the byte after its last.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


@dataclass(frozen=True)
class Header:
    """The head of one file.

    Attributes:
        raw: its bytes, with those of the length before them.
        metadata: free text by key.
        tensors: by name, in the order of their bytes.
    """

    raw: bytes
    metadata: Mapping[str, str]
    tensors: Mapping[str, StoredTensor]

    @property
    def file_size(self) -> int:
        """Bytes of the whole file."""
        return max((t.stop for t in self.tensors.values()), default=len(self.raw))


def float_dtype(stored: str, where: str) -> np.dtype:
    """Returns the NumPy type of a weight's stored type.

    Raises:
        ValueError: the type is not one that weights may have; `where` names file and tensor.
    """
    if stored == "F16":
        raise ValueError(
            f"{where}: dtype F16 is refused, float16 overflows on DeepSeek-V2; "
            "convert the checkpoint to BF16 or F32 first"
        )
    if stored not in _FLOAT_NAMES:
        raise ValueError(f"{where}: dtype {stored} must be one of {', '.join(_FLOAT_NAMES)}")
    return jnp.dtype(_FLOAT_NAMES[stored])


def item_size(stored: str) -> int:
    """Returns the bytes of one element of a stored type."""
    return _ITEM_SIZES[stored]


def stored_name(dtype: np.dtype) -> str:
    """Returns the format's name of a weight's NumPy type."""
    return next(name for name, numpy_name in _FLOAT_NAMES.items() if numpy_name == dtype.name)


def make_header(
    tensors: Iterable[tuple[str, str, tuple[int, ...]]], metadata: Mapping[str, str]
) -> Header:
    """Lays a new file out: tensors one after the other, in the order given.

    Args:
        tensors: name, stored type and shape of each.
        metadata: free text by key.
    """
    entries: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for name, dtype, shape in tensors:
        size = math.prod(shape) * _ITEM_SIZES[dtype]
        span = [offset, offset + size]
        entries[name] = {"dtype": dtype, "shape": list(shape), "data_offsets": span}
        offset += size
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return parse_header(len(text).to_bytes(8, "little") + text, "header", None)


def read_header(path: Path) -> Header:
    """Reads and checks the header of a file.

    Raises:
        ValueError: the file is damaged; names it, and the tensor where there is one to name.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = file.read(8)
        if length == LFS_POINTER[:8].encode():
            raise ValueError(f"{path}: {LFS_FAULT}")
        if len(length) < 8:
            raise ValueError(f"{path}: {size} bytes are no safetensors file: it is truncated")
        count = int.from_bytes(length, "little")
        if count > _MAX_HEADER_BYTES:
            raise ValueError(f"{path}: a header of {count} bytes: not a safetensors file")
        if 8 + count > size:
            raise ValueError(
                f"{path}: the header ends at byte {8 + count} of {size}: the file is truncated"
            )
        return parse_header(length + file.read(count), str(path), size)


def parse_header(raw: bytes, where: str, file_size: int | None) -> Header:
    """Reads a header, and checks that its tensors fill the file without gap or overlap.

    Args:
        raw: the header with the 8 bytes of its length in front.
        where: the file, for messages.
        file_size: bytes of the file, or None where there is none yet.

    Raises:
        ValueError: the header is damaged; names the file and the tensor.
    """
    try:
        entries = json.loads(raw[8:], object_pairs_hook=_without_duplicates)
    except ValueError as error:  # a JSON or Unicode error, or a name given twice
        raise ValueError(f"{where}: damaged header: {error}") from None
    if not isinstance(entries, dict):
        raise ValueError(f"{where}: damaged header: not a JSON object")
    metadata = entries.pop("__metadata__", {})
    tensors = {
        name: _parse_entry(entry, len(raw), f"{where}: tensor {name}")
        for name, entry in entries.items()
    }
    tensors = dict(sorted(tensors.items(), key=lambda item: (item[1].start, item[1].stop)))
    end, previous = len(raw), "the header"
    for name, tensor in tensors.items():
        if tensor.start != end:
            fault = "overlaps" if tensor.start < end else "leaves a gap after"
            raise ValueError(
                f"{where}: tensor {name}: begins at byte {tensor.start} and {fault} {previous}, "
                f"which ends at {end}"
            )
        if file_size is not None and tensor.stop > file_size:
            raise ValueError(
                f"{where}: tensor {name}: ends at byte {tensor.stop} of {file_size}: "
                "the file is truncated or its header lies"
            )
        end, previous = tensor.stop, name
    if file_size is not None and end != file_size:
        raise ValueError(f"{where}: {file_size - end} bytes lie after the last tensor {previous}")
    return Header(raw, metadata, tensors)


def _parse_entry(entry: Any, base: int, where: str) -> StoredTensor:
    try:
        dtype, shape, (start, stop) = entry["dtype"], entry["shape"], entry["data_offsets"]
        numbers = [*shape, start, stop]
    except (TypeError, KeyError, ValueError):
        raise ValueError(f"{where}: damaged header entry {json.dumps(entry)[:200]}") from None
    if not all(type(number) is int and number >= 0 for number in numbers):
        raise ValueError(f"{where}: shape {shape} and data_offsets [{start}, {stop}] are no sizes")
    if dtype not in _ITEM_SIZES:
        raise ValueError(f"{where}: unknown dtype {dtype!r}")
    needed = math.prod(shape) * _ITEM_SIZES[dtype]
    if stop - start != needed:
        raise ValueError(
            f"{where}: data_offsets [{start}, {stop}] hold {stop - start} bytes, "
            f"its shape {shape} of {dtype} needs {needed}"
        )
    return StoredTensor(dtype, tuple(shape), base + start, base + stop)


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    entries = dict(pairs)
    if len(entries) != len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice} occurs twice")
    return entries


class SafetensorsFolder:
    """The safetensors files of one checkpoint, checked against each other and their index.

    Attributes:
        path: the folder.
        headers: of each file, by its name.
        tensors: file name and place of each tensor, by its name.
    """

    def __init__(self, path: Path, allow_nonfinite: bool = False):
        """Reads every header; no tensor is read.

        Args:
            path: the folder.
            allow_nonfinite: whether `read` gives NaN and infinity.

        Raises:
            ValueError: a file is missing or damaged, or the index does not fit the files.
        """
        self.path = path
        self._allow_nonfinite = allow_nonfinite
        index_path = path / INDEX_NAME
        weight_map = _read_weight_map(index_path) if index_path.is_file() else None
        if weight_map is None:
            # Copied from a Mac, every file has a sidecar that begins with a dot.
            found = path.glob("*.safetensors")
            names = sorted(file.name for file in found if not file.name.startswith("."))
            if not names:
                foreign = sorted(f.name for f in path.iterdir() if f.suffix in _OTHER_SUFFIXES)
                hint = (
                    f", but {few(foreign)}: save the model again as safetensors" if foreign else ""
                )
                raise ValueError(f"{path}: holds no safetensors files{hint}")
        else:
            names = sorted(set(weight_map.values()))
            for name in names:
                if not (path / name).is_file():
                    tensor = next(t for t, file in weight_map.items() if file == name)
                    raise ValueError(
                        f"{index_path}: places tensor {tensor} in {name}, which is not there"
                    )
        self.headers = {name: read_header(path / name) for name in names}
        self.tensors: dict[str, tuple[str, StoredTensor]] = {}
        for name, header in self.headers.items():
            for tensor_name, stored in header.tensors.items():
                if tensor_name in self.tensors:
                    other = self.tensors[tensor_name][0]
                    raise ValueError(f"{path / name}: tensor {tensor_name} is also in {other}")
                self.tensors[tensor_name] = (name, stored)
        if weight_map is not None:
            self._check_index(index_path, weight_map)
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def _check_index(self, index_path: Path, weight_map: Mapping[str, str]) -> None:
        faults = []
        for tensor, name in weight_map.items():
            if self.tensors.get(tensor, (None,))[0] != name:
                faults.append(f"places tensor {tensor} in {name}, which does not hold it")
        faults += [
            f"does not list tensor {tensor} of {name}"
            for tensor, (name, _) in self.tensors.items()
            if tensor not in weight_map
        ]
        if faults:
            raise ValueError(f"{index_path}: {few(faults)}")

    def describe(self, tensor: str) -> str:
        """Returns "FILE: tensor NAME" for messages."""
        return f"{self.path / self.tensors[tensor][0]}: tensor {tensor}"

    def read(self, tensor: str, start: int, stop: int) -> np.ndarray:
        """Reads elements start to stop of a tensor, flat, in its stored type.

        Raises:
            ValueError: the type is not one of a weight, the file ends too early, or the elements
                are NaN or infinite.
        """
        name, stored = self.tensors[tensor]
        dtype = float_dtype(stored.dtype, self.describe(tensor))
        out = np.empty(stop - start, dtype)
        buffer = memoryview(out.view(np.uint8))
        offset = stored.start + start * dtype.itemsize
        while buffer:
            count = os.preadv(self._open(name), [buffer], offset)
            if count == 0:
                raise ValueError(f"{self.describe(tensor)}: the file ends at byte {offset}")
            buffer, offset = buffer[count:], offset + count
        if not self._allow_nonfinite:
            require_finite(out, self.describe(tensor))
        return out

    def _open(self, name: str) -> int:
        with self._lock:
            if name not in self._files:
                self._files[name] = os.open(self.path / name, os.O_RDONLY)
            return self._files[name]

    def close(self) -> None:
        """Closes the files."""
        with self._lock:
            for descriptor in self._files.values():
                os.close(descriptor)
            self._files.clear()


def _read_weight_map(index_path: Path) -> dict[str, str]:
    try:
        weight_map = json.loads(index_path.read_text(encoding="utf-8"))["weight_map"]
        pairs = {str(tensor): str(name) for tensor, name in weight_map.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{index_path}: damaged index: {error!r}") from None
    for tensor, name in pairs.items():
        if Path(name).name != name:
            raise ValueError(f"{index_path}: places tensor {tensor} outside the folder: {name}")
    return pairs
