"""Grouped matmul for TPUs (Pallas, Mosaic): bfloat16 or float32, widths in multiples of 128.

Rows and weights move by hand-written copies; how and why stands in `tpu_rows` for the products and
the rows' gradients, and in `tpu_weight_gradient`.
"""

from typing import Any

import jax.numpy as jnp
from jax import Array

from pallas_kernels.grouped_matmul.tpu_rows import rows_kernel
from pallas_kernels.grouped_matmul.tpu_weight_gradient import weight_gradient_kernel
from pallas_kernels.grouped_matmul.tpu_windows import LANES
from pallas_kernels.grouped_matmul.weights import BlockScaledWeights, LayerOfStack

TAKES_STACKS = True  # Layers of a stack are used where they lie.


def matmul(
    lhs_MK: Array,
    rhs_GKN: Array | BlockScaledWeights | LayerOfStack,
    group_sizes_G: Array,
    group_offset: Array,
    *,
    transpose_rhs: bool,
    interpret: Any = False,
) -> Array:
    """Each row times its group's matrix."""
    (out_MN,) = rows_kernel(
        (_checked("lhs_MK", lhs_MK),),
        (_checked("rhs_GKN", rhs_GKN),),
        group_sizes_G,
        group_offset,
        transpose_rhs=transpose_rhs,
        interpret=interpret,
    )
    return out_MN


def swiglu(
    lhs_MK: Array,
    gate_GKN: Array | BlockScaledWeights | LayerOfStack,
    up_GKN: Array | BlockScaledWeights | LayerOfStack,
    group_sizes_G: Array,
    group_offset: Array,
    *,
    interpret: Any = False,
) -> Array:
    """Gate and up projections and their SwiGLU product in one kernel."""
    (hidden_MN,) = rows_kernel(
        (_checked("lhs_MK", lhs_MK),),
        (_checked("gate_GKN", gate_GKN), _checked("up_GKN", up_GKN)),
        group_sizes_G,
        group_offset,
        activation=True,
        interpret=interpret,
    )
    return hidden_MN


def swiglu_products(
    lhs_MK: Array,
    gate_GKN: Array,
    up_GKN: Array,
    group_sizes_G: Array,
    group_offset: Array,
    *,
    interpret: Any = False,
) -> tuple[Array, Array, Array]:
    """As swiglu, and also the gate and up products, which the backward pass needs."""
    hidden_MN, gate_MN, up_MN = rows_kernel(
        (_checked("lhs_MK", lhs_MK),),
        (_checked("gate_GKN", gate_GKN), _checked("up_GKN", up_GKN)),
        group_sizes_G,
        group_offset,
        activation=True,
        keep_products=True,
        interpret=interpret,
    )
    return hidden_MN, gate_MN, up_MN


def swiglu_rows_gradient(
    d_gate_MN: Array,
    d_up_MN: Array,
    gate_GKN: Array,
    up_GKN: Array,
    group_sizes_G: Array,
    group_offset: Array,
    *,
    interpret: Any = False,
) -> Array:
    """d_gate gate^T + d_up up^T, summed in float32."""
    (d_lhs_MK,) = rows_kernel(
        (d_gate_MN, d_up_MN),
        (gate_GKN, up_GKN),
        group_sizes_G,
        group_offset,
        transpose_rhs=True,
        interpret=interpret,
    )
    return d_lhs_MK


def weight_gradient(
    lhs_MK: Array,
    d_out_MN: Array,
    group_sizes_G: Array,
    group_offset: Array,
    num_groups: int,
    *,
    interpret: Any = False,
) -> Array:
    """Sum over each group's rows of lhs^T d_out."""
    return weight_gradient_kernel(
        _checked("lhs_MK", lhs_MK),
        _checked("d_out_MN", d_out_MN),
        group_sizes_G,
        group_offset,
        num_groups,
        interpret=interpret,
    )


def _checked[T: (Array, Array | BlockScaledWeights | LayerOfStack)](name: str, array: T) -> T:
    """The array, when it is one that the kernels take."""
    widths = array.shape[1:]
    if any(width % LANES for width in widths):
        raise ValueError(
            f"{name}: widths {widths} must be multiples of {LANES} for implementation 'tpu'"
        )
    dtypes = (jnp.bfloat16, jnp.float32)
    if not isinstance(array, BlockScaledWeights) and array.dtype not in dtypes:
        raise ValueError(
            f"{name}: dtype {array.dtype} must be bfloat16 or float32 for implementation 'tpu'"
        )
    return array
