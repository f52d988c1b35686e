"""Grouped matmul in plain XLA, for the CPU and for GPUs older than Hopper.

A loop goes over row tiles, each within one group, and multiplies a tile by its group's matrix.
Tiles start where their group starts, so nothing is gathered. A tile that reaches past its group's
end writes zeros there, and the next tile, which comes later, writes over them. The loop runs over
the tiles that exist, so the work is the rows and at most one tile more for each group.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import Array, lax
from jax.typing import DTypeLike

from pallas_kernels.grouped_matmul import portable
from pallas_kernels.grouped_matmul.groups import group_of_tile, local_groups
from pallas_kernels.grouped_matmul.portable import Weights
from pallas_kernels.precision import precision_of
from pallas_kernels.quantised import (
    BlockScaledWeights,
    QuantisedWeights,
    dequantise,
    widened_products,
)

MIN_TILE, MAX_TILE = 8, 512


def row_tile(num_rows: int, num_groups: int) -> int:
    """Rows in a tile: the power of two next to the mean group size, within [8, 512]."""
    mean = max(1, num_rows // max(1, num_groups))
    return min(MAX_TILE, max(MIN_TILE, 2 ** math.ceil(math.log2(mean))))


def _pick(rhs: Weights, group: Array, dtype: DTypeLike) -> Array:
    """The matrix of one group."""
    if isinstance(rhs, BlockScaledWeights):
        return dequantise(_index(rhs.values, group), _index(rhs.scales, group), dtype)
    assert not isinstance(rhs, QuantisedWeights)
    return _index(rhs, group)


def _index(array: Array, group: Array) -> Array:
    return lax.dynamic_index_in_dim(array, group, keepdims=False)


def _rows(array_MK: Array, start: Array, tile: int) -> Array:
    return lax.dynamic_slice_in_dim(array_MK, start, tile)


def _pad(array_MK: Array, tile: int) -> Array:
    """Room for a last tile that reaches past the rows."""
    return jnp.pad(array_MK, ((0, tile), (0, 0)))


def _map_tiles(
    tile_rows: Callable[[Array, Array], Array],
    lhs_MK: Array,
    num_groups: int,
    num_columns: int,
    group_sizes_G: Array,
    group_offset: Array,
) -> Array:
    """Writes tile_rows(lhs_tile, group) for every tile; other rows are 0."""
    num_rows = lhs_MK.shape[0]
    tile = row_tile(num_rows, num_groups)
    starts_G, sizes_G = local_groups(group_sizes_G, group_offset, num_groups)
    max_tiles = num_rows // tile + num_groups
    group_T, index_T, num_tiles = group_of_tile(num_tiles_of(sizes_G, tile), max_tiles)
    lhs_PK = _pad(lhs_MK, tile)
    out_PN = lax.full_like(lhs_PK, 0, shape=(num_rows + tile, num_columns))

    def body(index: Array, out_PN: Array) -> Array:
        group, row = group_T[index], index_T[index] * tile
        start = starts_G[group] + row
        valid_T1 = (jnp.arange(tile) < sizes_G[group] - row)[:, None]
        out_TN = jnp.where(valid_T1, tile_rows(_rows(lhs_PK, start, tile), group), 0)
        return lax.dynamic_update_slice_in_dim(out_PN, out_TN.astype(out_PN.dtype), start, 0)

    return lax.fori_loop(0, num_tiles, body, out_PN)[:num_rows]


def num_tiles_of(sizes_G: Array, tile: int) -> Array:
    """Tiles that each group needs."""
    return (sizes_G + tile - 1) // tile


def _dot(lhs_TK: Array, rhs_KN: Array, transpose_rhs: bool = False) -> Array:
    letters = "TK,NK->TN" if transpose_rhs else "TK,KN->TN"
    precision = precision_of(lhs_TK.dtype)
    return jnp.einsum(
        letters, lhs_TK, rhs_KN, precision=precision, preferred_element_type=jnp.float32
    )


def _product(lhs_TK: Array, rhs: Weights, group: Array, transpose_rhs: bool = False) -> Array:
    """A tile's rows times the matrix of their group, float32."""
    if isinstance(rhs, QuantisedWeights):
        return widened_products(lhs_TK, jax.tree.map(lambda leaf: _index(leaf, group), rhs))
    return _dot(lhs_TK, _pick(rhs, group, lhs_TK.dtype), transpose_rhs)


def row_products(
    lhs: tuple[Array, ...],
    rhs: tuple[Weights, ...],
    group_sizes_G: Array,
    group_offset: Array,
    *,
    transpose_rhs: bool = False,
    activation: bool = False,
    keep_products: bool = False,
) -> tuple[Array, ...]:
    """Rows times their group's matrices; the arguments are those of `portable.row_products`."""
    num_groups, *dims = rhs[0].shape
    num_columns = dims[0] if transpose_rhs else dims[1]

    def map_tiles(lhs_MK: Array, tile_rows: Callable[[Array, Array], Array]) -> Array:
        return _map_tiles(tile_rows, lhs_MK, num_groups, num_columns, group_sizes_G, group_offset)

    def matmul(lhs_MK: Array, rhs_GKN: Weights) -> Array:
        def tile_rows(lhs_TK: Array, group: Array) -> Array:
            return _product(lhs_TK, rhs_GKN, group, transpose_rhs)

        return map_tiles(lhs_MK, tile_rows)

    def swiglu(lhs_MK: Array, gate_GKN: Weights, up_GKN: Weights) -> Array:
        def tile_rows(lhs_TK: Array, group: Array) -> Array:
            gate_TN = _product(lhs_TK, gate_GKN, group)
            up_TN = _product(lhs_TK, up_GKN, group)
            return jax.nn.silu(gate_TN) * up_TN

        return map_tiles(lhs_MK, tile_rows)

    return portable.row_products(
        matmul, swiglu, lhs, rhs, activation=activation, keep_products=keep_products
    )


def weight_gradient(
    lhs_MK: Array, d_out_MN: Array, group_sizes_G: Array, group_offset: Array, num_groups: int
) -> Array:
    """Sums lhs^T d_out over the rows of each held group; the arguments are those of `reference`.

    Small groups are taken at once, the others in turn.
    """
    tile = row_tile(lhs_MK.shape[0], num_groups)
    starts_G, sizes_G = local_groups(group_sizes_G, group_offset, num_groups)
    lhs_PK, d_out_PN = _pad(lhs_MK, tile), _pad(d_out_MN, tile)
    index_T = jnp.arange(tile)

    def product(letters: str, lhs: Array, d_out: Array, valid: Array) -> Array:
        # Both sides are masked: a row of another group may hold inf or nan.
        masked = (jnp.where(valid[..., None], side, 0) for side in (lhs, d_out))
        precision = precision_of(lhs.dtype)
        return jnp.einsum(letters, *masked, precision=precision, preferred_element_type=jnp.float32)

    # The first tile of every group: as many rows as there are, and padding of at most twice that.
    rows_GT = starts_G[:, None] + index_T
    d_rhs_GKN = product(
        "GTK,GTN->GKN", lhs_PK[rows_GT], d_out_PN[rows_GT], index_T < sizes_G[:, None]
    ).astype(lhs_MK.dtype)
    tiles_G = num_tiles_of(sizes_G, tile)
    large_first_G = jnp.argsort(-tiles_G)

    def one_group(index: Array, d_rhs_GKN: Array) -> Array:
        group = large_first_G[index]

        def add_tile(index: Array, sum_KN: Array) -> Array:
            row = index * tile
            start = starts_G[group] + row
            lhs_TK, d_out_TN = _rows(lhs_PK, start, tile), _rows(d_out_PN, start, tile)
            return sum_KN + product("TK,TN->KN", lhs_TK, d_out_TN, index_T < sizes_G[group] - row)

        shape_KN = (lhs_MK.shape[1], d_out_MN.shape[1])
        sum_KN = lax.full_like(lhs_MK, 0, shape=shape_KN, dtype=jnp.float32)
        sum_KN = lax.fori_loop(0, tiles_G[group], add_tile, sum_KN)
        return lax.dynamic_update_index_in_dim(d_rhs_GKN, sum_KN.astype(lhs_MK.dtype), group, 0)

    return lax.fori_loop(0, jnp.sum(tiles_G > 1), one_group, d_rhs_GKN)
