"""How many tokens of cache fit into the memory that a model leaves: latents, and per-head ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.cache import full_bytes_per_token
from dsjax.config import EngineConfig
from dsjax.data.tokenizer import Tokenizer
from dsjax.engine import Engine
from dsjax.engine.sizes import fitting_pages, num_lanes, page_tokens
from dsjax.model import DeepSeekV2

# More pages than any device has room for.
_ANY = 1 << 40


def cache_capacity(
    model: DeepSeekV2, tokenizer: Tokenizer, sizes: EngineConfig, device_memory: int | None = None
) -> dict[str, Any]:
    """Allocates an engine's pool as large as it may be, then per-head keys and values in its place.

    Both are really allocated, one after the other, and the bytes are those that the device's
    allocator counts; where it counts none (CPU), those of the arrays. Tokens are of all devices.

    Args:
        model: the model; nothing else should be on its devices.
        tokenizer: the engine's.
        sizes: of the engine, which say how much is kept for computing.
        device_memory: bytes that a device is taken to have, if it has more.

    Raises:
        ValueError: nobody says what memory the device has.
    """
    leaves = jax.tree.leaves(nnx.state(model))
    device = min(leaves[0].devices(), key=lambda each: each.id)
    stats = device.memory_stats() or {}
    known = [limit for limit in (device_memory, stats.get("bytes_limit")) if limit is not None]
    if not known:
        raise ValueError("device_memory: this device does not say what memory it has; give it")
    of_model = sum(leaf.addressable_shards[0].data.nbytes for leaf in leaves)
    used = stats.get("bytes_in_use", of_model)
    pages = fitting_pages(model, sizes, _ANY, (min(known), used))
    lanes, page = num_lanes(model), page_tokens(model, sizes)
    pool_sizes = dataclasses.replace(sizes, num_pages=pages, warm_up=False)
    with Engine(model, tokenizer, pool_sizes) as engine:
        assert engine._runner._arrays is not None
        pool = _bytes_now(device, engine._runner._arrays.pool, used)
    each = full_bytes_per_token(model.config, jnp.dtype(model.options.dtype).itemsize)
    each //= page // sizes.page_size  # devices that divide heads divide these too
    fitting = pool // each
    held = _per_head(model, fitting, page // sizes.page_size, device)
    per_head = _bytes_now(device, held, used)
    jax.tree.map(lambda leaf: leaf.delete(), held)
    return {
        "device_memory": min(known),
        "weight_bytes": used,
        "memory_fraction": sizes.memory_fraction,
        "pool_bytes": pool,
        "cache_tokens": pages * page * lanes,
        "per_head_bytes": per_head,
        "per_head_tokens": fitting * lanes,
        "ratio": pages * page / fitting if fitting else None,
    }


def _per_head(model: DeepSeekV2, tokens: int, shards: int, device: jax.Device) -> list[jax.Array]:
    """Allocates keys and values of a device's heads."""
    attention, num_layers = model.config.attention, model.config.num_layers
    key = attention.qk_nope_head_dim + attention.qk_rope_head_dim
    where = jax.sharding.SingleDeviceSharding(device)
    heads = attention.num_heads // shards
    made = [
        jnp.zeros((num_layers, tokens, heads, width), model.options.dtype, device=where)
        for width in (key, attention.v_head_dim)
    ]
    jax.block_until_ready(made)
    return made


def _bytes_now(device: jax.Device, held: Any, before: int) -> int:
    """Returns the bytes that a device holds more than before, or those of its arrays."""
    jax.block_until_ready(held)
    stats = device.memory_stats() or {}
    if "bytes_in_use" in stats:
        return int(stats["bytes_in_use"]) - before
    return sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(held))
