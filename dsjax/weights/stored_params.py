"""The parameters that a checkpoint of ours holds, where a recipe stores some in fewer bits."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx

from dsjax.config import ModelConfig, QuantisationConfig, RuntimeConfig
from dsjax.families.tensors import Path
from dsjax.model import abstract_model
from dsjax.quantise import Sides
from pallas_kernels.quantised import Format, pack_halves, unpack_halves


@dataclass(frozen=True)
class StoredParams:
    """A model's parameters where a recipe stores some in fewer bits.

    Attributes:
        leaves: shape of every parameter, and its dtype where it is part of a quantised matrix.
        matrices: dims and form of the quantised ones, by path without "weight".
    """

    leaves: Mapping[Path, tuple[tuple[int, ...], np.dtype | None]]
    matrices: Mapping[Path, tuple[Sides, Format]]


@functools.cache
def stored_params(config: ModelConfig, recipe: QuantisationConfig | None) -> StoredParams:
    """Returns what a recipe makes of a model's parameters; None quantises nothing.

    Raises:
        ValueError: the recipe does not fit the model.
    """
    graphdef, state = abstract_model(config, RuntimeConfig(quantisation=recipe))
    matrices = {
        tuple(name.split(".")): (matrix.sides, matrix.form)
        for name, matrix in nnx.merge(graphdef, state).matrices()
        if matrix.form is not None
    }
    leaves: dict[Path, tuple[tuple[int, ...], np.dtype | None]] = {}
    for key, variable in nnx.to_flat_state(state):
        path = tuple(map(str, key))
        dtype = jnp.dtype(variable.dtype) if path[:-1] in matrices else None
        leaves[path] = tuple(variable.shape), dtype
    return StoredParams(leaves, matrices)


def on_disk(shape: tuple[int, ...], dtype: np.dtype) -> tuple[tuple[int, ...], np.dtype]:
    """Returns shape and dtype of a parameter's file: two numbers of 4 bits share a byte there."""
    if dtype not in _HALVES:
        return shape, dtype
    return (*shape[:-1], -(-shape[-1] // 2)), np.dtype(np.uint8)


def to_disk(values: Any) -> Any:
    """Returns values, NumPy's or jax's, as they lie in a file."""
    return pack_halves(values) if values.dtype in _HALVES else values


def from_disk(
    read: Callable[[tuple[slice, ...]], np.ndarray], window: tuple[slice, ...], dtype: np.dtype
) -> np.ndarray:
    """Reads a window of a parameter whose numbers of 4 bits lie in pairs."""
    *others, last = window
    first = last.start - last.start % 2
    packed = read((*others, slice(first // 2, -(-last.stop // 2))))
    return unpack_halves(packed, last.stop - first, dtype)[..., last.start - first :]


_HALVES = (jnp.dtype(jnp.int4), jnp.dtype(jnp.uint4))
