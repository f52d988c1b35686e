"""Latent attention in plain JAX, block by block: O(T) memory on any device, with no kernel."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.manual_axes import vary_like
from pallas_kernels.mla_attention.arguments import Inputs, Masks
from pallas_kernels.mla_attention.reference import visible_BTS
from pallas_kernels.mla_attention.tiles import XLA_BLOCK
from pallas_kernels.precision import precision_of


def _einsum(spec: str, left: Array, right: Array) -> Array:
    """Multiplies and sums in float32, also where a chip would round float32 operands."""
    if left.dtype == jnp.float32:
        return jnp.einsum(spec, left, right.astype(jnp.float32), precision=precision_of(left.dtype))

    def widened(left: Array, right: Array) -> Array:
        return jnp.einsum(spec, left.astype(jnp.float32), right.astype(jnp.float32))

    # The CPU backend has no batched dot of bfloat16 with a float32 result.
    narrow = functools.partial(jnp.einsum, spec, preferred_element_type=jnp.float32)
    return jax.lax.platform_dependent(left, right, cpu=widened, default=narrow)


@dataclasses.dataclass(frozen=True)
class _Blocks:
    """How T queries and S keys are cut; blocks that no query can see are not visited."""

    num_queries: int
    num_keys: int
    causal: bool
    q_offset_B: Array | None

    @property
    def q_size(self) -> int:
        return min(self.num_queries, XLA_BLOCK)

    @property
    def k_size(self) -> int:
        return min(self.num_keys, XLA_BLOCK)

    @property
    def num_q(self) -> int:
        return -(-self.num_queries // self.q_size)

    @property
    def num_k(self) -> int:
        return -(-self.num_keys // self.k_size)

    def pad_q(self, array: Array, axis: int = 1, value: float = 0) -> Array:
        return _pad(array, axis, self.num_q * self.q_size, value)

    def pad_k(self, array: Array) -> Array:
        return _pad(array, 1, self.num_k * self.k_size, 0)

    def pad(
        self, inputs: Inputs, masks: Masks
    ) -> tuple[list[Array], list[Array], tuple[Array | None, Array | None]]:
        """Returns queries, keys with values, and segment ids, padded to whole blocks."""
        q_ids, k_ids, _ = masks
        return (
            [self.pad_q(array) for array in inputs[:2]],
            [self.pad_k(array) for array in inputs[2:]],
            (
                None if q_ids is None else self.pad_q(q_ids),
                None if k_ids is None else self.pad_k(k_ids),
            ),
        )

    def cut_q(self, array: Array, i: Array | int, axis: int = 1) -> Array:
        return _cut(array, i, self.q_size, axis)

    def cut_k(self, array: Array, j: Array | int) -> Array:
        return _cut(array, j, self.k_size, 1)

    def k_stop(self, i: Array | int) -> Array | int:
        """Returns the number of the key blocks that queries of block i may see."""
        if not self.causal:
            return self.num_k
        stop = jnp.asarray((i + 1) * self.q_size)
        if self.q_offset_B is not None:
            stop = stop + self.q_offset_B.max()
        return jnp.clip((stop + self.k_size - 1) // self.k_size, 0, self.num_k)

    def loop[C](self, i: Array | int, body: Callable[[Any, C], C], carry: C) -> C:
        """Runs `body(j, carry)` over the key blocks that queries of block i may see."""
        if self.num_k == 1:
            return body(0, carry)
        return jax.lax.fori_loop(0, self.k_stop(i), body, carry)

    def mask_B1TS(
        self, i: Array | int, j: Array | int, q_ids_BT: Array | None, k_ids_BS: Array | None
    ) -> Array:
        q_positions_T = i * self.q_size + jnp.arange(self.q_size)
        k_positions_S = j * self.k_size + jnp.arange(self.k_size)
        q_ids_BT = None if q_ids_BT is None else self.cut_q(q_ids_BT, i)
        k_ids_BS = None if k_ids_BS is None else self.cut_k(k_ids_BS, j)
        mask_BTS = visible_BTS(
            q_positions_T, k_positions_S, q_ids_BT, k_ids_BS, self.q_offset_B, causal=self.causal
        )
        return (mask_BTS & (k_positions_S < self.num_keys))[:, None]


def _pad(array: Array, axis: int, size: int, value: float) -> Array:
    if array.shape[axis] == size:
        return array
    widths = [(0, 0)] * array.ndim
    widths[axis] = (0, size - array.shape[axis])
    return jnp.pad(array, widths, constant_values=value)


def _cut(array: Array, index: Array | int, size: int, axis: int) -> Array:
    if array.shape[axis] == size:
        return array
    return jax.lax.dynamic_slice_in_dim(array, index * size, size, axis)


def _full(shape: tuple[int, ...], value: float, like: Array) -> Array:
    """Returns a float32 constant for a loop's carry, varying over the mesh axes of `like`."""
    return vary_like(jnp.full(shape, value, jnp.float32), like)


def _scores_BHTS(q_nope: Array, q_rope: Array, k_nope: Array, k_rope: Array) -> Array:
    nope_BHTS = _einsum("BTHN,BSHN->BHTS", q_nope, k_nope)
    return nope_BHTS + _einsum("BTHR,BSR->BHTS", q_rope, k_rope)


def forward(inputs: Inputs, masks: Masks, *, scale: float, causal: bool) -> tuple[Array, Array]:
    """Returns the output and the log-sum-exp; the arguments are those of `mla_attention`."""
    (B, T, H, _), dtype = inputs.q_nope_BTHN.shape, inputs.q_nope_BTHN.dtype
    S, V = inputs.v_BSHV.shape[1], inputs.v_BSHV.shape[3]
    blocks = _Blocks(T, S, causal, masks.q_offset_B)
    (q_nope, q_rope), (k_nope, k_rope, v), (q_ids, k_ids) = blocks.pad(inputs, masks)
    t = blocks.q_size

    def attend(i: Array | int) -> tuple[Array, Array]:
        q_nope_i, q_rope_i = blocks.cut_q(q_nope, i), blocks.cut_q(q_rope, i)

        def step(j: Array | int, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            acc_BHTV, max_BHT, sum_BHT = carry
            scores = _scores_BHTS(
                q_nope_i, q_rope_i, blocks.cut_k(k_nope, j), blocks.cut_k(k_rope, j)
            )
            scores = jnp.where(blocks.mask_B1TS(i, j, q_ids, k_ids), scores * scale, -jnp.inf)
            new_max_BHT = jnp.maximum(max_BHT, scores.max(axis=-1))
            # Finite even for queries that have seen no key yet, for which -inf - -inf would be NaN.
            base_BHT = jnp.where(new_max_BHT == -jnp.inf, 0.0, new_max_BHT)
            weights_BHTS = jnp.exp(scores - base_BHT[..., None])
            decay_BHT = jnp.exp(max_BHT - base_BHT)
            v_j = blocks.cut_k(v, j)
            step_BHTV = _einsum("BHTS,BSHV->BHTV", weights_BHTS.astype(v_j.dtype), v_j)
            acc_BHTV = acc_BHTV * decay_BHT[..., None] + step_BHTV
            return acc_BHTV, new_max_BHT, sum_BHT * decay_BHT + weights_BHTS.sum(axis=-1)

        carry = (
            _full((B, H, t, V), 0, q_nope),
            _full((B, H, t), -jnp.inf, q_nope),
            _full((B, H, t), 0, q_nope),
        )
        acc_BHTV, max_BHT, sum_BHT = blocks.loop(i, step, carry)
        acc_BHTV = acc_BHTV / jnp.where(sum_BHT == 0, 1.0, sum_BHT)[..., None]
        out_BTHV = acc_BHTV.swapaxes(1, 2).astype(dtype)
        return out_BTHV, max_BHT + jnp.log(sum_BHT)

    if blocks.num_q == 1:
        return attend(0)
    out, lse = jax.lax.map(attend, jnp.arange(blocks.num_q))
    out_BTHV = jnp.moveaxis(out, 0, 1).reshape(B, -1, H, V)[:, :T]
    lse_BHT = jnp.moveaxis(lse, 0, 2).reshape(B, H, -1)[:, :, :T]
    return out_BTHV, lse_BHT


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
    """Returns the gradients of the five float inputs; scores are computed again, block by block."""
    T, S = inputs.q_nope_BTHN.shape[1], inputs.v_BSHV.shape[1]
    blocks = _Blocks(T, S, causal, masks.q_offset_B)
    (q_nope, q_rope), (k_nope, k_rope, v), (q_ids, k_ids) = blocks.pad(inputs, masks)
    d_out = blocks.pad_q(d_out_BTHV)
    delta_BTH = (d_out_BTHV.astype(jnp.float32) * out_BTHV.astype(jnp.float32)).sum(axis=-1)
    delta_BHT = blocks.pad_q(delta_BTH.swapaxes(1, 2), axis=2)
    # A query that sees no key has the log-sum-exp -inf; +inf gives it and the padding weights of 0.
    lse_BHT = jnp.where(lse_BHT == -jnp.inf, jnp.inf, lse_BHT)
    lse_BHT = blocks.pad_q(lse_BHT, axis=2, value=jnp.inf)

    def queries(i: Array | int, d_keys: tuple[Array, ...]) -> tuple[tuple[Array, ...], tuple]:
        q_nope_i, q_rope_i, d_out_i = (blocks.cut_q(array, i) for array in (q_nope, q_rope, d_out))
        lse_i, delta_i = (blocks.cut_q(array, i, axis=2) for array in (lse_BHT, delta_BHT))

        def step(j: Array | int, carry: tuple[tuple[Array, ...], ...]) -> tuple:
            (dq_nope, dq_rope), d_keys = carry
            k_nope_j, k_rope_j, v_j = (blocks.cut_k(array, j) for array in (k_nope, k_rope, v))
            scores = _scores_BHTS(q_nope_i, q_rope_i, k_nope_j, k_rope_j) * scale
            scores = jnp.where(blocks.mask_B1TS(i, j, q_ids, k_ids), scores, -jnp.inf)
            weights_BHTS = jnp.exp(scores - lse_i[..., None])
            d_weights_BHTS = _einsum("BTHV,BSHV->BHTS", d_out_i, v_j)
            d_scores_BHTS = weights_BHTS * (d_weights_BHTS - delta_i[..., None]) * scale
            d_scores_BHTS = d_scores_BHTS.astype(q_nope.dtype)
            weights_BHTS = weights_BHTS.astype(q_nope.dtype)
            dq_nope = dq_nope + _einsum("BHTS,BSHN->BTHN", d_scores_BHTS, k_nope_j)
            dq_rope = dq_rope + _einsum("BHTS,BSR->BTHR", d_scores_BHTS, k_rope_j)
            steps = (
                _einsum("BHTS,BTHN->BSHN", d_scores_BHTS, q_nope_i),
                _einsum("BHTS,BTHR->BSR", d_scores_BHTS, q_rope_i),
                _einsum("BHTS,BTHV->BSHV", weights_BHTS, d_out_i),
            )
            d_keys = tuple(
                _add_block(d_key, step, j) for d_key, step in zip(d_keys, steps, strict=True)
            )
            return (dq_nope, dq_rope), d_keys

        d_queries = (_full(q_nope_i.shape, 0, q_nope), _full(q_rope_i.shape, 0, q_nope))
        d_queries, d_keys = blocks.loop(i, step, (d_queries, d_keys))
        return d_keys, tuple(array.astype(q_nope.dtype) for array in d_queries)

    d_keys = tuple(_full(array.shape, 0, q_nope) for array in (k_nope, k_rope, v))
    if blocks.num_q == 1:
        d_keys, (dq_nope, dq_rope) = queries(0, d_keys)
    else:
        d_keys, d_queries = jax.lax.scan(
            lambda d_keys, i: queries(i, d_keys), d_keys, jnp.arange(blocks.num_q)
        )
        dq_nope, dq_rope = (
            jnp.moveaxis(array, 0, 1).reshape(padded.shape)[:, :T]
            for array, padded in zip(d_queries, (q_nope, q_rope), strict=True)
        )
    dk_nope, dk_rope, dv = (array[:, :S].astype(q_nope.dtype) for array in d_keys)
    return Inputs(dq_nope, dq_rope, dk_nope, dk_rope, dv)


def _add_block(array: Array, block: Array, index: Array | int) -> Array:
    """Returns `array` with `block` added at the index-th block of axis 1."""
    size = block.shape[1]
    if array.shape[1] == size:
        return array + block
    total = jax.lax.dynamic_slice_in_dim(array, index * size, size, 1) + block
    return jax.lax.dynamic_update_slice_in_dim(array, total, index * size, 1)
