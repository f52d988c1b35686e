"""Latent attention for NVIDIA Hopper (sm_90a), in Pallas on Mosaic GPU."""

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.mla_attention import hopper_backward, hopper_forward
from pallas_kernels.mla_attention.hopper_blocks import LOG2E, KeyRanges, key_ranges
from pallas_kernels.mla_attention.tiles import HOPPER_BACKWARD, HOPPER_FORWARD

NOPE_DIM, ROPE_DIM, VALUE_DIM = 128, 64, 128
DTYPES = (jnp.bfloat16, jnp.float16)


def forward(
    q_nope_BTHN: Array,
    q_rope_BTHR: Array,
    k_nope_BSHN: Array,
    k_rope_BSR: Array,
    v_BSHV: Array,
    q_segment_ids_BT: Array | None = None,
    kv_segment_ids_BS: Array | None = None,
    q_offset_B: Array | None = None,
    *,
    scale: float,
    causal: bool,
) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; the arguments are those of `mla_attention`."""
    inputs = (q_nope_BTHN, q_rope_BTHR, k_nope_BSHN, k_rope_BSR, v_BSHV)
    _check(*inputs, scale=scale)
    B, T, S = *q_nope_BTHN.shape[:2], v_BSHV.shape[1]
    block_q, block_k = hopper_forward.BLOCK_Q, HOPPER_FORWARD.block_k
    q_nope, q_rope = (_pad(array, block_q) for array in inputs[:2])
    k_nope, k_rope, v = (_pad(array, block_k) for array in inputs[2:])
    masks = (q_segment_ids_BT, kv_segment_ids_BS, q_offset_B)
    ranges = None
    if _needs_ranges(T, S, *masks, causal=causal, block_k=block_k):
        ranges, _ = key_ranges(q_nope.shape[1], S, block_q, block_k, *masks, causal=causal, batch=B)
    out_BTHV, lse_BHT = hopper_forward.attend(
        q_nope,
        q_rope,
        k_nope,
        k_rope,
        v,
        _pad_ids(q_segment_ids_BT, block_q),
        _pad_ids(kv_segment_ids_BS, block_k),
        None if q_offset_B is None else q_offset_B.astype(jnp.int32),
        ranges,
        scale=scale,
        causal=causal,
        num_keys=S,
        tiles=HOPPER_FORWARD,
    )
    return out_BTHV[:, :T], lse_BHT[:, :, :T]


def backward(
    q_nope_BTHN: Array,
    q_rope_BTHR: Array,
    k_nope_BSHN: Array,
    k_rope_BSR: Array,
    v_BSHV: Array,
    q_segment_ids_BT: Array | None,
    kv_segment_ids_BS: Array | None,
    q_offset_B: Array | None,
    out_BTHV: Array,
    lse_BHT: Array,
    d_out_BTHV: Array,
    *,
    scale: float,
    causal: bool,
) -> tuple[Array, Array, Array, Array, Array]:
    """Returns the gradients of the five float inputs, the same bits in every run."""
    inputs = (q_nope_BTHN, q_rope_BTHR, k_nope_BSHN, k_rope_BSR, v_BSHV)
    _check(*inputs, scale=scale)
    B, T, S = *q_nope_BTHN.shape[:2], v_BSHV.shape[1]
    N, dtype = NOPE_DIM, q_nope_BTHN.dtype
    block_q, block_k = hopper_backward.SIZE, hopper_backward.BLOCK_K
    # The forward kernel's padding, so that both agree on what a query block is.
    q_nope, q_rope, d_out = (_pad(array, block_k) for array in (*inputs[:2], d_out_BTHV))
    k_nope, k_rope, v = (_pad(array, block_k) for array in inputs[2:])
    # A query that sees no key, or is padding, gets +inf: all its weights are 0.
    lse_BHT = jnp.where(lse_BHT == -jnp.inf, jnp.inf, lse_BHT * LOG2E)
    lse_BHT = _pad(lse_BHT, block_k, axis=2, value=jnp.inf)
    delta_BTH = (out_BTHV.astype(jnp.float32) * d_out_BTHV.astype(jnp.float32)).sum(axis=-1)
    delta_BHT = _pad(delta_BTH.swapaxes(1, 2), block_k, axis=2)
    masks = (q_segment_ids_BT, kv_segment_ids_BS, q_offset_B)
    ranges: tuple[KeyRanges, KeyRanges] | None = None
    if _needs_ranges(T, S, *masks, causal=causal, block_k=block_k):
        ranges = key_ranges(q_nope.shape[1], S, block_q, block_k, *masks, causal=causal, batch=B)
    dq_BTHK, dk_nope_BSHN, dk_rope_BSHR, dv_BSHV = hopper_backward.differentiate(
        q_nope,
        q_rope,
        k_nope,
        k_rope,
        v,
        d_out,
        lse_BHT,
        delta_BHT,
        _pad_ids(q_segment_ids_BT, block_k),
        _pad_ids(kv_segment_ids_BS, block_k),
        None if q_offset_B is None else q_offset_B.astype(jnp.int32),
        ranges,
        scale=scale,
        causal=causal,
        tiles=HOPPER_BACKWARD,
    )
    dq_BTHK = dq_BTHK[:, :T] * scale
    dk_rope_BSR = dk_rope_BSHR.sum(axis=2)
    return (
        dq_BTHK[..., :N].astype(dtype),
        dq_BTHK[..., N:].astype(dtype),
        dk_nope_BSHN[:, :S],
        dk_rope_BSR[:, :S].astype(dtype),
        dv_BSHV[:, :S],
    )


def _check(
    q_nope_BTHN: Array,
    q_rope_BTHR: Array,
    k_nope_BSHN: Array,
    k_rope_BSR: Array,
    v_BSHV: Array,
    *,
    scale: float,
) -> None:
    for name, array, dim in (
        ("q_nope_BTHN", q_nope_BTHN, NOPE_DIM),
        ("q_rope_BTHR", q_rope_BTHR, ROPE_DIM),
        ("v_BSHV", v_BSHV, VALUE_DIM),
    ):
        if array.shape[-1] != dim:
            raise ValueError(
                f"{name} has a last dim of {array.shape[-1]}, must have {dim} for 'hopper'"
            )
    if q_nope_BTHN.dtype not in DTYPES:
        raise ValueError(
            f"q_nope_BTHN has dtype {q_nope_BTHN.dtype}, must have bfloat16 or float16 for 'hopper'"
        )
    if axes := jax.typeof(q_nope_BTHN).mat.varying:
        raise ValueError(
            f"q_nope_BTHN is typed as varying over manual axes {sorted(axes)}, must not for "
            "'hopper': use jax.shard_map with check_vma=False"
        )
    if not scale > 0:
        raise ValueError(f"scale is {scale}, must be positive for 'hopper'")


def _needs_ranges(
    num_queries: int,
    num_keys: int,
    q_segment_ids_BT: Array | None,
    kv_segment_ids_BS: Array | None,
    q_offset_B: Array | None,
    *,
    causal: bool,
    block_k: int,
) -> bool:
    """Returns whether a mask is more than the diagonal of equally many queries and keys."""
    del kv_segment_ids_BS
    if q_segment_ids_BT is not None or q_offset_B is not None:
        return True
    return num_queries != num_keys if causal else num_keys % block_k != 0


def _pad(array: Array, multiple: int, axis: int = 1, value: float = 0) -> Array:
    rest = -array.shape[axis] % multiple
    if rest == 0:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, rest)
    return jnp.pad(array, widths, constant_values=value)


def _pad_ids(ids_BT: Array | None, multiple: int) -> Array | None:
    return None if ids_BT is None else _pad(ids_BT.astype(jnp.int32), multiple)
