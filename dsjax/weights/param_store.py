"""The parameters of an orbax checkpoint as arrays on disk, read and written in windows.

orbax itself saves and restores whole trees, too much at once for a stacked array of 148 GB. So
orbax writes a new store's metadata, from arrays of one number, and tensorstore, which orbax uses
too, writes the arrays. orbax loads the result like any other.
"""

from __future__ import annotations

import functools
import importlib
import logging
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path as FilePath
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tensorstore as ts
from orbax.checkpoint import v1 as ocp

from dsjax.files import read_json
from dsjax.weights.finite import require_finite
from dsjax.weights.layouts import Path, current_path

_LOG = logging.getLogger(__name__)

ITEM = "params"
OPTIMIZER = "optimizer"  # of a run's step, beside the parameters
EMA = "ema"  # of the optimizer: the tree of the parameters' moving average
METADATA_FILE = "_METADATA"  # orbax's description of an item

# A chunk holds one tensor, or rows of it where it is larger than this.
_MAX_CHUNK_BYTES = 64 << 20
_CACHE_BYTES = 256 << 20


class ParamStore:
    """The arrays of the checkpointable "params" in one orbax checkpoint.

    Attributes:
        directory: the checkpoint, which holds the folder "params".
        arrays: a tensorstore of each parameter, by the path that it has today.
    """

    def __init__(
        self,
        directory: FilePath,
        arrays: Mapping[Path, ts.TensorStore],
        allow_nonfinite: bool = False,
        item: str = ITEM,
    ):
        self._item = directory / item
        self.directory = directory
        self.arrays = arrays
        self._allow_nonfinite = allow_nonfinite

    @classmethod
    def open(
        cls,
        directory: FilePath,
        allow_nonfinite: bool = False,
        item: str = ITEM,
        tree: str = "",
    ) -> ParamStore:
        """Opens the parameters that orbax, or `create`, wrote.

        Args:
            directory: the checkpoint.
            allow_nonfinite: whether `read` gives NaN and infinity.
            item: the checkpointable, "params" or a run's "optimizer".
            tree: the one of the item's trees that is opened, by itself; "" opens all.

        Raises:
            ValueError: the folder holds no such parameters, or one of them cannot be opened.
        """
        folder = (directory / item).resolve()  # tensorstore takes no `..`
        metadata = _read_metadata(directory, item)
        keys = [path for path in _paths(metadata) if not tree or path[0] == tree]
        if not keys:
            raise ValueError(f"{folder}: holds no {tree}: this run keeps none")
        driver = "zarr3" if metadata.get("use_zarr3") else "zarr"
        # Where zeros are stored like any other value, a chunk that is absent was lost.
        complete = bool(metadata.get("store_array_data_equal_to_fill_value"))
        arrays = {}
        for path in keys:
            name = ".".join(path)
            if metadata.get("use_ocdbt"):
                base = {"driver": "file", "path": f"{folder}/"}
                kvstore = {"driver": "ocdbt", "base": base, "path": f"{name}/"}
            else:
                kvstore = {"driver": "file", "path": f"{folder / name}/"}
            spec = {
                "driver": driver,
                "kvstore": kvstore,
                "fill_missing_data_reads": not complete,
            }
            try:
                opened = ts.open(spec, open=True).result()
            except ValueError as error:
                raise ValueError(f"{folder}: parameter {name}: {one_line(error)}") from None
            path = path[1:] if tree else path
            arrays[current_path(path) if item == ITEM else path] = opened
        return cls(directory, _with_cache(arrays), allow_nonfinite, item)

    @classmethod
    def create(
        cls,
        directory: FilePath,
        params: Mapping[Path, tuple[tuple[int, ...], np.dtype]],
        num_stacked: Mapping[Path, int],
    ) -> ParamStore:
        """Creates the parameters of a new checkpoint, or opens those an earlier call created.

        Args:
            directory: the checkpoint; does not exist, or was made by this with the same params.
            params: shape and type of each parameter, by path.
            num_stacked: leading dims of each that count layers and experts: a chunk spans none.
        """
        if not (directory / ITEM / METADATA_FILE).exists():
            _write_skeleton(directory, params)
        arrays = {}
        for path, (shape, dtype) in params.items():
            folder = (directory / ITEM / ".".join(path)).resolve()
            chunk = chunk_shape(shape, dtype, num_stacked[path])
            spec = {
                "driver": "zarr3",
                "kvstore": {"driver": "file", "path": f"{folder}/"},
                "metadata": {
                    "shape": list(shape),
                    "chunk_grid": {
                        "name": "regular",
                        "configuration": {"chunk_shape": list(chunk)},
                    },
                    "chunk_key_encoding": {"name": "default"},
                    "codecs": [
                        {"name": "bytes", "configuration": {"endian": "little"}},
                        {"name": "crc32c"},
                    ],
                    "data_type": dtype.name,
                    "fill_value": 0.0 if jnp.issubdtype(dtype, jnp.floating) else 0,
                },
                "store_data_equal_to_fill_value": True,
            }
            arrays[path] = ts.open(spec, open=True, create=True).result()
        return cls(directory, arrays)

    def shape(self, path: Path) -> tuple[int, ...]:
        """Returns the shape of a parameter."""
        return tuple(self.arrays[path].shape)

    def dtype(self, path: Path) -> np.dtype:
        """Returns the stored type of a parameter."""
        return jnp.dtype(self.arrays[path].dtype.numpy_dtype)

    def chunk(self, path: Path) -> tuple[int, ...]:
        """Returns the shape of what a reading decodes at least."""
        sizes = self.arrays[path].chunk_layout.read_chunk.shape or self.shape(path)
        return tuple(size or 1 for size in sizes)

    def read(self, path: Path, window: tuple[slice | int, ...]) -> np.ndarray:
        """Reads a window of a parameter.

        Raises:
            ValueError: the data are damaged, NaN or infinite; names the folder and the parameter.
        """
        where = f"{self._item}: parameter {'.'.join(path)}"
        try:
            values = self.arrays[path][window].read().result()
        except ValueError as error:
            raise ValueError(f"{where}: {one_line(error)}") from None
        if (
            not self._allow_nonfinite
            and values.dtype.itemsize in (2, 4)
            and values.dtype.kind in "fV"
        ):
            require_finite(values, where)
        return values

    def write(self, path: Path, window: tuple[slice | int, ...], values: np.ndarray) -> ts.Future:
        """Begins to write a window; the future is done when it is on the disk."""
        return self.arrays[path][window].write(values).commit


def stored_paths(directory: FilePath) -> list[Path]:
    """Returns the paths of a checkpoint's parameters as they are stored.

    Raises:
        ValueError: the folder holds no such parameters.
    """
    return _paths(_read_metadata(directory))


def _read_metadata(directory: FilePath, item: str = ITEM) -> dict[str, Any]:
    file = directory.absolute() / item / METADATA_FILE
    try:
        metadata = read_json(file)
        _paths(metadata)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: no orbax parameters: {error!r}") from None
    return metadata


def _paths(metadata: Mapping[str, Any]) -> list[Path]:
    return [
        tuple(str(part["key"]) for part in entry["key_metadata"])
        for entry in metadata["tree_metadata"].values()
    ]


def chunk_shape(shape: tuple[int, ...], dtype: np.dtype, num_stacked: int) -> tuple[int, ...]:
    """Returns the chunk that holds one tensor, cut along its first dim where it is large."""
    inner = shape[num_stacked:]
    rows = max(1, _MAX_CHUNK_BYTES // (math.prod(inner[1:]) * dtype.itemsize))
    return (1,) * num_stacked + (min(inner[0], rows), *inner[1:])


def one_line(error: Exception) -> str:
    """Returns a library's message without line breaks and source locations."""
    text = re.sub(r"\s*\[(source locations|tensorstore_spec)=.*", "", str(error), flags=re.DOTALL)
    return " ".join(text.split())


def saving_context(dtype: np.dtype | None = None) -> ocp.Context:
    """Returns an orbax context in which saved arrays are cut so that windows are cheap to read.

    orbax's default is one chunk for all that a device holds of an array, which must then be read
    and decompressed whole for any part of it.

    Args:
        dtype: stored type; None keeps each array's.
    """
    storage = ocp.options.ArrayOptions.Saving.StorageOptions

    def cut(_: Any, array: jax.Array) -> Any:
        # Along layers and experts first, so that one of them can be read alone.
        axes = tuple(range(min(array.ndim - 2, 2))) or None
        return storage(chunk_byte_size=_MAX_CHUNK_BYTES, shard_axes=axes, dtype=dtype)

    _add_checksums()
    context = ocp.Context()
    context.array.saving.scoped_storage_options_creator = cut
    return context


def _add_checksums() -> None:
    """Makes orbax end each chunk that it writes by its CRC-32C, which every reading checks.

    Zarr has a codec for it and tensorstore does it, orbax included when it reads; but orbax has no
    option for what it writes. So the one function in which it lists the codecs is wrapped. Should a
    later orbax not have it, checkpoints are as good as without this.
    """
    try:  # orbax's own, which may move
        orbax_specs: Any = importlib.import_module(
            "orbax.checkpoint._src.serialization.tensorstore_utils"
        )
    except ImportError:
        orbax_specs = None
    build = getattr(orbax_specs, "_build_zarr3_metadata", None)
    if build is None:
        _LOG.warning("this version of orbax is not known: checkpoints are saved without checksums")
        return
    if hasattr(build, "__wrapped__"):
        return

    @functools.wraps(build)
    def with_checksums(*args: Any, **options: Any) -> dict[str, Any]:
        metadata: dict[str, Any] = build(*args, **options)
        for codec in metadata["codecs"]:
            if codec["name"] == "sharding_indexed":
                codec["configuration"]["codecs"].append({"name": "crc32c"})
        return metadata

    orbax_specs._build_zarr3_metadata = with_checksums


def save_arrays(
    directory: FilePath, params: Mapping[str, Any], dtype: np.dtype | None = None
) -> None:
    """Saves parameters that are in memory, each process its own shards.

    Args:
        directory: the new checkpoint.
        params: nested dict of jax arrays.
        dtype: stored type; None keeps each array's.

    Raises:
        OSError: they cannot be written, on a full disk for instance; names the folder.
    """
    with saving_context(dtype):
        try:
            ocp.save_checkpointables(directory.absolute(), {ITEM: params})
        except Exception as error:  # orbax and tensorstore raise many kinds
            raise OSError(f"{directory / ITEM}: cannot be written: {one_line(error)}") from None


def _with_cache(arrays: Mapping[Path, ts.TensorStore]) -> dict[Path, ts.TensorStore]:
    """Opens arrays again with a cache that holds at least the chunks of one layer's experts."""
    largest = max(
        math.prod(size or 1 for size in array.chunk_layout.read_chunk.shape or array.shape)
        * array.dtype.numpy_dtype.itemsize
        for array in arrays.values()
    )
    limit = max(_CACHE_BYTES, 4 * largest)
    context = ts.Context({"cache_pool": {"total_bytes_limit": limit}})
    return {
        path: ts.open(array.spec(), open=True, context=context).result()
        for path, array in arrays.items()
    }


def _write_skeleton(
    directory: FilePath, params: Mapping[Path, tuple[tuple[int, ...], np.dtype]]
) -> None:
    """Makes a checkpoint that has everything but its arrays."""
    tree: dict[str, Any] = {}
    for path, (_, dtype) in params.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = np.zeros((1,), dtype)
    draft = directory.absolute().with_name(directory.name + ".draft")
    shutil.rmtree(draft, ignore_errors=True)
    context = ocp.Context()
    saving = context.array.saving
    saving.use_ocdbt = False  # one file a chunk, so that a finished one stays finished
    saving.array_metadata_store = None  # would record the placeholders' shapes
    saving.enable_write_sharding_file = False
    log = logging.getLogger("absl")
    level = log.level
    log.setLevel(logging.ERROR)  # orbax warns that there is nothing to merge, as is meant here
    try:
        with context:
            ocp.save_checkpointables(draft, {ITEM: tree})
    finally:
        log.setLevel(level)
    for path in params:
        shutil.rmtree(draft / ITEM / ".".join(path))
    draft.rename(directory)
