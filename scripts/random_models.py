"""Models of random weights, as stored: what the benchmarks of generation measure."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import RECIPES, MeshConfig
from dsjax.config.load import load_model_and_runtime, override
from dsjax.kernels import ONE_DEVICE, choose_kernels
from dsjax.mesh import make_mesh, serving_rules
from dsjax.model import DeepSeekV2, abstract_model, create_model

_DEVIATION = 0.02


def random_model(
    path: str, overrides: Sequence[str], mesh: Sequence[str] = (), recipe: str | None = None
) -> DeepSeekV2:
    """Returns a model of random weights in the compute type, laid out over a mesh if there is one.

    Args:
        path: of the model's config.
        overrides: of the model's and the runtime's fields.
        mesh: sizes of axes, as `dsjax serve --mesh` takes them.
        recipe: one of `RECIPES` for weights in fewer bits, drawn as they are stored; on one device.
    """
    config, runtime = load_model_and_runtime(path, overrides)
    runtime = dataclasses.replace(runtime, param_dtype=runtime.dtype)
    if recipe is not None:
        runtime = dataclasses.replace(runtime, quantisation=RECIPES[recipe])
    rules = ONE_DEVICE
    if mesh:
        rules = serving_rules(make_mesh(override(MeshConfig(fsdp=1), mesh)))
    kernels = choose_kernels(jax.devices()[0], config, runtime, rules)
    if recipe is None:
        model = create_model(config, 0, runtime, rules, kernels)
    else:
        graphdef, abstract = abstract_model(config, runtime, None, kernels)
        model = nnx.merge(graphdef, random_state(abstract))
    jax.block_until_ready(jax.tree.leaves(model))
    return model


def random_state(abstract: nnx.State) -> nnx.State:
    """Fills a model's parameters one by one: nothing is held wider than it is stored.

    What matrices stand for has a deviation of 0.02, also where it is stored in fewer bits.
    """
    flat = nnx.to_flat_state(abstract)
    dtypes = {tuple(path): jnp.dtype(leaf.dtype) for path, leaf in flat}

    def fill(number: int, path: tuple[Any, ...], leaf: Any) -> jax.Array:
        key, dtype = jax.random.key(number), jnp.dtype(leaf.dtype)
        if path[-1] == "scales":
            return jnp.full(
                leaf.shape, _DEVIATION / _deviation(dtypes[*path[:-1], "weight"]), dtype
            )
        if jnp.issubdtype(dtype, jnp.integer):
            return _random_integers(key, leaf.shape, dtype, *_ends(dtype))
        if "norm" in str(path[-2]):
            return jnp.ones(leaf.shape, dtype)
        return _random_floats(key, leaf.shape, dtype)

    filled = [(p, leaf.replace(fill(i, tuple(p), leaf))) for i, (p, leaf) in enumerate(flat)]
    return nnx.from_flat_state(filled)


def _ends(dtype: Any) -> tuple[int, int]:
    """Returns the least and the largest integer drawn: with no mean where there is a sign."""
    most = 7 if dtype == jnp.int4 else 127 if dtype == jnp.int8 else 15
    return 0 if dtype in (jnp.uint4, jnp.uint8) else -most, most


def _deviation(dtype: Any) -> float:
    """Returns the deviation of the numbers drawn."""
    if not jnp.issubdtype(dtype, jnp.integer):
        return 1.0 if dtype.itemsize == 1 else _DEVIATION
    least, most = _ends(dtype)
    return float((most - least) / math.sqrt(12))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _random_integers(key: jax.Array, shape: Any, dtype: Any, least: int, most: int) -> jax.Array:
    return jax.random.randint(key, shape, least, most + 1, jnp.int16).astype(dtype)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _random_floats(key: jax.Array, shape: Any, dtype: Any) -> jax.Array:
    return (_deviation(dtype) * jax.random.normal(key, shape, jnp.bfloat16)).astype(dtype)
