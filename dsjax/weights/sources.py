"""Where weights come from: a Hugging Face folder, a model checkpoint, a run or one of its steps.

All of them answer the same questions (`WeightSource`), a window of one parameter at a time, so
loading and conversion do not know which they have before them.
"""

from __future__ import annotations

import logging
from pathlib import Path as FilePath
from typing import Any, Literal, Protocol, cast

import jax.numpy as jnp
import numpy as np

from dsjax.config import ModelConfig, QuantisationConfig
from dsjax.config.run_file import RUN_FILE, read_run_file
from dsjax.config.runtime import DType
from dsjax.config.stored import model_from_json, recipe_from_json
from dsjax.families import hf_table, read_hf_config
from dsjax.families.tensors import HFTable, Path, few
from dsjax.files import read_json
from dsjax.weights.arguments import name_of_dtype
from dsjax.weights.assets import ASSETS, Assets, small_files
from dsjax.weights.checksums import checksum_faults, require_checksums
from dsjax.weights.hf_export import HEADERS_FILE
from dsjax.weights.param_store import EMA, ITEM, OPTIMIZER, ParamStore
from dsjax.weights.run_steps import first_readable, latest_step
from dsjax.weights.safetensors import SafetensorsFolder, float_dtype
from dsjax.weights.step_parts import check_step
from dsjax.weights.stored_params import from_disk, on_disk, stored_params

MANIFEST = "dsjax.json"  # its presence says that a model checkpoint is complete
_LOG = logging.getLogger(__name__)


class WeightSource(Protocol):
    """A model's weights on disk.

    Attributes:
        where: the path, for messages.
        config: what the model is.
        table: the tensors and parameters that the config asks for, all known to be there.
        assets: small files that belong to the model, by name.
        recipe: which weights are stored in fewer bits; None for none.
    """

    where: FilePath
    config: ModelConfig
    table: HFTable
    assets: Assets
    recipe: QuantisationConfig | None

    def dtype(self, path: Path) -> np.dtype:
        """Returns the stored type of a parameter."""
        ...

    def read(self, path: Path, window: tuple[slice, ...]) -> np.ndarray:
        """Reads a window of a parameter; each slice has start and stop."""
        ...

    def close(self) -> None:
        """Closes the files that reading opened."""
        ...


class HFSource:
    """A folder with `config.json` and safetensors files.

    Attributes:
        folder: its files.
    """

    def __init__(
        self, where: FilePath, config: ModelConfig, assets: Assets, allow_nonfinite: bool = False
    ):
        """Checks every header against the config.

        Raises:
            ValueError: damaged, missing, unknown or misshapen tensors; names file and tensor.
        """
        self.where = where
        self.assets = assets
        self.recipe: QuantisationConfig | None = None
        self.table = hf_table(config)
        self.folder = SafetensorsFolder(where, allow_nonfinite)
        # Other software writes experts that a model does not have as tensors of no numbers.
        empty = {
            name
            for name, (_, stored) in self.folder.tensors.items()
            if name not in self.table.tensors and 0 in stored.shape
        }
        files = {name: file for name, (file, _) in self.folder.tensors.items() if name not in empty}
        self.table.check_names(files, str(where))
        found: dict[Path, dict[np.dtype, list[str]]] = {}
        for name, (_, stored) in self.folder.tensors.items():
            if name in empty or self.table.is_ignored(name):
                continue
            tensor, where_stored = self.table.tensors[name], self.folder.describe(name)
            dtype = float_dtype(stored.dtype, where_stored)
            if stored.shape != tensor.shape:
                raise ValueError(
                    f"{where_stored}: shape {list(stored.shape)} must be {list(tensor.shape)}"
                )
            for part in tensor.parts:
                found.setdefault(part.path, {}).setdefault(dtype, []).append(name)
        for path, names in found.items():
            if len(names) > 1:  # then the odd ones out are the few
                odd = min(names, key=lambda dtype: len(names[dtype]))
                raise ValueError(
                    f"{self.folder.describe(names[odd][0])}: dtype {odd} differs from that of the "
                    f"other tensors of {'.'.join(path)}"
                )
        self._dtypes = {path: next(iter(names)) for path, names in found.items()}
        self.config = config

    def dtype(self, path: Path) -> np.dtype:
        """Returns the stored type of a parameter."""
        return self._dtypes[path]

    def read(self, path: Path, window: tuple[slice, ...]) -> np.ndarray:
        """Reads a window of a parameter."""
        return self.table.params[path].read(window, self.folder.read)

    def close(self) -> None:
        """Closes the files that reading opened."""
        self.folder.close()


class CheckpointSource:
    """The parameters of an orbax checkpoint, of a model or of a step of a run."""

    def __init__(
        self,
        where: FilePath,
        config: ModelConfig,
        assets: Assets,
        allow_nonfinite: bool = False,
        recipe: QuantisationConfig | None = None,
        ema: bool = False,
    ):
        """Opens the parameters, or a run's moving average, and checks them against the config.

        Raises:
            ValueError: names the parameters that are missing, unknown or misshapen.
        """
        self.where = where
        self.assets = assets
        self.recipe = recipe
        self.table = hf_table(config)
        item, tree = (OPTIMIZER, EMA) if ema else (ITEM, "")
        self.store = ParamStore.open(where, allow_nonfinite, item, tree)
        expected = stored_params(config, recipe).leaves
        faults = []
        for path in expected.keys() | self.store.arrays.keys():
            name = ".".join(path)
            shape, dtype = expected.get(path, ((), None))
            if dtype is not None:
                shape, dtype = on_disk(shape, dtype)
            if path not in self.store.arrays:
                faults.append(f"parameter {name} is missing")
            elif path not in expected:
                faults.append(f"parameter {name} is not of this model")
            elif self.store.shape(path) != shape:
                faults.append(
                    f"parameter {name}: shape {list(self.store.shape(path))} must be {list(shape)}"
                )
            elif dtype is not None and self.store.dtype(path) != dtype:
                faults.append(f"parameter {name}: dtype {self.store.dtype(path)} must be {dtype}")
            elif dtype is None and self.store.dtype(path) not in (jnp.float32, jnp.bfloat16):
                faults.append(
                    f"parameter {name}: dtype {self.store.dtype(path)} must be float32 or bfloat16"
                )
        if faults:
            raise ValueError(f"{where / item}: {few(sorted(faults))}")
        self.config = config
        self._quantised = {
            path: dtype for path, (_, dtype) in expected.items() if dtype is not None
        }

    def dtype(self, path: Path) -> np.dtype:
        """Returns the stored type of a parameter."""
        return self._quantised.get(path, self.store.dtype(path))

    def read(self, path: Path, window: tuple[slice, ...]) -> np.ndarray:
        """Reads a window of a parameter."""
        dtype = self.dtype(path)
        if dtype == self.store.dtype(path):
            return self.store.read(path, window)
        return from_disk(lambda window: self.store.read(path, window), window, dtype)

    def close(self) -> None:
        """Does nothing: orbax's files are open only while they are read."""


Kind = Literal["hf", "model", "step"]


def find_kind(where: FilePath) -> tuple[Kind, FilePath, FilePath]:
    """Finds out by looking what lies at a path.

    Args:
        where: a Hugging Face folder, a model checkpoint, the folder of a run (its latest step)
            or one step of a run.

    Returns:
        What it is, the folder with the weights, and the folder that says what they are.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: it is none of these.
    """
    if not where.exists():
        raise FileNotFoundError(f"{where}: no such checkpoint")
    if (where / MANIFEST).is_file():
        return "model", where, where
    if is_run(where):
        return "step", latest_step(where), where
    run = where.absolute().parent.parent
    if (where / ITEM).is_dir() and (run / RUN_FILE).is_file():
        return "step", where, run
    if (where / "config.json").is_file():
        return "hf", where, where
    raise ValueError(
        f"{where}: neither a Hugging Face folder (config.json), nor a model checkpoint "
        f"({MANIFEST}), nor a run ({RUN_FILE}) or one of its steps"
    )


def is_run(where: FilePath) -> bool:
    """Whether a folder is a training run's, whose newest step is meant."""
    return (where / RUN_FILE).is_file() and not (where / MANIFEST).is_file()


def describe(where: FilePath) -> tuple[ModelConfig, Assets]:
    """Reads what a model is and finds its small files, without a look at its weights.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: it is no model, or its description is damaged; names the file.
    """
    kind, _, folder = find_kind(where)
    if kind == "hf":
        return read_hf_config(folder / "config.json"), small_files(folder)
    if kind == "step":
        require_checksums(folder, RUN_FILE)
        return read_run_file(folder).model, small_files(folder / ASSETS)
    require_checksums(folder, MANIFEST)
    content = read_json(folder / MANIFEST)
    return model_from_json(content, str(folder / MANIFEST)), small_files(folder / ASSETS)


def open_source(
    where: FilePath, allow_nonfinite: bool = False, ema: bool = False
) -> HFSource | CheckpointSource:
    """Opens the weights at a path and checks all that can be checked without reading them.

    Args:
        where: see `find_kind`.
        allow_nonfinite: whether NaN and infinite weights are read like others.
        ema: whether a run's moving average of the weights is read in their place.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: it is no model, or damaged; names file and tensor. It has no moving average.
    """
    kind, weights, folder = find_kind(where)
    if ema and kind != "step":
        raise ValueError(f"ema: {where} is no training run, so it has no moving average")
    config, assets = describe(where)
    for fault in checksum_faults(folder, f"{ASSETS}/"):
        _LOG.warning("%s", fault)  # text that people edit, and that changes no weight
    if kind == "model":
        require_checksums(folder, HEADERS_FILE)
        require_checksums(folder, ITEM)
    if kind == "hf":
        return HFSource(weights, config, assets, allow_nonfinite)
    if is_run(where):

        def read(step: FilePath) -> CheckpointSource:
            check_step(step)  # all of it, as training would pass over a step without its optimizer
            return CheckpointSource(step, config, assets, allow_nonfinite, ema=ema)

        return first_readable(where, read)
    recipe = stored_recipe(folder) if kind == "model" else None
    return CheckpointSource(weights, config, assets, allow_nonfinite, recipe, ema)


def stored_recipe(folder: FilePath) -> QuantisationConfig | None:
    """Returns the recipe that a model checkpoint of ours was quantised by; None for none.

    Raises:
        ValueError: the description is damaged; names the file.
    """
    file = folder / MANIFEST
    return recipe_from_json(read_json(file), str(file)) if file.is_file() else None


def weight_dtype(dtype: Any) -> DType:
    """Returns the name of a type that weights may have.

    Raises:
        ValueError: it is another, float16 above all.
    """
    name = name_of_dtype(dtype)
    if name not in ("float32", "bfloat16"):
        raise ValueError(
            f"dtype={name!r}: must be float32 or bfloat16 (float16 overflows on DeepSeek-V2)"
        )
    return cast(DType, name)
