"""Families of models: what other software's files say of them. A family is a file.

`deepseek_v2` is one; `tensors` is the language of its table of tensors.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from dsjax.config import ModelConfig
from dsjax.config.load import find_config, load_model_config, override
from dsjax.families import deepseek_v2
from dsjax.families.tensors import HFTable
from dsjax.files import read_json


def from_hf_config(hf: Mapping[str, Any]) -> ModelConfig:
    """Builds the ModelConfig that a Hugging Face `config.json` describes.

    Args:
        hf: the parsed file.

    Raises:
        ValueError: a family that is not known, a field that is missing, or one that holds
            something that is not implemented.
    """
    return deepseek_v2.from_hf_config(hf)


def to_hf_config(config: ModelConfig, *, dtype: str, bos_id: int, eos_id: int) -> dict[str, Any]:
    """Builds the `config.json` that other software needs to load a model of ours.

    Args:
        config: the model.
        dtype: type of the tensors written beside it.
        bos_id: token that begins a document.
        eos_id: token that ends one.
    """
    return deepseek_v2.to_hf_config(config, dtype=dtype, bos_id=bos_id, eos_id=eos_id)


def hf_table(config: ModelConfig) -> HFTable:
    """Returns the table between a model's Hugging Face tensors and our parameters."""
    return deepseek_v2.hf_table(config)


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
    return override(from_hf_config(read_json(path)), overrides)
