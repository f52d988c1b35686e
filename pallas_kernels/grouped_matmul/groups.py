"""Where the rows of each group lie: the metadata that every implementation starts from."""

import jax.numpy as jnp
from jax import Array, lax
from jaxtyping import Int


def local_groups(
    group_sizes_G: Int[Array, " groups"], group_offset: Int[Array, ""], num_groups: int
) -> tuple[Int[Array, " G"], Int[Array, " G"]]:
    """Returns first row and number of rows of the groups that the right-hand side holds.

    Args:
        group_sizes_G: int32 rows of all groups.
        group_offset: int32, the first group held.
        num_groups: number of groups held.

    Returns:
        int32 first rows [num_groups] and int32 sizes [num_groups].
    """
    starts = jnp.cumsum(group_sizes_G) - group_sizes_G
    return (
        lax.dynamic_slice(starts, (group_offset,), (num_groups,)),
        lax.dynamic_slice(group_sizes_G, (group_offset,), (num_groups,)),
    )


def group_of_tile(
    tiles_G: Int[Array, " G"], max_tiles: int
) -> tuple[Int[Array, " T"], Int[Array, " T"], Int[Array, ""]]:
    """Lays the tiles of all groups in one list, groups in order.

    Args:
        tiles_G: int32 number of tiles of each group.
        max_tiles: a bound on their sum, the length of the list.

    Returns:
        The group of each tile and the tile's index within its group, int32 [max_tiles], and their
        true number. Entries beyond that number name the last group.
    """
    ends_G = jnp.cumsum(tiles_G)
    index_T = jnp.arange(max_tiles, dtype=jnp.int32)
    group_T = jnp.searchsorted(ends_G, index_T, side="right", method="compare_all")
    group_T = jnp.minimum(group_T, tiles_G.shape[0] - 1).astype(jnp.int32)
    return group_T, index_T - (ends_G - tiles_G)[group_T], ends_G[-1]
