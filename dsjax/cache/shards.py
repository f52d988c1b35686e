"""Where devices divide the tokens of a page: each has every n-th of them.

Position p of a sequence lies on device p modulo n, at place p // n of what that device has of the
sequence. So each of n devices has an n-th of every sequence, to one token; the page table is the
same for all; a device's tokens lie one after the other, and those before a position are first among
them, as kernels want it. A page of the scheduler's is a page of `page_size` tokens on each device.

All of these run on one device of a `shard_map`. Without axes nothing is divided.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp

from pallas_kernels.mla_decode import LatentPages, append_latents

Axes = tuple[str, ...]


def num_own(axes: Axes, position: jax.Array) -> jax.Array:
    """Returns how many of the tokens before a position, int32, are this device's."""
    count = jax.lax.axis_size(axes)
    return (position - jax.lax.axis_index(axes) + count - 1) // count


def append_own(
    axes: Axes,
    pages: LatentPages,
    latent_BTC: jax.Array,
    rope_BTR: jax.Array,
    page_table_BP: jax.Array,
    start_B: jax.Array,
    num_tokens_B: jax.Array,
) -> LatentPages:
    """Does what `append_latents` does with those of the tokens that are this device's.

    All devices have all new tokens, so that nothing is sent.
    """
    if not axes:
        return append_latents(pages, latent_BTC, rope_BTR, page_table_BP, start_B, num_tokens_B)
    count, num_tokens = jax.lax.axis_size(axes), latent_BTC.shape[1]
    first_B = (jax.lax.axis_index(axes) - start_B) % count
    own_BT = first_B[:, None] + count * jnp.arange(-(-num_tokens // count), dtype=jnp.int32)

    def taken(array_BTX: jax.Array) -> jax.Array:
        return jnp.take_along_axis(array_BTX, own_BT[..., None], axis=1, mode="clip")

    own_start_B = num_own(axes, start_B)
    own_tokens_B = num_own(axes, start_B + num_tokens_B) - own_start_B
    return append_latents(
        pages, taken(latent_BTC), taken(rope_BTR), page_table_BP, own_start_B, own_tokens_B
    )


def gather_tokens(axes: Axes, own_BSX: jax.Array) -> jax.Array:
    """Returns all devices' tokens in the order of their positions."""
    if not axes:
        return own_BSX
    # Device i has the i-th of every n.
    all_BSnX = jax.lax.all_gather(own_BSX, axes, axis=2)
    return all_BSnX.reshape(own_BSX.shape[0], -1, own_BSX.shape[2])
