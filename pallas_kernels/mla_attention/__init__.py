"""Multi-head latent attention for training and prefill: scores over 128 + 64, values of 128.

A key has two parts: one without position for each head (`k_nope`), and a rotary one that all heads
share (`k_rope`). The shared part is never broadcast in memory. DeepSeek-V2, arXiv 2405.04434,
equations 14 to 18.

Four implementations have one meaning: "reference" (plain jax.numpy, small sizes), "xla" (portable),
"tpu" (Pallas, Mosaic TPU) and "hopper" (Pallas, Mosaic GPU, sm_90). Each is a module with `forward`
and `backward`. Shape letters: B sequences, T query tokens, S key tokens, H heads, N dims of a head
without position, R rotary dims, V dims of a head's values.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.implementations import IMPLEMENTATIONS, check_supported, keep, load
from pallas_kernels.manual_axes import vary_alike
from pallas_kernels.mla_attention.arguments import Inputs, Masks
from pallas_kernels.mla_attention.limits import supported

__all__ = [
    "IMPLEMENTATIONS",
    "LSE_NAME",
    "OUT_NAME",
    "mla_attention",
    "mla_attention_gradients",
    "mla_attention_with_lse",
    "supported",
]

# For policies of jax.checkpoint: saving these two spares the backward pass a second forward kernel.
OUT_NAME = "mla_attention_out"
LSE_NAME = "mla_attention_lse"


def mla_attention(
    q_nope_BTHN: Float[Array, "B T H N"],
    q_rope_BTHR: Float[Array, "B T H R"],
    k_nope_BSHN: Float[Array, "B S H N"],
    k_rope_BSR: Float[Array, "B S R"],
    v_BSHV: Float[Array, "B S H V"],
    *,
    scale: float,
    causal: bool = True,
    q_segment_ids_BT: Int[Array, "B T"] | None = None,
    kv_segment_ids_BS: Int[Array, "B S"] | None = None,
    q_offset_B: Int[Array, " B"] | None = None,
    implementation: str,
) -> Float[Array, "B T H V"]:
    """Attends over keys of two parts, of which the rotary one is shared by all heads.

    Differentiable in its five float arguments. The backward pass keeps the inputs, the output and
    the log-sum-exp, so its memory grows with T and not with T times S. It works within
    `jax.shard_map` ("hopper" wants `check_vma=False` of it), `jax.vmap`, `jax.lax.scan` and
    `jax.checkpoint`.

    Args:
        q_nope_BTHN: Queries without position; any float dtype ("hopper": bfloat16 or float16).
        q_rope_BTHR: Rotary part of the queries, rotated; the dtype of `q_nope_BTHN`.
        k_nope_BSHN: Keys without position; the dtype of `q_nope_BTHN`.
        k_rope_BSR: Rotary part of the keys, rotated, one for all heads; the dtype of `q_nope_BTHN`.
        v_BSHV: Values; the dtype of `q_nope_BTHN`.
        scale: Factor on the scores before the softmax; positive and finite.
        causal: Whether key s is visible to query t only if s <= t + `q_offset_B`.
        q_segment_ids_BT: int32 document of each query; a key is visible only from its own document.
        kv_segment_ids_BS: int32 document of each key; given if and only if `q_segment_ids_BT` is.
        q_offset_B: int32 position of each sequence's first query among its keys; 0 if not given.
        implementation: one of IMPLEMENTATIONS.

    Returns:
        The attention's output in the dtype of `q_nope_BTHN`; 0 where a query sees no key.

    Raises:
        ValueError: shapes or dtypes that do not fit, one kind of segment ids without the other,
            `q_offset_B` without `causal`, an unknown implementation, or what it does not take (see
            `supported`).

    DeepSeek-V2, arXiv 2405.04434, equations 17 and 18.
    """
    out_BTHV, _ = mla_attention_with_lse(
        q_nope_BTHN,
        q_rope_BTHR,
        k_nope_BSHN,
        k_rope_BSR,
        v_BSHV,
        scale=scale,
        causal=causal,
        q_segment_ids_BT=q_segment_ids_BT,
        kv_segment_ids_BS=kv_segment_ids_BS,
        q_offset_B=q_offset_B,
        implementation=implementation,
    )
    return out_BTHV


def mla_attention_with_lse(
    q_nope_BTHN: Float[Array, "B T H N"],
    q_rope_BTHR: Float[Array, "B T H R"],
    k_nope_BSHN: Float[Array, "B S H N"],
    k_rope_BSR: Float[Array, "B S R"],
    v_BSHV: Float[Array, "B S H V"],
    *,
    scale: float,
    causal: bool = True,
    q_segment_ids_BT: Int[Array, "B T"] | None = None,
    kv_segment_ids_BS: Int[Array, "B S"] | None = None,
    q_offset_B: Int[Array, " B"] | None = None,
    implementation: str,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H T"]]:
    """Attends as `mla_attention` does; also returns the log-sum-exp, to merge partial results.

    Args:
        q_nope_BTHN: See `mla_attention`, as for all other arguments.
        q_rope_BTHR: See `mla_attention`.
        k_nope_BSHN: See `mla_attention`.
        k_rope_BSR: See `mla_attention`.
        v_BSHV: See `mla_attention`.
        scale: See `mla_attention`.
        causal: See `mla_attention`.
        q_segment_ids_BT: See `mla_attention`.
        kv_segment_ids_BS: See `mla_attention`.
        q_offset_B: See `mla_attention`.
        implementation: See `mla_attention`.

    Returns:
        The output, and the float32 natural logarithm of the sum of the exponentials of the scaled
        scores, -inf where a query sees no key. No gradient flows through the log-sum-exp.

    Raises:
        ValueError: See `mla_attention`.

    DeepSeek-V2, arXiv 2405.04434, equations 17 and 18.
    """
    inputs = Inputs(q_nope_BTHN, q_rope_BTHR, k_nope_BSHN, k_rope_BSR, v_BSHV)
    masks = Masks(q_segment_ids_BT, kv_segment_ids_BS, q_offset_B)
    _check_call(inputs, masks, scale, implementation, causal=causal)
    inputs, masks = vary_alike((inputs, masks))
    out_BTHV, lse_BHT = _attend(inputs, masks, float(scale), causal, implementation)
    return out_BTHV, jax.lax.stop_gradient(lse_BHT)


def mla_attention_gradients(
    inputs: tuple[Array, Array, Array, Array, Array],
    masks: tuple[Array | None, Array | None, Array | None],
    out_BTHV: Float[Array, "B T H V"],
    lse_BHT: Float[Array, "B H T"],
    d_out_BTHV: Float[Array, "B T H V"],
    *,
    scale: float,
    causal: bool = True,
    implementation: str,
) -> tuple[Array, Array, Array, Array, Array]:
    """Computes the gradients of attention by a part of its keys, from the output over all.

    Queries' gradients summed over the parts are those of attention over all keys at once; those of
    a part's keys and values are whole.

    Args:
        inputs: q_nope_BTHN, q_rope_BTHR, and k_nope_BSHN, k_rope_BSR and v_BSHV of the part; see
            `mla_attention`.
        masks: q_segment_ids_BT, kv_segment_ids_BS and q_offset_B of the part; see `mla_attention`.
        out_BTHV: The output over all keys, in the dtype of the queries.
        lse_BHT: float32 log-sum-exp over all keys.
        d_out_BTHV: The output's gradient, in the dtype of the queries.
        scale: See `mla_attention`.
        causal: See `mla_attention`.
        implementation: one of IMPLEMENTATIONS but "reference", which knows no parts.

    Returns:
        The gradients of `inputs`, in their dtype.

    Raises:
        ValueError: "reference"; else see `mla_attention`.

    DeepSeek-V2, arXiv 2405.04434, equations 17 and 18.
    """
    named, named_masks = Inputs(*inputs), Masks(*masks)
    _check_call(named, named_masks, scale, implementation, causal=causal)
    if implementation == "reference":
        raise ValueError("implementation: 'reference' must see all keys at once")
    named, named_masks = vary_alike((named, named_masks))
    backward = load(__name__, implementation).backward
    return backward(
        named, named_masks, out_BTHV, lse_BHT, d_out_BTHV, scale=float(scale), causal=causal
    )


def _check_call(
    inputs: Inputs, masks: Masks, scale: float, implementation: str, *, causal: bool
) -> None:
    _check_arguments(inputs, masks, causal=causal)
    if not 0 < scale < math.inf:
        raise ValueError(f"scale: {scale} must be positive and finite")
    reason = supported(
        implementation,
        nope_dim=inputs.q_nope_BTHN.shape[3],
        rope_dim=inputs.q_rope_BTHR.shape[3],
        value_dim=inputs.v_BSHV.shape[3],
        dtype=inputs.q_nope_BTHN.dtype,
    )
    check_supported(implementation, reason)


def _check_arguments(inputs: Inputs, masks: Masks, *, causal: bool) -> None:
    q_nope_BTHN, q_rope_BTHR, k_nope_BSHN, _, v_BSHV = inputs
    q_segment_ids_BT, kv_segment_ids_BS, q_offset_B = masks
    for name in ("q_nope_BTHN", "q_rope_BTHR", "k_nope_BSHN", "v_BSHV"):
        shape = getattr(inputs, name).shape
        if len(shape) != 4:
            raise ValueError(f"{name}: shape {shape} must have 4 dims")
    B, T, H, N = q_nope_BTHN.shape
    S, R, V = k_nope_BSHN.shape[1], q_rope_BTHR.shape[3], v_BSHV.shape[3]
    given = inputs._asdict() | masks._asdict()
    of_inputs = ((B, T, H, N), (B, T, H, R), (B, S, H, N), (B, S, R), (B, S, H, V))
    of_masks = ((B, T), (B, S), (B,))
    for name, shape in zip(given, of_inputs + of_masks, strict=True):
        if given[name] is not None and given[name].shape != shape:
            raise ValueError(f"{name}: shape {given[name].shape} must be {shape}")
    if 0 in (B, T, H, S):
        name = "k_nope_BSHN" if S == 0 else "q_nope_BTHN"
        raise ValueError(f"{name}: shape {given[name].shape} must not be empty")
    for name, array in inputs._asdict().items():
        if array.dtype != q_nope_BTHN.dtype:
            raise ValueError(
                f"{name}: dtype {array.dtype} must be q_nope_BTHN's, {q_nope_BTHN.dtype}"
            )
    if (q_segment_ids_BT is None) != (kv_segment_ids_BS is None):
        missing = "q_segment_ids_BT" if q_segment_ids_BT is None else "kv_segment_ids_BS"
        raise ValueError(f"{missing}: None must be ids, as the other segment ids are given")
    if q_offset_B is not None and not causal:
        raise ValueError("q_offset_B: must be None where causal is False, as it moves the diagonal")


def _fold_into_batch(function: Any) -> Any:
    """Makes `jax.vmap` of `function` a longer batch, as all its arrays lead with B."""
    call = jax.custom_batching.custom_vmap(function)

    @call.def_vmap
    def rule(axis_size: int, in_batched: Any, *args: Any) -> Any:
        def fold(array: Array, batched: bool) -> Array:
            if not batched:
                array = jnp.broadcast_to(array, (axis_size, *array.shape))
            return array.reshape(axis_size * array.shape[1], *array.shape[2:])

        def unfold(array: Array) -> Array:
            return array.reshape(axis_size, array.shape[0] // axis_size, *array.shape[1:])

        results = jax.tree.map(unfold, call(*jax.tree.map(fold, args, tuple(in_batched))))
        return results, jax.tree.map(lambda _: True, results)

    return call


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _attend(
    inputs: Inputs, masks: Masks, scale: float, causal: bool, implementation: str
) -> tuple[Array, Array]:
    forward = load(__name__, implementation).forward
    forward = _fold_into_batch(functools.partial(forward, scale=scale, causal=causal))
    return forward(inputs, masks)


def _attend_forward(
    inputs: Inputs, masks: Masks, scale: float, causal: bool, implementation: str
) -> tuple[tuple[Array, Array], tuple[Any, ...]]:
    out_BTHV, lse_BHT = _attend(inputs, masks, scale, causal, implementation)
    out_BTHV = keep(out_BTHV, OUT_NAME, implementation)
    lse_BHT = keep(lse_BHT, LSE_NAME, implementation)
    return (out_BTHV, lse_BHT), (inputs, masks, out_BTHV, lse_BHT)


def _attend_backward(
    scale: float,
    causal: bool,
    implementation: str,
    residuals: tuple[Any, ...],
    cotangents: tuple[Array, Array],
) -> tuple[Inputs, None]:
    d_out_BTHV, _ = cotangents  # The log-sum-exp's is 0 by stop_gradient.
    backward = load(__name__, implementation).backward
    backward = _fold_into_batch(functools.partial(backward, scale=scale, causal=causal))
    return backward(*residuals, d_out_BTHV), None


_attend.defvjp(_attend_forward, _attend_backward)
