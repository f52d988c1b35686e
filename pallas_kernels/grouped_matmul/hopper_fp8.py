"""Products in float8 of many rows by group on Hopper: the kernel is `pallas_kernels/hopper_fp8.py`.

Imported when it is chosen, as every module of an implementation is.
"""

from collections.abc import Sequence

from jax import Array

from pallas_kernels import hopper_fp8
from pallas_kernels.grouped_matmul.stacks import LayerOfStack, stored_and_layer
from pallas_kernels.quantised import QuantisedWeights


def row_products(
    lhs: Sequence[Array],
    rhs: Sequence[QuantisedWeights | LayerOfStack],
    group_sizes_G: Array,
    group_offset: Array,
    *,
    transpose_rhs: bool = False,
    activation: bool = False,
) -> tuple[Array]:
    """As those of the other implementations; a layer of a stack is read where it lies."""
    assert not transpose_rhs
    (lhs_MK,) = lhs
    stored, layer = stored_and_layer(rhs)
    out_MN = hopper_fp8.row_products(
        lhs_MK, stored, layer, group_sizes_G, group_offset, activation=activation
    )
    return (out_MN,)
