"""What all implementations of latent attention are given, besides scale and causality."""

from typing import NamedTuple

from jax import Array


class Inputs(NamedTuple):
    """The float arguments of `mla_attention`, or their gradients."""

    q_nope_BTHN: Array
    q_rope_BTHR: Array
    k_nope_BSHN: Array
    k_rope_BSR: Array
    v_BSHV: Array


class Masks(NamedTuple):
    """The arguments of `mla_attention` that hide keys, each None if not given."""

    q_segment_ids_BT: Array | None = None
    kv_segment_ids_BS: Array | None = None
    q_offset_B: Array | None = None
