"""Where weights come from: a Hugging Face folder, a model checkpoint, a run or one of its steps.

All of them answer the same questions (`WeightSource`), a window of one parameter at a time, so
loading and conversion do not know which they have before them.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from pathlib import Path as FilePath
from typing import Any, Literal, Protocol, cast

import jax.numpy as jnp
import numpy as np

from dsjax.config import ModelConfig
from dsjax.config.run_file import RUN_FILE, read_run_file
from dsjax.config.runtime import DType
from dsjax.config.stored import model_from_json
from dsjax.families import hf_table, read_hf_config
from dsjax.families.tensors import HFTable, Path
from dsjax.files import read_json
from dsjax.weights.assets import ASSETS, Assets, small_files
from dsjax.weights.param_store import ITEM, METADATA_FILE, ParamStore
from dsjax.weights.safetensors import SafetensorsFolder, float_dtype

MANIFEST = "dsjax.json"  # its presence says that a model checkpoint is complete
STEPS_FOLDER = "checkpoints"  # of a run; each step is a folder in it
# Files without which a step is damaged.
_STEP_PARTS = (
    "_CHECKPOINT_METADATA",
    *(
        f"{item}/{name}"
        for item in (ITEM, "optimizer")
        for name in (METADATA_FILE, "manifest.ocdbt")
    ),
)

_LOG = logging.getLogger(__name__)

# A repository of the Hub: "deepseek-ai/DeepSeek-V2-Lite".
_HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+")


class WeightSource(Protocol):
    """A model's weights on disk.

    Attributes:
        where: the path, for messages.
        config: what the model is.
        table: the tensors and parameters that the config asks for, all known to be there.
        assets: small files that belong to the model, by name.
    """

    where: FilePath
    config: ModelConfig
    table: HFTable
    assets: Assets

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

    def __init__(self, where: FilePath, config: ModelConfig, assets: Assets):
        """Checks every header against the config.

        Raises:
            ValueError: damaged, missing, unknown or misshapen tensors; names file and tensor.
        """
        self.where = where
        self.assets = assets
        self.table = hf_table(config)
        self.folder = SafetensorsFolder(where)
        # Other software writes experts that a model does not have as tensors of no numbers.
        empty = {
            name
            for name, (_, stored) in self.folder.tensors.items()
            if name not in self.table.tensors and 0 in stored.shape
        }
        self.table.check_names(self.folder.tensors.keys() - empty, str(where))
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

    def __init__(self, where: FilePath, config: ModelConfig, assets: Assets):
        """Opens the parameters and checks them against the config.

        Raises:
            ValueError: names every parameter that is missing, unknown or misshapen.
        """
        self.where = where
        self.assets = assets
        self.table = hf_table(config)
        self.store = ParamStore.open(where)
        faults = []
        for path in self.table.params.keys() | self.store.arrays.keys():
            name = ".".join(path)
            if path not in self.store.arrays:
                faults.append(f"parameter {name} is missing")
            elif path not in self.table.params:
                faults.append(f"parameter {name} is not of this model")
            elif self.store.shape(path) != self.table.params[path].shape:
                faults.append(
                    f"parameter {name}: shape {list(self.store.shape(path))} must be "
                    f"{list(self.table.params[path].shape)}"
                )
            elif self.store.dtype(path) not in (jnp.float32, jnp.bfloat16):
                faults.append(
                    f"parameter {name}: dtype {self.store.dtype(path)} must be float32 or bfloat16"
                )
        if faults:
            raise ValueError(f"{where / ITEM}: {'; '.join(sorted(faults))}")
        self.config = config

    def dtype(self, path: Path) -> np.dtype:
        """Returns the stored type of a parameter."""
        return self.store.dtype(path)

    def read(self, path: Path, window: tuple[slice, ...]) -> np.ndarray:
        """Reads a window of a parameter."""
        return self.store.read(path, window)

    def close(self) -> None:
        """Does nothing: orbax's files are open only while they are read."""


def resolve(path_or_hub_name: str | FilePath) -> FilePath:
    """Returns a path as it is, and of a Hub name the folder it was downloaded to.

    Raises:
        FileNotFoundError: it is neither, or the Hub does not give it.
    """
    path = FilePath(path_or_hub_name).expanduser()
    name = str(path_or_hub_name)
    if path.exists():
        return path
    if not _HUB_NAME.fullmatch(name) or name.startswith("."):
        raise FileNotFoundError(f"{path}: no such folder, and no name on the Hugging Face Hub")
    import huggingface_hub
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        return FilePath(
            huggingface_hub.snapshot_download(
                name, allow_patterns=["*.safetensors", "*.json", "*.jinja", "*.model", "*.txt"]
            )
        )
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise FileNotFoundError(
            f"{name}: no such folder, and not to be had from the Hugging Face Hub: {first_line}"
        ) from None


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
        return read_run_file(folder).model, small_files(folder / ASSETS)
    content = read_json(folder / MANIFEST)
    return model_from_json(content, str(folder / MANIFEST)), small_files(folder / ASSETS)


def open_source(where: FilePath) -> HFSource | CheckpointSource:
    """Opens the weights at a path and checks all that can be checked without reading them.

    Raises:
        FileNotFoundError: there is nothing there.
        ValueError: it is no model, or damaged; names file and tensor.
    """
    kind, weights, _ = find_kind(where)
    config, assets = describe(where)
    if kind == "hf":
        return HFSource(weights, config, assets)
    if is_run(where):
        return first_readable(where, lambda step: CheckpointSource(step, config, assets))
    return CheckpointSource(weights, config, assets)


def steps_of(run: FilePath) -> list[FilePath]:
    """Returns the folders of a run's steps in the order in which they are to be tried.

    The newest is first; those that lack a part, as after a power loss, come last.
    """
    folder = run / STEPS_FOLDER
    steps = [step for step in (folder.iterdir() if folder.is_dir() else ()) if _is_step(step)]
    steps.sort(key=lambda step: int(step.name), reverse=True)
    return sorted(steps, key=lambda step: bool(_missing_parts(step)))  # is stable


def latest_step(run: FilePath) -> FilePath:
    """Returns the folder of a run's latest complete step."""
    steps = [step for step in steps_of(run) if (step / ITEM / METADATA_FILE).is_file()]
    if not steps:
        raise ValueError(f"{run / STEPS_FOLDER}: holds no complete step")
    return steps[0]


def chosen_step(where: FilePath, step: int | None) -> FilePath:
    """Returns the folder of a step of a run; without a step, the path as it is.

    Raises:
        ValueError: it is no run, or has no such step; names those that it has.
    """
    if step is None:
        return where
    chosen = where / STEPS_FOLDER / str(step)
    if not (where / RUN_FILE).is_file():
        raise ValueError(f"step={step}: {where} is no training run, so it has no steps")
    if not chosen.is_dir():
        there = ", ".join(sorted((path.name for path in steps_of(where)), key=int)) or "none"
        raise ValueError(f"step={step}: {where} has no such step; it has {there}")
    return chosen


def first_readable[T](run: FilePath, read: Callable[[FilePath], T]) -> T:
    """Reads the newest step of a run that can be read, and says loudly what it passed over.

    Args:
        run: the run's folder.
        read: reads one step; ValueError and OSError say that it is damaged.

    Raises:
        ValueError: no step can be read; of the newest one, what `read` raised.
    """
    faults: dict[FilePath, Exception] = {}
    steps = steps_of(run)
    for taken in steps:
        try:
            result = read(taken)
        except (ValueError, OSError) as error:
            faults[taken] = error
            continue
        for step in steps:
            if int(step.name) > int(taken.name):
                reason = f"it lacks {', '.join(_missing_parts(step))}"
                if step in faults:
                    reason = str(faults[step]).splitlines()[0]
                _LOG.warning("DAMAGED: %s: %s; taking step %s instead", step, reason, taken.name)
        return result
    if not steps:
        raise ValueError(f"{run / STEPS_FOLDER}: holds no complete step")
    raise faults[steps[0]]


def _is_step(path: FilePath) -> bool:
    return bool(re.fullmatch(r"\d+", path.name)) and path.is_dir()


def _missing_parts(step: FilePath) -> list[str]:
    return [part for part in _STEP_PARTS if not _is_written(step / part)]


def _is_written(path: FilePath) -> bool:
    return path.is_file() and path.stat().st_size > 0


def weight_dtype(dtype: Any) -> DType:
    """Returns the name of a type that weights may have.

    Raises:
        ValueError: it is another, float16 above all.
    """
    name = jnp.dtype(dtype).name
    if name not in ("float32", "bfloat16"):
        raise ValueError(
            f"dtype={name!r}: must be float32 or bfloat16 (float16 overflows on DeepSeek-V2)"
        )
    return cast(DType, name)
