"""Products in float8 of many rows by group on Hopper: the kernel is `pallas_kernels/hopper_fp8.py`.

Imported when it is chosen, as every module of an implementation is.
"""

from collections.abc import Sequence
from typing import cast

from jax import Array

from pallas_kernels import hopper_fp8
from pallas_kernels.grouped_matmul.stacks import LayerOfStack
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
    stored = [
        cast(QuantisedWeights, array.stack if isinstance(array, LayerOfStack) else array)
        for array in rhs
    ]
    layers = [array.layer for array in rhs if isinstance(array, LayerOfStack)]
    out_MN = hopper_fp8.row_products(
        lhs_MK,
        stored,
        layers[0] if layers else 0,
        group_sizes_G,
        group_offset,
        activation=activation,
    )
    return (out_MN,)
