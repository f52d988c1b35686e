"""Latent attention in plain jax.numpy: what the op means, in float32, with all scores in memory."""

import functools

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.mla_attention.arguments import Inputs, Masks


def visible_BTS(
    q_positions_T: Array,
    k_positions_S: Array,
    q_segment_ids_BT: Array | None,
    kv_segment_ids_BS: Array | None,
    q_offset_B: Array | None,
    *,
    causal: bool,
) -> Array:
    """Returns which keys each query sees; the first dim is 1 where all sequences see the same."""
    visible_1TS = jnp.ones((1, q_positions_T.shape[0], k_positions_S.shape[0]), bool)
    if causal:
        last_BT = q_positions_T[None]
        if q_offset_B is not None:
            last_BT = last_BT + q_offset_B[:, None]
        visible_1TS = visible_1TS & (k_positions_S[None, None] <= last_BT[:, :, None])
    if q_segment_ids_BT is not None and kv_segment_ids_BS is not None:
        visible_1TS = visible_1TS & (q_segment_ids_BT[:, :, None] == kv_segment_ids_BS[:, None])
    return visible_1TS


def forward(inputs: Inputs, masks: Masks, *, scale: float, causal: bool) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; the arguments are those of `mla_attention`."""
    einsum = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    q_nope, q_rope, k_nope, k_rope, v = (array.astype(jnp.float32) for array in inputs)
    scores_BHTS = einsum("BTHN,BSHN->BHTS", q_nope, k_nope)
    scores_BHTS = (scores_BHTS + einsum("BTHR,BSR->BHTS", q_rope, k_rope)) * scale
    mask_BTS = visible_BTS(
        jnp.arange(q_nope.shape[1]), jnp.arange(k_nope.shape[1]), *masks, causal=causal
    )
    scores_BHTS = jnp.where(mask_BTS[:, None], scores_BHTS, -jnp.inf)
    max_BHT = jax.lax.stop_gradient(scores_BHTS.max(axis=-1))
    max_BHT = jnp.where(max_BHT == -jnp.inf, 0.0, max_BHT)  # A query that sees no key.
    weights_BHTS = jnp.exp(scores_BHTS - max_BHT[..., None])
    sum_BHT = weights_BHTS.sum(axis=-1)
    lse_BHT = max_BHT + jnp.log(sum_BHT)
    weights_BHTS = weights_BHTS / jnp.where(sum_BHT == 0, 1.0, sum_BHT)[..., None]
    out_BTHV = einsum("BHTS,BSHV->BTHV", weights_BHTS, v)
    return out_BTHV.astype(inputs.q_nope_BTHN.dtype), lse_BHT


def backward(
    inputs: Inputs,
    masks: Masks,
    out_BTHV: Array,
    lse_BHT: Array,
    d_out_BTHV: Array,
    *,
    scale: float,
    causal: bool,
) -> Inputs:
    """Returns the gradients of the five float inputs, by differentiating `forward`."""
    del out_BTHV, lse_BHT  # The meaning needs no residuals.
    attend = functools.partial(forward, masks=masks, scale=scale, causal=causal)
    _, pullback = jax.vjp(lambda inputs: attend(inputs)[0], inputs)
    (d_inputs,) = pullback(d_out_BTHV)
    return d_inputs
