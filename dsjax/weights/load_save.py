"""Weights in and out of memory, whatever they lie in.

What a path holds is found out by looking: a Hugging Face folder (`config.json` and safetensors
files), a model checkpoint of ours (`dsjax.json`, the folder `params` that orbax reads, and `hf`
with the small files), a training run or one of its steps.
"""

from __future__ import annotations

import contextlib
import functools
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path as FilePath
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils

from dsjax.config import KernelConfig, ModelConfig, QuantisationConfig, RuntimeConfig
from dsjax.config.load import load_recipe
from dsjax.config.model import require_folder
from dsjax.config.runtime import DType, LatentDType
from dsjax.config.stored import model_to_json
from dsjax.data.tokenizer import TOKENIZER_FILE
from dsjax.data.tokenizer_files import mend_tokenizer
from dsjax.families import hf_table
from dsjax.families.tensors import Path
from dsjax.files import LockHeldError, locked, write_json
from dsjax.kernels import Kernels, choose_kernels
from dsjax.mesh import ShardingRules
from dsjax.model import DeepSeekV2, abstract_model, param_shardings
from dsjax.weights import assets as asset_files
from dsjax.weights import host_experts, to_devices
from dsjax.weights.assets import ASSETS, Assets
from dsjax.weights.checksums import write_checksums
from dsjax.weights.hf_export import (
    config_json,
    create_file,
    main_dtype,
    plan_shards,
    read_tensor,
)
from dsjax.weights.hf_export import write_tensor as write_hf_tensor
from dsjax.weights.hub import resolve
from dsjax.weights.param_store import save_arrays
from dsjax.weights.quantised import QuantisingSource
from dsjax.weights.run_steps import chosen_step, first_readable
from dsjax.weights.safetensors import INDEX_NAME
from dsjax.weights.sources import (
    MANIFEST,
    WeightSource,
    describe,
    is_run,
    open_source,
    weight_dtype,
)
from dsjax.weights.stored_params import stored_params, to_disk

# Says that a save made its folder, and is locked while one is at work there.
_SAVE_MARKER = "save.lock"
# Looks, a tenth of a second apart, at what a failed save leaves; and how often in a row nothing was
# there before it counts as gone. orbax raises while other threads of it go on to write.
_CLEARINGS = 100
_QUIET = 10


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
    allow_nonfinite: bool = False,
    quantize: str | QuantisationConfig | None = None,
    device_memory: int | None = None,
    ema: bool = False,
    latent_dtype: LatentDType | None = None,
) -> DeepSeekV2:
    """Loads a model, each device its own shards and no host the whole.

    Args:
        path_or_hub_name: see `locate`.
        dtype: of the parameters, "bfloat16" or "float32"; None keeps each one's stored type.
        runtime: how the model will be run; its `param_dtype` is not used here. None computes in
            `dtype`, or else in float32 where all parameters are stored so and in bfloat16 if not.
        rules: where arrays live; None puts them on the default device.
        kernels: implementations, or what is named of them; None chooses all for the devices.
        allow_nonfinite: whether NaN and infinite weights are loaded like others.
        quantize: a recipe that stores weights in fewer bits while they are read, or the name or
            file of one, such as "int4"; None keeps them as they are, quantised or not.
        device_memory: bytes of the device that the model may take; where it does not fit, its
            routed experts stay in the host's memory (`weights.host_experts`).
        ema: of a training run: loads the moving average of its weights.
        latent_dtype: of the cache, as `RuntimeConfig` has it, where `runtime` is None.

    Raises:
        ValueError: damaged, non-finite or unsuitable weights; names file and tensor. The weights
            are quantised already, or the recipe does not fit.
        FileNotFoundError: there is nothing there.
    """
    wanted = None if dtype is None else weight_dtype(dtype)
    usual = RuntimeConfig(latent_dtype=latent_dtype)  # checked before anything is read
    recipe = None if quantize is None else load_recipe(quantize)
    where = resolve(path_or_hub_name)

    def load_from(where: FilePath) -> DeepSeekV2:
        with contextlib.closing(open_source(where, allow_nonfinite, ema)) as found:
            source = found if recipe is None else QuantisingSource(found, recipe)
            run_as = runtime or replace(usual, dtype=wanted or _exact_dtype(source))
            return _load(source, wanted, run_as, rules or ShardingRules(), kernels, device_memory)

    return first_readable(where, load_from) if is_run(where) else load_from(where)


def _load(
    source: WeightSource,
    wanted: DType | None,
    runtime: RuntimeConfig,
    rules: ShardingRules,
    kernels: Kernels | KernelConfig | None,
    device_memory: int | None,
) -> DeepSeekV2:
    config = source.config
    runtime = replace(runtime, quantisation=source.recipe)
    if isinstance(kernels, KernelConfig):
        runtime, kernels = replace(runtime, kernels=kernels), None
    if kernels is None:
        devices = jax.devices() if rules.mesh is None else rules.mesh.devices.flat
        kernels = choose_kernels(devices[0], config, runtime, rules)
    graphdef, abstract = abstract_model(config, runtime, rules, kernels)
    dtype_of = functools.partial(_wanted_dtype, source, wanted=wanted)
    on_host = device_memory is not None and host_experts.must_leave_device(
        abstract, dtype_of, device_memory, rules
    )
    shardings: dict[Any, jax.sharding.Sharding] = {}
    if rules.mesh is not None:
        flat_shardings = nnx.to_flat_state(param_shardings(abstract, rules))
        shardings = {path: variable.get_raw_value() for path, variable in flat_shardings}
    loaded = []
    # A matrix's numbers before its scales, which are found while the numbers are.
    parameters = sorted(
        nnx.to_flat_state(abstract), key=lambda p: (p[0][:-1], p[0][-1] != "weight")
    )
    for path, variable in parameters:
        stored_path = tuple(map(str, path))
        if on_host and host_experts.is_routed(stored_path):
            none = host_experts.no_experts(variable.shape, dtype_of(stored_path))
            loaded.append((path, variable.replace(none)))
            continue
        array = to_devices.load_array(
            source,
            stored_path,
            tuple(variable.shape),
            dtype_of(stored_path),
            shardings.get(path),
        )
        loaded.append((path, variable.replace(array)))
    model = nnx.merge(graphdef, nnx.from_flat_state(loaded))
    if on_host:
        (device,) = model.embed.weight[...].devices()
        shapes = nnx.merge(graphdef, abstract)
        experts = host_experts.read_experts(source.read, shapes, dtype_of, device, device_memory)
        host_experts.set_host_experts(model, experts)
    return model


def _wanted_dtype(source: WeightSource, path: Path, wanted: DType | None) -> np.dtype:
    """The type that a parameter is loaded in; what is stored in fewer bits keeps it."""
    _, quantised = stored_params(source.config, source.recipe).leaves[path]
    if quantised is not None:
        return quantised
    return source.dtype(path) if wanted is None else jnp.dtype(wanted)


def _exact_dtype(source: WeightSource) -> DType:
    """The compute type that loses nothing of float32 parameters."""
    leaves = stored_params(source.config, source.recipe).leaves
    all_float32 = all(
        source.dtype(path) == jnp.float32
        for path, (_, quantised) in leaves.items()
        if quantised is None
    )
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
        FileExistsError: there is something at `path`, or at `path.saving` that no save made.
        RuntimeError: another process saves there.
        ValueError: a format or dtype that is not one, or not one of a quantised model.
    """
    require_folder("path", str(path))
    path = FilePath(path)
    if format not in ("dsjax", "hf"):
        raise ValueError(f"format={format!r}: must be dsjax or hf")
    recipe = model.options.runtime.quantisation
    if recipe is not None and (dtype is not None or format == "hf"):
        field = "format='hf'" if format == "hf" else f"dtype={dtype!r}"
        raise ValueError(
            f"{field}: a quantised model is saved as it is, in our format; `dsjax convert` makes a "
            "Hugging Face folder of that"
        )
    if host_experts.host_experts_of(model) is not None:
        raise ValueError(
            "model: its experts are in the host's memory; `dsjax convert` copies files"
        )
    if path.exists():
        raise FileExistsError(f"{path}: exists already")
    stored = None if dtype is None else jnp.dtype(weight_dtype(dtype))
    files = {} if assets is None else describe(resolve(assets))[1]
    files = {name: file for name, file in files.items() if name != INDEX_NAME}
    work = path.with_name(path.name + ".saving")  # `.partial` is a conversion's
    draft = work / "out"
    first = jax.process_index() == 0
    with contextlib.ExitStack() as held:
        if first:
            held.enter_context(_working_in(work))
        _wait_for_all("cleared")
        if format == "hf":
            _save_hf(model, stored, draft, files)
        else:
            params = jax.tree.map(to_disk, nnx.to_pure_dict(nnx.state(model)))
            save_arrays(draft, params, stored)
        if first and format == "dsjax":
            asset_files.copy_files(files, draft / ASSETS)
            write_json(draft / MANIFEST, model_to_json(model.config, recipe))
            write_checksums(draft)
        if first:
            draft.rename(path)
    _wait_for_all("saved")


@contextlib.contextmanager
def _working_in(work: FilePath) -> Iterator[None]:
    """Makes the folder of a save, in place of what a killed save left, and removes it at the end.

    Raises:
        FileExistsError: the folder is there, and no save made it.
        LockHeldError: another save is at work in it.
    """
    marker = work / _SAVE_MARKER
    if work.exists() and not marker.is_file() and (not work.is_dir() or any(work.iterdir())):
        raise FileExistsError(f"{work}: is in the way, and no save made it; move it away")
    work.mkdir(parents=True, exist_ok=True)
    try:
        with locked(marker):
            for left in work.iterdir():
                if left != marker:
                    shutil.rmtree(left)
            yield
            shutil.rmtree(work)
    except LockHeldError:
        raise
    except BaseException:
        _clear(work)  # a full disk should not stay full
        raise


def _clear(work: FilePath) -> None:
    """Removes the folder of a save that failed, and what its threads still write after that."""
    absent = 0
    for _ in range(_CLEARINGS):
        if work.exists():
            absent = 0
            shutil.rmtree(work, ignore_errors=True)
        else:
            absent += 1
        if absent > _QUIET:
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
    write_checksums(run)


def _save_hf(model: DeepSeekV2, stored: np.dtype | None, folder: FilePath, files: Assets) -> None:
    table = hf_table(model.config)
    params = {tuple(map(str, p)): v for p, v in nnx.to_flat_state(nnx.state(model))}

    def dtype(path: Path) -> np.dtype:
        return jnp.dtype(params[path].dtype) if stored is None else stored

    on_host: dict[Path, np.ndarray] = {}  # the small ones

    def read(path: Path, window: tuple[slice, ...]) -> np.ndarray:
        array = params[path][...]
        index = tuple(w.start for w in window[: table.params[path].num_stacked])
        if array.nbytes > to_devices.HOST_BYTES:
            return _fetch(_take(array, index)).astype(dtype(path), copy=False)
        if path not in on_host:
            on_host[path] = _fetch(array)
        return on_host[path][index].astype(dtype(path), copy=False)

    plan = plan_shards(table, dtype)
    first = jax.process_index() == 0
    if first:
        asset_files.copy_files(files, folder)
        mend_tokenizer(folder)
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


def _wait_for_all(what: str) -> None:
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f"dsjax.weights {what}")
