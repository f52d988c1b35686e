"""Grouped matmul for Hopper: Pallas, Mosaic GPU (sm_90a), bfloat16.

One persistent block per multiprocessor walks over output tiles. Its memory warpgroup fills a ring
of shared-memory stages through TMA, its two compute warpgroups multiply from them with wgmma, and
the ring runs on from one tile to the next, so loads never wait for a tile's end.

Row tiles start at their group's first row, whatever its alignment. TMA allows that for a plain
[rows, 64] window but not for one cut into the [8, 64] pieces that wgmma reads, so rows are loaded
and stored through a second, uncut view of the same memory: with 64 columns of two bytes the two
orders are the same bytes.
"""

import jax.numpy as jnp
from jax import Array

from pallas_kernels.grouped_matmul.hopper_blocks import LANE
from pallas_kernels.grouped_matmul.hopper_rows import rows_kernel
from pallas_kernels.grouped_matmul.hopper_weight_gradient import weight_gradient_kernel
from pallas_kernels.grouped_matmul.weights import BlockScaledWeights


def matmul(
    lhs_MK: Array,
    rhs_GKN: Array | BlockScaledWeights,
    group_sizes_G: Array,
    group_offset: Array,
    *,
    transpose_rhs: bool,
) -> Array:
    """Each row times its group's matrix."""
    if transpose_rhs and isinstance(rhs_GKN, BlockScaledWeights):
        raise ValueError(
            f"transpose_rhs: {transpose_rhs} must be False for quantised weights "
            f"({rhs_GKN.dtype}) and implementation 'hopper'"
        )
    (out_MN,) = rows_kernel(
        (_checked("lhs_MK", lhs_MK),),
        (_checked("rhs_GKN", rhs_GKN),),
        group_sizes_G,
        group_offset,
        transpose_rhs=transpose_rhs,
    )
    return out_MN


def swiglu(
    lhs_MK: Array,
    gate_GKN: Array | BlockScaledWeights,
    up_GKN: Array | BlockScaledWeights,
    group_sizes_G: Array,
    group_offset: Array,
) -> Array:
    """Gate and up projections and their SwiGLU product in one kernel."""
    (hidden_MN,) = rows_kernel(
        (_checked("lhs_MK", lhs_MK),),
        (_checked("gate_GKN", gate_GKN), _checked("up_GKN", up_GKN)),
        group_sizes_G,
        group_offset,
        activation=True,
    )
    return hidden_MN


def swiglu_products(
    lhs_MK: Array, gate_GKN: Array, up_GKN: Array, group_sizes_G: Array, group_offset: Array
) -> tuple[Array, Array, Array]:
    """As swiglu, and also the gate and up products, which the backward pass needs."""
    hidden_MN, gate_MN, up_MN = rows_kernel(
        (_checked("lhs_MK", lhs_MK),),
        (_checked("gate_GKN", gate_GKN), _checked("up_GKN", up_GKN)),
        group_sizes_G,
        group_offset,
        activation=True,
        keep_products=True,
    )
    return hidden_MN, gate_MN, up_MN


def swiglu_rows_gradient(
    d_gate_MN: Array,
    d_up_MN: Array,
    gate_GKN: Array,
    up_GKN: Array,
    group_sizes_G: Array,
    group_offset: Array,
) -> Array:
    """d_gate gate^T + d_up up^T, as one product over twice the columns."""
    (d_lhs_MK,) = rows_kernel(
        (d_gate_MN, d_up_MN), (gate_GKN, up_GKN), group_sizes_G, group_offset, transpose_rhs=True
    )
    return d_lhs_MK


def weight_gradient(
    lhs_MK: Array, d_out_MN: Array, group_sizes_G: Array, group_offset: Array, num_groups: int
) -> Array:
    """Sum over each group's rows of lhs^T d_out."""
    return weight_gradient_kernel(
        _checked("lhs_MK", lhs_MK),
        _checked("d_out_MN", d_out_MN),
        group_sizes_G,
        group_offset,
        num_groups,
    )


def _checked[T: (Array, Array | BlockScaledWeights)](name: str, array: T) -> T:
    """The array, when it is one that the kernels take."""
    if not isinstance(array, BlockScaledWeights) and array.dtype != jnp.bfloat16:
        raise ValueError(
            f"{name}: dtype {array.dtype} must be bfloat16 for implementation 'hopper'"
        )
    widths = array.shape[1:]
    if any(width % LANE for width in widths):
        raise ValueError(
            f"{name}: widths {widths} must be multiples of {LANE} for implementation 'hopper'"
        )
    return array
