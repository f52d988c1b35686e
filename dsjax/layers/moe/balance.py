"""What keeps experts evenly loaded in training: balance losses, and dropping over capacity."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.config import MoEConfig, TokenDropping
from dsjax.mesh import ShardingRules, from_stripes, to_stripes


def balance_losses(
    scores_BTE: jax.Array, indices_BTK: jax.Array, mask_BT: jax.Array, config: MoEConfig
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Computes the three balance losses of the paper, each before its weight alpha.

    Every sequence has its own loss over its T tokens, and the batch takes their mean; a device
    is a group of experts.

    Args:
        scores_BTE: float32 affinities before any mask.
        indices_BTK: int32 experts chosen.
        mask_BT: bool, False for padding.
        config: K, D (num_groups) and M (top_groups).

    Returns:
        The expert-level (eq. 23), device-level (eq. 26) and communication (eq. 29) losses,
        float32 scalars, and load_E, the assignments of each expert over the whole batch.
    """
    counted_BT = mask_BT.astype(jnp.float32)
    tokens_B = jnp.maximum(jnp.sum(counted_BT, axis=-1), 1)
    chosen_BTE = jnp.sum(jax.nn.one_hot(indices_BTK, config.num_experts), axis=-2)
    chosen_BTE *= counted_BT[..., None]
    load_BE = jnp.sum(chosen_BTE, axis=1)
    mean_score_BE = jnp.einsum("BTE,BT->BE", scores_BTE, counted_BT) / tokens_B[:, None]

    f_BE = load_BE * config.num_experts / (config.top_k * tokens_B[:, None])
    f_device_BG = jnp.mean(by_group(f_BE, config), axis=-1)
    mean_score_BG = jnp.sum(by_group(mean_score_BE, config), axis=-1)
    sent_BTG = jnp.max(by_group(chosen_BTE, config), axis=-1)  # 1 where the token goes there
    f_sent_BG = jnp.sum(sent_BTG, axis=1) * config.num_groups
    f_sent_BG /= config.top_groups * tokens_B[:, None]

    expert = jnp.mean(jnp.sum(f_BE * mean_score_BE, axis=-1))
    device = jnp.mean(jnp.sum(f_device_BG * mean_score_BG, axis=-1))
    communication = jnp.mean(jnp.sum(f_sent_BG * mean_score_BG, axis=-1))
    return expert, device, communication, jnp.sum(load_BE, axis=0)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Dropping:
    """The token-dropping option, and the sequences that it spares.

    Attributes:
        exempt_B: bool, sequences of which nothing is dropped.
        config: how much fits, and how many sequences share a budget.
    """

    exempt_B: jax.Array
    config: TokenDropping = field(metadata={"static": True})


def keep_within_capacity(
    scores_BTE: jax.Array,
    indices_BTK: jax.Array,
    mask_BT: jax.Array,
    config: MoEConfig,
    dropping: Dropping,
    rules: ShardingRules,
) -> jax.Array:
    """Decides which assignments fit the devices' budgets (§2.2.4).

    A device, that is a group of experts, takes its assignments in order of affinity until it has
    `capacity_factor` times an even share of those of the sequences that share the budget; sequences
    exempt from dropping come first.

    Args:
        scores_BTE: float32 affinities before any mask.
        indices_BTK: int32 experts chosen.
        mask_BT: bool, False for padding, which takes up no budget.
        config: how tokens are routed.
        dropping: `budget_rows` of it are as many sequences, one after another, as share a budget.
        rules: where the sequences are; those of a budget lie on devices that share the experts.

    Returns:
        keep_BTK: bool.

    Raises:
        ValueError: budgets that devices with different experts would have to agree on.
    """
    option = dropping.config
    per_group = config.num_experts // config.num_groups
    group_BTK = indices_BTK // per_group
    score_BTK = jnp.take_along_axis(scores_BTE, indices_BTK, axis=-1)
    # Affinities are at most 1, so an exempt assignment outranks every other; padding comes last.
    rank_BTK = jnp.where(dropping.exempt_B[:, None, None], score_BTK + 2, score_BTK)
    rank_BTK = jnp.where(mask_BT[..., None], rank_BTK, -1.0)
    batch = indices_BTK.shape[0]
    group_rows = rows_of_expert_group(batch, rules)
    budget_rows = option.budget_rows or group_rows
    if group_rows % budget_rows:
        raise ValueError(misfit_of_budget(budget_rows, group_rows))
    row_axes = rules.dividing_axes("length")
    stripes = rules.num_shards("length")

    def of_device(rank_BTK: jax.Array, group_BTK: jax.Array) -> jax.Array:
        # Devices that divide rows decide on whole rows, in the text's order, as one device does.
        if row_axes:
            rank_BTK, group_BTK = (
                from_stripes(jax.lax.all_gather(array, row_axes, axis=1, tiled=True), stripes)
                for array in (rank_BTK, group_BTK)
            )
        # The sequences of a budget may lie on several devices, which all decide on all of it.
        rows = rank_BTK.shape[0]
        gathered = rows % budget_rows != 0
        if gathered:
            rank_BTK, group_BTK = (
                jax.lax.all_gather(array, "expert", tiled=True) for array in (rank_BTK, group_BTK)
            )
        keep = jax.vmap(functools.partial(_fits, config=config, option=option))
        keep_BTK = keep(
            rank_BTK.reshape(-1, budget_rows * rank_BTK[0].size),
            group_BTK.reshape(-1, budget_rows * group_BTK[0].size),
        ).reshape(rank_BTK.shape)
        if gathered:
            first = jax.lax.axis_index("expert") * rows
            keep_BTK = jax.lax.dynamic_slice_in_dim(keep_BTK, first, rows)
        if row_axes:
            length = keep_BTK.shape[1] // stripes
            first = jax.lax.axis_index(row_axes) * length
            keep_BTK = to_stripes(keep_BTK, stripes)
            keep_BTK = jax.lax.dynamic_slice_in_dim(keep_BTK, first, length, axis=1)
        return keep_BTK

    dims: Any = ("batch", "length", None)
    return rules.shard_map(of_device, in_dims=(dims, dims), out_dims=dims)(rank_BTK, group_BTK)


def _fits(
    rank_M: jax.Array, group_M: jax.Array, *, config: MoEConfig, option: TokenDropping
) -> jax.Array:
    """Decides on the assignments of one budget."""
    real = jnp.sum(rank_M >= 0)
    capacity = jnp.floor(option.capacity_factor * real / config.num_groups)
    order_M = jnp.lexsort((-rank_M, group_M))
    starts_G = jnp.cumulative_sum(
        jnp.bincount(group_M, length=config.num_groups), include_initial=True
    )
    place_M = jnp.arange(group_M.size) - starts_G[group_M[order_M]]
    place_M = jnp.zeros_like(place_M).at[order_M].set(place_M)
    return (place_M < capacity) | (rank_M >= 2)


def rows_of_expert_group(batch: int, rules: ShardingRules) -> int:
    """Returns how many of a batch's sequences the devices that share the experts have."""
    apart = [axis for axis in rules.axes("batch") if axis != "expert"]
    return batch // math.prod(rules.axis_size(axis) for axis in apart)


def misfit_of_budget(budget_rows: int, group_rows: int) -> str:
    """Says that devices which do not share experts would have to agree on a budget."""
    return (
        f"loss.dropping.budget_rows={budget_rows}: must divide the {group_rows} sequences of a "
        "slice that one group of devices has which share the experts"
    )


def by_group(x: jax.Array, config: MoEConfig) -> jax.Array:
    """Splits the last dim, experts, into groups and the experts of each."""
    return x.reshape(*x.shape[:-1], config.num_groups, -1)
