"""Token dropping over a run (§2.2.4): which sequences it spares, and which share a budget."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from dsjax.config import TokenDropping, TrainConfig
from dsjax.layers.moe.balance import misfit_of_budget, rows_of_expert_group
from dsjax.mesh import ShardingRules


def draw_exempt(dropping: TokenDropping, step: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Draws the sequences of a step's batch of which nothing is dropped.

    Args:
        dropping: says how many, and the seed.
        step: int32 scalar, steps taken before this one.
        shape: slices and sequences of each; how the batch is cut up changes no sequence's lot.

    Returns:
        exempt_AB: bool.
    """
    key = jax.random.fold_in(jax.random.key(dropping.seed), step)
    place_AB = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    draw = jax.vmap(jax.vmap(lambda place: jax.random.uniform(jax.random.fold_in(key, place))))
    return draw(place_AB) < dropping.undropped_fraction


def with_budget(
    config: TrainConfig, rules: ShardingRules, stored: TrainConfig | None
) -> TrainConfig:
    """Returns a run's config with the number of sequences that share a budget.

    Args:
        config: the run as it was asked for.
        rules: where its batch lives.
        stored: the run as it was when it started; None at the start.

    Raises:
        ValueError: the mesh or the slices tear the sequences of a budget apart.
    """
    dropping = config.loss.dropping
    if dropping is None:
        return config
    group_rows = rows_of_expert_group(config.batch.size // config.batch.accumulate, rules)
    rows = dropping.budget_rows
    if rows is None and stored is not None and stored.loss.dropping is not None:
        rows = stored.loss.dropping.budget_rows
    if rows is None:
        rows = group_rows
    if group_rows % rows:
        raise ValueError(misfit_of_budget(rows, group_rows))
    dropping = dataclasses.replace(dropping, budget_rows=rows)
    return dataclasses.replace(config, loss=dataclasses.replace(config.loss, dropping=dropping))
