"""What keeps experts evenly loaded in training: balance losses, and dropping over capacity."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from dsjax.config import MoEConfig, TokenDropping


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


def keep_within_capacity(
    scores_BTE: jax.Array,
    indices_BTK: jax.Array,
    mask_BT: jax.Array,
    config: MoEConfig,
    dropping: TokenDropping,
) -> jax.Array:
    """Decides which assignments fit the devices' budgets (§2.2.4).

    A device, that is a group of experts, takes its assignments in order of affinity until it has
    `capacity_factor` times an even share of the batch's; sequences exempt from dropping come
    first. The whole batch is one budget, so the choice does not depend on the mesh.

    Returns:
        keep_BTK: bool.
    """
    batch = indices_BTK.shape[0]
    per_group = config.num_experts // config.num_groups
    group_M = (indices_BTK // per_group).reshape(-1)
    score_BTK = jnp.take_along_axis(scores_BTE, indices_BTK, axis=-1)
    exempt_B = jnp.arange(batch) < round(dropping.undropped_fraction * batch)
    # Affinities are at most 1, so an exempt assignment outranks every other; padding comes last.
    rank_BTK = jnp.where(exempt_B[:, None, None], score_BTK + 2, score_BTK)
    rank_M = jnp.where(mask_BT[..., None], rank_BTK, -1.0).reshape(-1)
    real = jnp.sum(mask_BT) * config.top_k
    capacity = jnp.floor(dropping.capacity_factor * real / config.num_groups)

    order_M = jnp.lexsort((-rank_M, group_M))
    starts_G = jnp.cumulative_sum(
        jnp.bincount(group_M, length=config.num_groups), include_initial=True
    )
    place_M = jnp.arange(group_M.size) - starts_G[group_M[order_M]]
    place_M = jnp.zeros_like(place_M).at[order_M].set(place_M)
    return ((place_M < capacity) | (rank_M >= 2)).reshape(indices_BTK.shape)


def by_group(x: jax.Array, config: MoEConfig) -> jax.Array:
    """Splits the last dim, experts, into groups and the experts of each."""
    return x.reshape(*x.shape[:-1], config.num_groups, -1)
