"""Writing a Hugging Face checkpoint: which tensor goes where, and config.json beside it."""

from __future__ import annotations

import json
import logging
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path as FilePath
from typing import Any

import numpy as np

from dsjax.config import ModelConfig
from dsjax.families import from_hf_config, read_otherwise, to_hf_config
from dsjax.families.tensors import HFTable, HFTensor, Part, Path
from dsjax.files import read_json
from dsjax.weights.assets import Assets, special_ids
from dsjax.weights.safetensors import Header, item_size, make_header, parse_header, stored_name

_LOG = logging.getLogger(__name__)

MAX_FILE_BYTES = 5_000_000_000

# Keeps the headers of the files that a checkpoint was converted from.
HEADERS_FILE = "safetensors_headers.json"


@dataclass(frozen=True)
class ShardPlan:
    """The files of a checkpoint before they are written.

    Attributes:
        headers: of each file, by name.
        index: the bytes of the index, or None where one file holds all.
    """

    headers: Mapping[str, Header]
    index: bytes | None

    @property
    def num_bytes(self) -> int:
        """Bytes of all files."""
        return sum(header.file_size for header in self.headers.values())


def plan_shards(
    table: HFTable,
    dtype: Callable[[Path], np.dtype],
    *,
    original: Mapping[str, Header] | None = None,
    index: bytes | None = None,
    max_file_bytes: int | None = None,
) -> ShardPlan:
    """Decides which file holds which tensor.

    Args:
        table: the model's tensors.
        dtype: returns the type that a parameter's tensors are written in.
        original: headers of the checkpoint that the weights once came from; taken as they are
            where the tensors are still the same, so that the same files come out.
        index: the index beside them, if there was one.
        max_file_bytes: size at which the next file begins, by default `MAX_FILE_BYTES`; a tensor
            is never divided.

    Raises:
        ValueError: parameters that make up one tensor differ in their type.
    """
    wanted = {
        name: (_tensor_dtype(tensor, dtype), tensor.shape) for name, tensor in table.tensors.items()
    }
    if original is not None:
        held = {
            name: (stored.dtype, stored.shape)
            for header in original.values()
            for name, stored in header.tensors.items()
        }
        if held == wanted:
            return ShardPlan(original, index)
    return lay_out(wanted, max_file_bytes)


def lay_out(
    wanted: Mapping[str, tuple[str, tuple[int, ...]]], max_file_bytes: int | None = None
) -> ShardPlan:
    """Divides tensors over files, in order.

    Args:
        wanted: stored type and shape of each tensor, by name.
        max_file_bytes: size at which the next file begins, by default `MAX_FILE_BYTES`.
    """
    limit = max_file_bytes or MAX_FILE_BYTES
    groups: list[list[str]] = [[]]
    filled = 0
    for name, (stored, shape) in wanted.items():
        size = int(np.prod(shape)) * item_size(stored)
        if groups[-1] and filled + size > limit:
            groups.append([])
            filled = 0
        groups[-1].append(name)
        filled += size
    headers = {}
    weight_map: dict[str, str] = {}
    for number, names in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        if len(groups) == 1:
            file = "model.safetensors"
        headers[file] = make_header(
            ((name, *wanted[name]) for name in sorted(names)), {"format": "pt"}
        )
        weight_map |= dict.fromkeys(names, file)
    if len(groups) == 1:
        return ShardPlan(headers, None)
    total = sum(header.file_size - len(header.raw) for header in headers.values())
    content = {
        "metadata": {"total_size": total},
        "weight_map": dict(sorted(weight_map.items())),
    }
    return ShardPlan(headers, (json.dumps(content, indent=2) + "\n").encode())


def pack_headers(headers: Mapping[str, Header]) -> str:
    """Returns headers as the text that a checkpoint of ours keeps."""
    return json.dumps({name: header.raw[8:].decode() for name, header in headers.items()})


def unpack_headers(path: FilePath) -> dict[str, Header]:
    """Reads what `pack_headers` gave."""
    headers = {}
    for name, text in read_json(path).items():
        raw = str(text).encode()
        headers[name] = parse_header(len(raw).to_bytes(8, "little") + raw, f"{path}: {name}", None)
    return headers


def read_tensor(
    table: HFTable, name: str, read: Callable[[Path, tuple[slice, ...]], np.ndarray]
) -> np.ndarray:
    """Puts one tensor together from windows of parameters.

    Args:
        table: the model's tensors.
        name: the tensor.
        read: reads a window of a parameter.
    """
    tensor = table.tensors[name]

    def read_part(part: Part) -> np.ndarray:
        shape = tensor.part_shape(part)
        stacked = tuple(slice(i, i + 1) for i in part.index)
        window = stacked + tuple(slice(0, size) for size in shape)
        return read(part.path, window).reshape(shape)

    return tensor.from_parts(read_part)


def create_file(path: FilePath, header: Header) -> None:
    """Creates a file with its header; keeps the tensors of one that is there.

    Raises:
        OSError: the disk is full, for instance; names the file.
    """
    _write_at(path, 0, memoryview(header.raw))


def write_tensor(path: FilePath, header: Header, name: str, values: np.ndarray) -> None:
    """Writes a tensor to its place in a file.

    Raises:
        OSError: the disk is full, for instance; names the file.
    """
    stored = header.tensors[name]
    assert values.nbytes == stored.stop - stored.start, name
    flat = np.ascontiguousarray(values).reshape(-1)
    _write_at(path, stored.start, memoryview(flat.view(np.uint8)))


def _write_at(path: FilePath, offset: int, buffer: memoryview) -> None:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
    try:
        while buffer:
            count = os.pwrite(descriptor, buffer[: 1 << 30], offset)
            buffer, offset = buffer[count:], offset + count
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        os.close(descriptor)


def config_json(config: ModelConfig, dtype: str, assets: Assets) -> bytes:
    """Returns the `config.json` to go with the weights.

    The original one if there is one and it describes this model; then only the type of the
    tensors is brought up to date, if it has changed.

    Args:
        config: the model.
        dtype: type of the tensors, such as "bfloat16".
        assets: the model's small files.
    """
    for difference in read_otherwise(config):
        _LOG.warning("transformers reads this export differently: %s", difference)
    if "config.json" in assets:
        raw = assets["config.json"].read_bytes()
        original: dict[str, Any] = json.loads(raw)
        if _describes(original, config):
            keys = [key for key in ("torch_dtype", "dtype") if key in original]
            if not keys or all(original[key] == dtype for key in keys):
                return raw
            return _dump(original | dict.fromkeys(keys, dtype))
    bos, eos = special_ids(assets)
    content = to_hf_config(config, dtype=dtype, bos_id=bos or 0, eos_id=eos or 0)
    return _dump(content | {"bos_token_id": bos, "eos_token_id": eos})


def main_dtype(table: HFTable, dtype: Callable[[Path], np.dtype]) -> str:
    """Returns the name of the type that most numbers of a model are stored in."""
    numbers: dict[str, int] = {}
    for path, param in table.params.items():
        name = dtype(path).name
        numbers[name] = numbers.get(name, 0) + math.prod(param.shape)
    return max(numbers, key=lambda name: numbers[name])


def _describes(original: Mapping[str, Any], config: ModelConfig) -> bool:
    try:
        described = from_hf_config(original)
    except ValueError:
        return False
    return described == config


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _tensor_dtype(tensor: HFTensor, dtype: Callable[[Path], np.dtype]) -> str:
    names = {stored_name(dtype(part.path)) for part in tensor.parts}
    if len(names) > 1:
        parts = ", ".join(".".join(part.path) for part in tensor.parts)
        raise ValueError(f"tensor {tensor.name}: its parameters {parts} differ in dtype: {names}")
    return names.pop()
