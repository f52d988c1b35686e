"""What `load` and `save` are given in Python: another kind of object is named in one line."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config import KernelConfig, QuantisationConfig
from dsjax.config.load import named_configs
from dsjax.kernels import Kernels
from dsjax.model import DeepSeekV2

_KINDS: dict[str, tuple[tuple[type, ...], str]] = {
    "path": ((str, os.PathLike), "a path"),
    "model_path": ((str, os.PathLike), "a path or a name on the Hugging Face Hub"),
    "mesh": ((jax.sharding.Mesh, type(None)), "a jax.sharding.Mesh (dsjax.mesh.make_mesh) or None"),
    "kernels": ((KernelConfig, Kernels, type(None)), "a dsjax.config.KernelConfig or None"),
    "quantize": (
        (str, os.PathLike, QuantisationConfig, type(None)),
        "int8, fp8, int4, a recipe, its file or None",
    ),
    "model": ((DeepSeekV2,), "a model of ours, as dsjax.load gives"),
}


def check_arguments(**given: Any) -> None:
    """Checks arguments by their names, before anything is read.

    Raises:
        TypeError: one is no such object; names it and what it may be.
        ValueError: a path is empty, a file or a config's name, which has no weights.
    """
    for name, value in given.items():
        kinds, what = _KINDS[name]
        said = "path_or_hub_name" if name == "model_path" else name
        if not isinstance(value, kinds) or isinstance(value, bool):
            raise TypeError(f"{said}={value!r}: must be {what}")
        if name in ("path", "model_path") and not str(value):
            raise ValueError(f"{said}={value!r}: must not be empty")
    model = given.get("model_path")
    if model is not None and Path(model).expanduser().is_file():
        raise ValueError(f"{model}: is a file; a model is the folder that holds it")
    if str(model) in named_configs() and not Path(str(model)).exists():
        raise ValueError(f"{model}: is a config, which has no weights; a model is a folder of them")


def name_of_dtype(dtype: Any) -> str:
    """Returns a dtype's name, or what was given for one as text."""
    try:
        return str(jnp.dtype(dtype).name)
    except TypeError:
        return str(dtype)
