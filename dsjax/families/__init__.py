"""Families of models: what other software's files say of them.

`deepseek_v2` is the one there is, its tensors and beside them its `config.json`; `tensors` is the
language of its table of tensors.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from dsjax.config import ModelConfig
from dsjax.config.load import find_config, load_model_config, override
from dsjax.families.deepseek_v2 import hf_table
from dsjax.families.deepseek_v2_config import from_hf_config, read_otherwise, to_hf_config
from dsjax.files import read_json

__all__ = [
    "find_model_config",
    "from_hf_config",
    "hf_table",
    "hf_tensor_shapes",
    "read_hf_config",
    "read_otherwise",
    "to_hf_config",
]


def hf_tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Returns the shape of every tensor in a model's Hugging Face checkpoint, by name."""
    return {name: tensor.shape for name, tensor in hf_table(config).tensors.items()}


def find_model_config(name_or_path: str | Path, overrides: Sequence[str] = ()) -> ModelConfig:
    """Loads a model's config from whatever describes one.

    Args:
        name_or_path: as for `load_model_config`, or a Hugging Face `config.json` or its folder.
        overrides: strings such as "moe.top_k=2".

    Raises:
        ValueError: the file holds no config, or an override does not fit; names which.
        FileNotFoundError: there is no such name or file.
    """
    path = find_config(name_or_path)
    if path.suffix != ".json":
        return load_model_config(path, overrides)
    return override(read_hf_config(path), overrides)


def read_hf_config(path: Path) -> ModelConfig:
    """Reads a Hugging Face `config.json`.

    Raises:
        OSError: there is no such file.
        ValueError: what it holds does not describe such a model; names the file and the field.
    """
    fields = read_json(path)
    try:
        return from_hf_config(fields)
    except ValueError as error:
        fault = str(error).removeprefix("config.json").removeprefix(":").strip()
        raise ValueError(f"{path}: {fault}") from None
