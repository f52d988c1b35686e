"""Latent attention for NVIDIA Hopper (sm_90a), in Pallas on Mosaic GPU."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.mla_attention import hopper_backward, hopper_forward
from pallas_kernels.mla_attention.arguments import Inputs, Masks
from pallas_kernels.mla_attention.hopper_ranges import KeyRanges, key_ranges
from pallas_kernels.mla_attention.limits import NOPE
from pallas_kernels.mla_attention.tiles import (
    HOPPER_BACKWARD,
    HOPPER_FORWARD,
    HopperBackwardTile,
    HopperForwardTile,
)
from pallas_kernels.softmax import LOG2E


def forward(
    inputs: Inputs,
    masks: Masks,
    *,
    scale: float,
    causal: bool,
    tile: HopperForwardTile = HOPPER_FORWARD,
) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; the arguments are those of `mla_attention`."""
    _check_manual_axes(inputs)
    B, T, S = *inputs.q_nope_BTHN.shape[:2], inputs.v_BSHV.shape[1]
    block_q, block_k = hopper_forward.BLOCK_Q, tile.block_k
    padded = _pad_inputs(inputs, block_q, block_k)
    ranges = None
    if _needs_ranges(T, S, masks, causal=causal, block_k=block_k):
        num_queries = padded.q_nope_BTHN.shape[1]
        ranges, _ = key_ranges(num_queries, S, block_q, block_k, *masks, causal=causal, batch=B)
    out_BTHV, lse_BHT = hopper_forward.attend(
        padded,
        _pad_masks(masks, block_q, block_k),
        ranges,
        scale=scale,
        causal=causal,
        num_keys=S,
        tile=tile,
    )
    return out_BTHV[:, :T], lse_BHT[:, :, :T]


def backward(
    inputs: Inputs,
    masks: Masks,
    out_BTHV: Array,
    lse_BHT: Array,
    d_out_BTHV: Array,
    *,
    scale: float,
    causal: bool,
    tile: HopperBackwardTile = HOPPER_BACKWARD,
) -> Inputs:
    """Returns the gradients of the five float inputs, the same bits in every run."""
    _check_manual_axes(inputs)
    B, T, S = *inputs.q_nope_BTHN.shape[:2], inputs.v_BSHV.shape[1]
    N, dtype = NOPE, inputs.q_nope_BTHN.dtype
    block_q, block_k = hopper_backward.SIZE, hopper_backward.BLOCK_K
    # The forward kernel's padding, so that both agree on what a query block is.
    padded = _pad_inputs(inputs, block_k, block_k)
    # A query that sees no key, or is padding, gets +inf: all its weights are 0.
    lse_BHT = jnp.where(lse_BHT == -jnp.inf, jnp.inf, lse_BHT * LOG2E)
    lse_BHT = _pad(lse_BHT, block_k, axis=2, value=jnp.inf)
    delta_BTH = (out_BTHV.astype(jnp.float32) * d_out_BTHV.astype(jnp.float32)).sum(axis=-1)
    delta_BHT = _pad(delta_BTH.swapaxes(1, 2), block_k, axis=2)
    ranges: tuple[KeyRanges, KeyRanges] | None = None
    if _needs_ranges(T, S, masks, causal=causal, block_k=block_k):
        num_queries = padded.q_nope_BTHN.shape[1]
        ranges = key_ranges(num_queries, S, block_q, block_k, *masks, causal=causal, batch=B)
    dq_BTHK, dk_nope_BSHN, dk_rope_BSHR, dv_BSHV = hopper_backward.differentiate(
        padded,
        _pad_masks(masks, block_k, block_k),
        ranges,
        _pad(d_out_BTHV, block_k),
        lse_BHT,
        delta_BHT,
        scale=scale,
        causal=causal,
        tile=tile,
    )
    dq_BTHK = dq_BTHK[:, :T] * scale
    dk_rope_BSR = dk_rope_BSHR.sum(axis=2)
    return Inputs(
        dq_BTHK[..., :N].astype(dtype),
        dq_BTHK[..., N:].astype(dtype),
        dk_nope_BSHN[:, :S],
        dk_rope_BSR[:, :S].astype(dtype),
        dv_BSHV[:, :S],
    )


def _check_manual_axes(inputs: Inputs) -> None:
    if axes := jax.typeof(inputs.q_nope_BTHN).manual_axis_type.varying:
        raise ValueError(
            f"q_nope_BTHN: varying manual axes {sorted(axes)} must be none for implementation "
            "'hopper': use jax.shard_map with check_vma=False"
        )


def _needs_ranges(
    num_queries: int, num_keys: int, masks: Masks, *, causal: bool, block_k: int
) -> bool:
    """Returns whether a mask is more than the diagonal of equally many queries and keys."""
    if any(mask is not None for mask in masks):
        return True
    return num_queries != num_keys if causal else num_keys % block_k != 0


def _pad(array: Array, multiple: int, axis: int = 1, value: float = 0) -> Array:
    rest = -array.shape[axis] % multiple
    if rest == 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rest)
    return jnp.pad(array, widths, constant_values=value)


def _pad_inputs(inputs: Inputs, block_q: int, block_k: int) -> Inputs:
    queries = (_pad(array, block_q) for array in inputs[:2])
    return Inputs(*queries, *(_pad(array, block_k) for array in inputs[2:]))


def _pad_masks(masks: Masks, block_q: int, block_k: int) -> Masks:
    q_ids_BT, k_ids_BS, q_offset_B = jax.tree.map(lambda array: array.astype(jnp.int32), masks)
    return Masks(
        None if q_ids_BT is None else _pad(q_ids_BT, block_q),
        None if k_ids_BS is None else _pad(k_ids_BS, block_k),
        q_offset_B,
    )
