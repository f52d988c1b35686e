"""Rows times the quantised weights of their group, by how many rows there are.

TPUs have a kernel of their own for most formats and any number of rows, Hopper one from two tokens'
up to some tens of rows a group. Else: few rows, as one request decodes: each row reads its own
matrix, in one kernel of XLA's that widens what it reads. Up to some tens a group: all groups at
once, each with room for so many rows, in as many passes as the largest needs. More: the
implementation's own product, with the weights of a group widened before it, which so many rows pay
for.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import Array, lax

from pallas_kernels.grouped_matmul.groups import local_groups
from pallas_kernels.grouped_matmul.limits import hopper_reads, tpu_reads
from pallas_kernels.grouped_matmul.stacks import LayerOfStack, stored_and_layer
from pallas_kernels.quantised import QuantisedWeights, widened_products

# Rows that each read their own matrix: about as many as there are groups, at most these.
MOST_SINGLE_ROWS = 64
# On Hopper, where a kernel reads a matrix once for all rows of its group: one token's rows.
MOST_SINGLE_ROWS_HOPPER = 8
# Mean rows of a group from which its weights are widened first.
MOST_MEAN_ROWS = 32
_LEAST_ROOM = 16  # a matrix unit's least height


def row_products(
    widened: Callable[[], tuple[Array, ...]],
    implementation: str,
    lhs_MK: Array,
    rhs: Sequence[QuantisedWeights | LayerOfStack],
    group_sizes_G: Array,
    group_offset: Array,
    *,
    activation: bool,
) -> tuple[Array, ...]:
    """Multiplies rows by one matrix of their group, or by two with SwiGLU after them.

    Args:
        widened: gives the results by the implementation's own product.
        implementation: which that is.
        lhs_MK: rows.
        rhs: a matrix, or a gate and an up matrix, each [K, N] for every group held.
        group_sizes_G: int32 rows of every group.
        group_offset: int32, the first group held.
        activation: give silu(gate) * up of the two products.

    Returns:
        Rows [M, N] of lhs_MK's dtype.
    """
    num_rows, num_groups = lhs_MK.shape[0], rhs[0].shape[0]
    matrices, layer = stored_and_layer(rhs)
    few = num_rows <= MOST_MEAN_ROWS * num_groups
    arguments = (lhs_MK, matrices, layer, group_sizes_G, group_offset)
    # Imported here, so that a host needs no other chip's compiler.
    if implementation == "tpu" and tpu_reads(matrices, lhs_MK.dtype):
        from pallas_kernels.grouped_matmul import tpu_quantised

        return (tpu_quantised.row_products(*arguments, activation=activation),)
    in_kernel = implementation == "hopper" and hopper_reads(matrices)
    if in_kernel and few and num_rows > MOST_SINGLE_ROWS_HOPPER:
        from pallas_kernels import hopper_few_rows

        return (hopper_few_rows.row_products(*arguments, activation=activation),)
    places = _Places(num_rows, *local_groups(group_sizes_G, group_offset, num_groups))
    if num_rows <= min(MOST_SINGLE_ROWS, max(num_groups, _LEAST_ROOM)):
        multiply, products = _single_rows, [_at(array) for array in rhs]
    elif few:
        multiply, products = _all_groups, [_at(array) for array in rhs]
    else:
        return widened()

    def finish(products_MN: list[Array]) -> Array:
        first_MN, *second = products_MN
        out_MN = jax.nn.silu(first_MN) * second[0] if activation else first_MN
        return out_MN.astype(lhs_MK.dtype)

    return (multiply(lhs_MK, products, places, finish),)


class _Places:
    """Where rows lie among the groups that are held.

    Attributes:
        starts_G: int32 first row of each group.
        sizes_G: int32 rows of each.
        group_M: int32 group of each row, some group for a row of none.
        within_M: int32 place of the row in its group.
        held_M: whether the row is of a group that is held.
    """

    def __init__(self, num_rows: int, starts_G: Array, sizes_G: Array):
        row_M = jnp.arange(num_rows, dtype=jnp.int32)
        ends_G = starts_G + sizes_G
        group_M = jnp.searchsorted(ends_G, row_M, side="right", method="compare_all")
        self.group_M = jnp.minimum(group_M, starts_G.shape[0] - 1).astype(jnp.int32)
        self.within_M = row_M - starts_G[self.group_M]
        self.held_M = (self.within_M >= 0) & (row_M < ends_G[self.group_M])
        self.starts_G, self.sizes_G = starts_G, sizes_G


_Pick = Callable[[Array | None], QuantisedWeights]


def _at(rhs: QuantisedWeights | LayerOfStack) -> _Pick:
    """Picks the matrices of some groups, or of all in turn, out of a layer or a stack of them."""

    def pick(group_M: Array | None) -> QuantisedWeights:
        if isinstance(rhs, LayerOfStack):
            place = rhs.layer if group_M is None else (rhs.layer, group_M)
            taken: QuantisedWeights = jax.tree.map(lambda leaf: leaf[place], rhs.stack)
            return taken
        return rhs if group_M is None else jax.tree.map(lambda leaf: leaf[group_M], rhs)

    return pick


def _single_rows(
    lhs_MK: Array, rhs: list[_Pick], places: _Places, finish: Callable[[list[Array]], Array]
) -> Array:
    """Each row times a matrix that it reads for itself: sums, not products of a matrix unit."""

    def product(pick: _Pick) -> Array:
        weights_MNK = pick(places.group_M).dequantised(jnp.float32)
        return jnp.sum(lhs_MK.astype(jnp.float32)[:, None, :] * weights_MNK, axis=-1)

    return jnp.where(places.held_M[:, None], finish([product(pick) for pick in rhs]), 0)


def _all_groups(
    lhs_MK: Array, rhs: list[_Pick], places: _Places, finish: Callable[[list[Array]], Array]
) -> Array:
    """All groups side by side, each with so many rows a pass; as a rule there is one pass."""
    num_rows, num_groups = lhs_MK.shape[0], places.starts_G.shape[0]
    room = max(_LEAST_ROOM, 2 ** math.ceil(math.log2(2 * num_rows / num_groups)))
    weights = [pick(None) for pick in rhs]

    def one_pass(first: Array | int) -> Array:
        row_GC = places.starts_G[:, None] + first + jnp.arange(room)
        lhs_GCK = lhs_MK[jnp.clip(row_GC, 0, num_rows - 1)]
        out_GCN = finish([widened_products(lhs_GCK, matrices) for matrices in weights])
        within_M = places.within_M - first
        there_M = places.held_M & (within_M >= 0) & (within_M < room)
        out_MN = out_GCN[places.group_M, jnp.clip(within_M, 0, room - 1)]
        return jnp.where(there_M[:, None], out_MN, 0)

    def next_pass(carry: tuple[Array, Array]) -> tuple[Array, Array]:
        first, out_MN = carry
        return first + room, out_MN + one_pass(first)

    most = jnp.max(places.sizes_G)
    start = (jnp.full_like(most, room), one_pass(0))
    return lax.while_loop(lambda carry: carry[0] < most, next_pass, start)[1]
