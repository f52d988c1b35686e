"""Weights in and out of memory, whatever they lie in.

What a path holds is found out by looking: a Hugging Face folder (`config.json` and safetensors
files), a model checkpoint of ours (`dsjax.json`, the folder `params` that orbax reads, and `hf`
with the small files), a training run or one of its steps.
"""

from __future__ import annotations

import contextlib
import functools
import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from dsjax.config import KernelConfig, ModelConfig, RuntimeConfig
from dsjax.config.runtime import DType
from dsjax.config.stored import model_to_json
from dsjax.data.tokenizer import TOKENIZER_FILE
from dsjax.families import hf_table
from dsjax.families.tensors import Path
from dsjax.files import write_json
from dsjax.kernels import Kernels, choose_kernels
from dsjax.mesh import ShardingRules
from dsjax.model import DeepSeekV2, abstract_model, param_shardings
from dsjax.weights import assets as asset_files
from dsjax.weights.assets import ASSETS, Assets
from dsjax.weights.hf_export import (
    config_json,
    create_file,
    main_dtype,
    plan_shards,
    read_tensor,
)
from dsjax.weights.hf_export import write_tensor as write_hf_tensor
from dsjax.weights.param_store import save_arrays
from dsjax.weights.safetensors import INDEX_NAME
from dsjax.weights.sources import (
    MANIFEST,
    WeightSource,
    chosen_step,
    describe,
    first_readable,
    is_run,
    open_source,
    resolve,
    weight_dtype,
)

# Arrays up to this size cross between host and device whole, larger ones in parts.
_HOST_BYTES = 256 << 20
# Times that what an unfinished save left is looked for, a tenth of a second apart.
_CLEARINGS = 50
# What orbax adds to the name of a folder that it is still writing.
_ORBAX_WORKS_IN = ".orbax-checkpoint-tmp"


@dataclass(frozen=True)
class Source:
    """A model on disk, before any weight is read.

    Attributes:
        path: where it lies; of a Hub name, the local copy.
        config: what it is.
        assets: its small files, by name.
        tokenizer: what `load_tokenizer` takes, or None where there is none.
    """

    path: FilePath
    config: ModelConfig
    assets: Assets
    tokenizer: str | None


def locate(path_or_hub_name: str | FilePath, step: int | None = None) -> Source:
    """Finds a model, and downloads it where a Hub name is given.

    Args:
        path_or_hub_name: a Hugging Face folder, a checkpoint of ours, a training run or one of
            its steps, or a name on the Hugging Face Hub.
        step: of a training run; None takes the newest that is not damaged.

    Raises:
        ValueError: it is none of these, or has no such step.
        FileNotFoundError: there is nothing there.
    """
    path = chosen_step(resolve(path_or_hub_name), step)
    config, assets = describe(path)
    tokenizer = str(assets[TOKENIZER_FILE]) if TOKENIZER_FILE in assets else None
    return Source(path, config, assets, tokenizer)


def load_weights(
    path_or_hub_name: str | FilePath,
    *,
    dtype: str | None = None,
    runtime: RuntimeConfig | None = None,
    rules: ShardingRules | None = None,
    kernels: Kernels | KernelConfig | None = None,
) -> DeepSeekV2:
    """Loads a model, each device its own shards and no host the whole.

    Args:
        path_or_hub_name: see `locate`.
        dtype: of the parameters, "bfloat16" or "float32"; None keeps each one's stored type.
        runtime: how the model will be run; its `param_dtype` is not used here. None computes in
            `dtype`, or else in float32 where all parameters are stored so and in bfloat16 if not.
        rules: where arrays live; None puts them on the default device.
        kernels: implementations, or what is named of them; None chooses all for the devices.

    Raises:
        ValueError: damaged or unsuitable weights; names file and tensor.
        FileNotFoundError: there is nothing there.
    """
    wanted = None if dtype is None else weight_dtype(dtype)
    where = resolve(path_or_hub_name)

    def load_from(where: FilePath) -> DeepSeekV2:
        with contextlib.closing(open_source(where)) as source:
            return _load(source, wanted, runtime, rules or ShardingRules(), kernels)

    return first_readable(where, load_from) if is_run(where) else load_from(where)


def _load(
    source: WeightSource,
    wanted: DType | None,
    runtime: RuntimeConfig | None,
    rules: ShardingRules,
    kernels: Kernels | KernelConfig | None,
) -> DeepSeekV2:
    config = source.config
    if runtime is None:
        runtime = RuntimeConfig(dtype=wanted or _exact_dtype(source))
    if isinstance(kernels, KernelConfig):
        runtime, kernels = replace(runtime, kernels=kernels), None
    if kernels is None:
        devices = jax.devices() if rules.mesh is None else rules.mesh.devices.flat
        kernels = choose_kernels(devices[0], config, runtime, rules)
    graphdef, abstract = abstract_model(config, runtime, rules, kernels)
    shardings: dict[Any, jax.sharding.Sharding] = {}
    if rules.mesh is not None:
        flat_shardings = nnx.to_flat_state(param_shardings(abstract, rules))
        shardings = {path: variable.get_raw_value() for path, variable in flat_shardings}
    loaded = []
    for path, variable in nnx.to_flat_state(abstract):
        stored_path = tuple(map(str, path))
        array = _load_array(
            source,
            stored_path,
            tuple(variable.shape),
            source.dtype(stored_path) if wanted is None else jnp.dtype(wanted),
            shardings.get(path),
        )
        loaded.append((path, variable.replace(array)))
    return nnx.merge(graphdef, nnx.from_flat_state(loaded))


def _exact_dtype(source: WeightSource) -> DType:
    """The compute type that loses nothing of float32 parameters."""
    all_float32 = all(source.dtype(path) == jnp.float32 for path in source.table.params)
    return "float32" if all_float32 else "bfloat16"


def save_weights(
    model: DeepSeekV2,
    path: str | FilePath,
    *,
    assets: str | FilePath | None = None,
    format: Literal["dsjax", "hf"] = "dsjax",
    dtype: str | None = None,
) -> None:
    """Saves a model as a checkpoint of ours or as a Hugging Face folder.

    Args:
        model: the model; of one that is divided over processes, each of them calls this.
        path: a folder that does not exist yet; it appears once it is complete.
        assets: where the model came from, whose tokenizer and other small files go along.
        format: "dsjax" or "hf".
        dtype: of the tensors written; None keeps the model's.

    Raises:
        FileExistsError: there is something at `path`.
        ValueError: a format or dtype that is not one.
    """
    path = FilePath(path)
    if format not in ("dsjax", "hf"):
        raise ValueError(f"format={format!r}: must be dsjax or hf")
    if path.exists():
        raise FileExistsError(f"{path}: exists already")
    stored = None if dtype is None else jnp.dtype(weight_dtype(dtype))
    files = {} if assets is None else describe(resolve(assets))[1]
    files = {name: file for name, file in files.items() if name != INDEX_NAME}
    draft = path.with_name(path.name + ".saving")  # `.partial` is a conversion's
    first = jax.process_index() == 0
    if first:
        draft.parent.mkdir(parents=True, exist_ok=True)
        _clear(draft)
    _wait_for_all("cleared")
    try:
        if format == "hf":
            _save_hf(model, stored, draft, files)
        else:
            save_arrays(draft, nnx.to_pure_dict(nnx.state(model)), stored)
        if first and format == "dsjax":
            asset_files.copy_files(files, draft / ASSETS)
            write_json(draft / MANIFEST, model_to_json(model.config))
        if first:
            draft.rename(path)
    except BaseException:
        if first:
            _clear(draft)  # a full disk should not stay full
        raise
    _wait_for_all("saved")


def _clear(draft: FilePath) -> None:
    """Removes what an unfinished save left, orbax's own working folder included."""
    # The threads of a save that failed may still be writing into it.
    for _ in range(_CLEARINGS):
        folders = [
            folder
            for folder in draft.parent.iterdir()
            if folder.name == draft.name or folder.name.startswith(f"{draft.name}{_ORBAX_WORKS_IN}")
        ]
        for folder in folders:
            shutil.rmtree(folder, ignore_errors=True)
        if not folders:
            return
        time.sleep(0.1)


def save_assets(tokenizer: str, init_from: str, run: FilePath) -> None:
    """Gives a run's folder the small files that its checkpoints need to be used elsewhere.

    Args:
        tokenizer: the run's tokenizer, as `load_tokenizer` takes it.
        init_from: the model that the run starts from, or "".
        run: the run's folder.
    """
    files = describe(resolve(init_from))[1] if init_from else {}
    asset_files.save_assets(tokenizer, files, run)


def _save_hf(model: DeepSeekV2, stored: np.dtype | None, folder: FilePath, files: Assets) -> None:
    table = hf_table(model.config)
    params = {tuple(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(model))}

    def dtype(path: Path) -> np.dtype:
        return jnp.dtype(params[path].dtype) if stored is None else stored

    on_host: dict[Path, np.ndarray] = {}  # the small ones

    def read(path: Path, window: tuple[slice, ...]) -> np.ndarray:
        array = params[path][...]
        index = tuple(w.start for w in window[: table.params[path].num_stacked])
        if array.nbytes > _HOST_BYTES:
            return _fetch(_take(array, index)).astype(dtype(path), copy=False)
        if path not in on_host:
            on_host[path] = _fetch(array)
        return on_host[path][index].astype(dtype(path), copy=False)

    plan = plan_shards(table, dtype)
    first = jax.process_index() == 0
    if first:
        asset_files.copy_files(files, folder)
    for name, header in plan.headers.items():
        if first:
            create_file(folder / name, header)
        for tensor in header.tensors:
            values = read_tensor(table, tensor, read)
            if first:
                write_hf_tensor(folder / name, header, tensor, values)
    if first:
        if plan.index is not None:
            (folder / INDEX_NAME).write_bytes(plan.index)
        (folder / "config.json").write_bytes(
            config_json(model.config, main_dtype(table, dtype), files)
        )


@jax.jit
def _take(array: jax.Array, index: tuple[int, ...]) -> jax.Array:
    return array[index]


def _fetch(array: jax.Array) -> np.ndarray:
    """Brings an array to every host."""
    if not array.is_fully_addressable:
        return np.asarray(multihost_utils.process_allgather(array, tiled=True))
    return np.asarray(array)


def _load_array(
    source: WeightSource,
    path: Path,
    shape: tuple[int, ...],
    dtype: np.dtype,
    sharding: jax.sharding.Sharding | None,
) -> jax.Array:
    fill = functools.partial(_fill, functools.partial(source.read, path), dtype=dtype)
    if sharding is None:
        return fill(tuple(slice(0, size) for size in shape), device=None)
    # Devices that hold copies of the same shard share one reading of it.
    devices_of: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
    for device, index in sharding.addressable_devices_indices_map(shape).items():
        assert index is not None
        bounds = tuple(i.indices(size)[:2] for i, size in zip(index, shape, strict=True))
        devices_of.setdefault(bounds, []).append(device)
    shards = []
    for bounds, devices in devices_of.items():
        shard = fill(tuple(slice(*pair) for pair in bounds), device=devices[0])
        shards += [shard] + [jax.device_put(shard, device) for device in devices[1:]]
    return jax.make_array_from_single_device_arrays(shape, sharding, shards)


def _fill(
    read: Callable[[tuple[slice, ...]], np.ndarray],
    window: tuple[slice, ...],
    *,
    dtype: np.dtype,
    device: jax.Device | None,
) -> jax.Array:
    """Reads a window onto a device; one that is large, layer by layer."""
    shape = tuple(w.stop - w.start for w in window)
    if math.prod(shape) * dtype.itemsize <= _HOST_BYTES or shape[0] == 1:
        return jax.device_put(read(window).astype(dtype, copy=False), device)
    out = jnp.zeros(shape, dtype, device=device)
    rows = max(1, _HOST_BYTES * shape[0] // (math.prod(shape) * dtype.itemsize))
    for start in range(0, shape[0], rows):
        stop = min(start + rows, shape[0])
        block = slice(window[0].start + start, window[0].start + stop)
        piece = read((block, *window[1:])).astype(dtype, copy=False)
        out = _set_rows(out, jax.device_put(piece, device), start)
        out.block_until_ready()  # so that only one block at a time is on the host
    return out


@functools.partial(jax.jit, donate_argnums=0)
def _set_rows(out: jax.Array, piece: jax.Array, start: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(out, piece, start, axis=0)


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"dsjax.weights {what}")
