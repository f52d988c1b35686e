"""Partial attention over shards of a sequence, merged through the log-sum-exp."""

import jax.numpy as jnp
from jaxtyping import Array, Float


def merge_partial_attention(
    outs: Float[Array, "shards *rows C"], lses: Float[Array, " shards *rows"]
) -> tuple[Float[Array, "*rows C"], Float[Array, "*rows"]]:
    """Merges attention over disjoint sets of keys into attention over their union.

    Args:
        outs: each shard's output, normalised over its own keys.
        lses: each shard's natural-log log-sum-exp of the scaled scores; -inf where it saw no key.

    Returns:
        (out, lse) over all keys: `out` in the dtype of `outs`, `lse` float32. A row that no shard
        saw a key for has out 0 and lse -inf.

    Raises:
        ValueError: the shapes do not fit each other.
    """
    if outs.shape[:-1] != lses.shape:
        raise ValueError(f"lses: shape {lses.shape} must be that of outs, {outs.shape[:-1]}")
    lses = lses.astype(jnp.float32)
    lse_max = lses.max(axis=0)
    # A row without keys would be exp(-inf - -inf), which is NaN.
    shift = jnp.where(jnp.isneginf(lse_max), 0.0, lse_max)
    weights = jnp.exp(lses - shift)
    total = weights.sum(axis=0)
    seen = total > 0
    weights = weights / jnp.where(seen, total, 1.0)
    out = jnp.sum(outs.astype(jnp.float32) * weights[..., None], axis=0)
    lse = jnp.where(seen, jnp.log(jnp.where(seen, total, 1.0)) + shift, -jnp.inf)
    return out.astype(outs.dtype), lse
