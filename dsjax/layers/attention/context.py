"""Attention where devices divide the row: queries stay, latents travel (mesh axis `context`).

Every query must meet every key before it, wherever the keys are. What travels of a token is its
latent and the one rotary key that all heads share: C + R numbers, 576, where per-head keys and
values would be H (N + V) + R: 4,160 for V2-Lite, 32,832 for V2. Whoever receives them expands them
with `wk_b` and `wv_b`, as its own. That costs 2 C (N + V) H FLOPs a token on each device, where
attention costs a query 2 (N + R + V) H for each of half of the row's S keys: a share of

    2 C (N + V) n / ((N + R + V) S)  =  819 n / S

of n devices' attention, 10 % of 32 K tokens over 4 devices, 5 % of 128 K over 8, forward; backward
about as much. Sending less matters more: at 128 heads per-head keys of 8 K tokens are 538 MB, 6 ms
of a v5p's link, 9.4 MB or 0.1 ms as latents, and their expansion takes 0.6 ms. The absorbed form
would expand nothing, but multiplies 2 C + R numbers for each query and key where this one does
N + R + V: 3.4 times the attention.

Tokens are in striped order (`dsjax.mesh.stripes`), so that each pair of devices has one causal
mask, and all have equal work, packed documents or not. A device attends to the tokens of one device
at a time, itself included, and merges what comes of it by its log-sum-exp: it holds the expanded
keys of one of n parts of a row. The backward pass does the same, with the log-sum-exp of the whole.

Two ways to send, with one result:

- "gather": all latents at once; their gradients are summed and scattered. Forward (n - 1) parts,
  backward, where the gathered latents are kept, (n - 1) parts.
- "ring": each part goes from device to device, one ahead of the attention that hides it. No device
  holds all latents of a row; but the backward pass sends them again, and gradients travel the whole
  circle with what was added to them: 2 n - 1 parts.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from pallas_kernels.implementations import keep
from pallas_kernels.mla_attention import (
    LSE_NAME,
    OUT_NAME,
    mla_attention_gradients,
    mla_attention_with_lse,
)
from pallas_kernels.mla_decode import merge_partial_attention

Sums = tuple[jax.Array, jax.Array]


class Settings(NamedTuple):
    """How a row is attended to; hashable.

    Attributes:
        axis: the mesh axis that divides the row.
        transport: "gather" or "ring".
        scale: on the scores before the softmax.
        implementation: of `mla_attention`.
    """

    axis: str
    transport: str
    scale: float
    implementation: str


class Row(NamedTuple):
    """A device's part of the rows, in a `shard_map`; what has gradients.

    Attributes:
        q_nope_BTHN: queries without position.
        q_rope_BTHR: their rotary part.
        latent_BTC: latents after their norm.
        k_rope_BTR: rotary keys.
        wk_b: [C, H, N], whole but for its heads.
        wv_b: [C, H, V], likewise.
    """

    q_nope_BTHN: jax.Array
    q_rope_BTHR: jax.Array
    latent_BTC: jax.Array
    k_rope_BTR: jax.Array
    wk_b: jax.Array
    wv_b: jax.Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def attend_over_row(settings: Settings, row: Row, segment_ids_BT: jax.Array | None) -> jax.Array:
    """Attends causally within each document, to the tokens of all devices of the axis.

    Args:
        settings: how.
        row: this device's part, all arrays of one dtype.
        segment_ids_BT: int32 document of each token here, or None for one a row.

    Returns:
        out_BTHV of this device's queries, in their dtype.

    Raises:
        ValueError: what `mla_attention` does not take.
    """
    return _forward(settings, row, segment_ids_BT)[0]


def _forward(
    settings: Settings, row: Row, segment_ids_BT: jax.Array | None
) -> tuple[jax.Array, Any]:
    ids = _gathered_ids(settings, segment_ids_BT)

    def attend(source: jax.Array, keys_BTX: jax.Array, sums: Sums) -> Sums:
        k_nope_BSHN, k_rope_BSR, v_BSHV = _expand(row, keys_BTX)
        masks = _masks(settings, ids, source, keys_BTX.shape[0])
        part = mla_attention_with_lse(
            row.q_nope_BTHN,
            row.q_rope_BTHR,
            k_nope_BSHN,
            k_rope_BSR,
            v_BSHV,
            scale=settings.scale,
            q_segment_ids_BT=masks[0],
            kv_segment_ids_BS=masks[1],
            q_offset_B=masks[2],
            implementation=settings.implementation,
        )
        return merge(sums, part)

    batch, length, heads, _ = row.q_nope_BTHN.shape
    sums = (
        jnp.zeros((batch, length, heads, row.wv_b.shape[-1]), jnp.float32),
        jnp.full((batch, heads, length), -jnp.inf, jnp.float32),
    )
    keys = _keys(row)
    if settings.transport == "gather":
        keys = jax.lax.all_gather(keys, settings.axis)
        sums = _scan_parts(
            lambda source, part, sums: (attend(source, part, sums), None), keys, sums
        )[0]
    else:
        sums = _around(settings, attend, keys, sums)
    out_BTHV = keep(sums[0].astype(row.q_nope_BTHN.dtype), OUT_NAME, settings.implementation)
    lse_BHT = keep(sums[1], LSE_NAME, settings.implementation)
    return out_BTHV, (row, keys, ids, out_BTHV, lse_BHT)


def _backward(settings: Settings, kept: Any, d_out_BTHV: jax.Array) -> tuple[Row, None]:
    row, keys, ids, out_BTHV, lse_BHT = kept
    rank = row.latent_BTC.shape[-1]

    def pull(source: jax.Array, keys_BTX: jax.Array, sums: Any) -> tuple[Any, jax.Array]:
        """Adds to the gradients of what is here; returns that of the keys too, float32."""
        inputs = (row.q_nope_BTHN, row.q_rope_BTHR, *_expand(row, keys_BTX))
        *d_queries, dk_nope_BSHN, dk_rope_BSR, dv_BSHV = mla_attention_gradients(
            inputs,
            _masks(settings, ids, source, keys_BTX.shape[0]),
            out_BTHV,
            lse_BHT,
            d_out_BTHV,
            scale=settings.scale,
            implementation=settings.implementation,
        )
        einsum = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
        latent_BSC = keys_BTX[..., :rank]
        d_latent_BSC = einsum("BSHN,CHN->BSC", dk_nope_BSHN, row.wk_b)
        d_latent_BSC += einsum("BSHV,CHV->BSC", dv_BSHV, row.wv_b)
        d_here = (
            *d_queries,
            einsum("BSC,BSHN->CHN", latent_BSC, dk_nope_BSHN),
            einsum("BSC,BSHV->CHV", latent_BSC, dv_BSHV),
        )
        d_keys_BSX = jnp.concatenate([d_latent_BSC, dk_rope_BSR.astype(jnp.float32)], axis=-1)
        return jax.tree.map(lambda total, each: total + each, sums, d_here), d_keys_BSX

    here = (row.q_nope_BTHN, row.q_rope_BTHR, row.wk_b, row.wv_b)
    sums = tuple(jnp.zeros(array.shape, jnp.float32) for array in here)
    dtype = row.latent_BTC.dtype
    if settings.transport == "gather":

        def pull_part(source: jax.Array, part: jax.Array, sums: Any) -> tuple[Any, jax.Array]:
            sums, d_part = pull(source, part, sums)
            return sums, d_part.astype(dtype)

        sums, d_keys = _scan_parts(pull_part, keys, sums)
        d_keys_BTX = jax.lax.psum_scatter(d_keys, settings.axis)
    else:

        def pull_and_send(source: jax.Array, part: jax.Array, carry: Any) -> Any:
            sums, d_part = pull(source, part, carry[0])
            # Summed in float32, sent in the keys' own type.
            d_part = (carry[1].astype(jnp.float32) + d_part).astype(dtype)
            return sums, _to_next(settings.axis, d_part)

        start = sums, jnp.zeros_like(keys)
        sums, d_keys_BTX = _around(settings, pull_and_send, keys, start)
    dq_nope, dq_rope, d_wk_b, d_wv_b = (
        total.astype(array.dtype) for total, array in zip(sums, here, strict=True)
    )
    d_latent, d_rope = d_keys_BTX[..., :rank], d_keys_BTX[..., rank:]
    return Row(dq_nope, dq_rope, d_latent, d_rope, d_wk_b, d_wv_b), None


attend_over_row.defvjp(_forward, _backward)


def merge(one: Sums, other: Sums) -> Sums:
    """Joins attention to two sets of keys: out_BTHV, the sum in float32, and lse_BHT."""
    outs = jnp.stack([one[0], other[0].astype(jnp.float32)])
    lses = jnp.stack([jnp.swapaxes(lse_BHT, 1, 2) for lse_BHT in (one[1], other[1])])
    out_BTHV, lse_BTH = merge_partial_attention(outs, lses)
    return out_BTHV, jnp.swapaxes(lse_BTH, 1, 2)


def _keys(row: Row) -> jax.Array:
    """What travels; as one array, since two would take two collectives."""
    return jnp.concatenate([row.latent_BTC, row.k_rope_BTR], axis=-1)


def _expand(row: Row, keys_BSX: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns k_nope_BSHN, k_rope_BSR and v_BSHV."""
    rank = row.latent_BTC.shape[-1]
    latent_BSC = keys_BSX[..., :rank]
    k_nope_BSHN = jnp.einsum("BSC,CHN->BSHN", latent_BSC, row.wk_b)
    v_BSHV = jnp.einsum("BSC,CHV->BSHV", latent_BSC, row.wv_b)
    return k_nope_BSHN, keys_BSX[..., rank:], v_BSHV


def _gathered_ids(settings: Settings, segment_ids_BT: jax.Array | None) -> Any:
    """Returns the documents of the tokens here, and of all devices'; four bytes a token."""
    if segment_ids_BT is None:
        return None
    return segment_ids_BT, jax.lax.all_gather(segment_ids_BT, settings.axis)


def _masks(settings: Settings, ids: Any, source: jax.Array, batch: int) -> Any:
    """Returns what hides another device's keys: q_segment_ids_BT, kv_segment_ids_BS, q_offset_B.

    Token t of device i is token t n + i of its row: it sees that device's tokens up to its own
    place where the device comes before it or is itself, else up to the place before.
    """
    offset = jnp.where(source <= jax.lax.axis_index(settings.axis), 0, -1).astype(jnp.int32)
    offset_B = jnp.broadcast_to(offset, (batch,))
    return (None, None, offset_B) if ids is None else (ids[0], ids[1][source], offset_B)


def _scan_parts(body: Callable[..., Any], parts: jax.Array, carry: Any) -> Any:
    """Runs `body(source, part, carry)` over the devices' parts, one kernel for all of them."""
    sources = jnp.arange(parts.shape[0], dtype=jnp.int32)
    return jax.lax.scan(lambda carry, xs: body(*xs, carry), carry, (sources, parts))


def _around(settings: Settings, body: Callable[..., Any], keys_BTX: jax.Array, carry: Any) -> Any:
    """Runs `body(source, keys, carry)` over the devices' keys as they come around the ring."""
    count, own = jax.lax.axis_size(settings.axis), jax.lax.axis_index(settings.axis)

    def step(state: Any, hop: jax.Array) -> tuple[Any, None]:
        keys_BTX, carry = state
        ahead_BTX = _to_next(settings.axis, keys_BTX)  # under way while these are attended to
        return (ahead_BTX, body((own - hop) % count, keys_BTX, carry)), None

    # The last keys go nowhere: a second copy of the kernel spares a hop.
    hops = jnp.arange(count - 1, dtype=jnp.int32)
    (keys_BTX, carry), _ = jax.lax.scan(step, (keys_BTX, carry), hops)
    return body((own + 1) % count, keys_BTX, carry)


def _to_next(axis: str, array: jax.Array) -> jax.Array:
    count = jax.lax.axis_size(axis)
    return jax.lax.ppermute(array, axis, [(i, (i + 1) % count) for i in range(count)])
