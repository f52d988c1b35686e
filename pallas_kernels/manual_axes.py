"""Arrays inside `jax.shard_map`: which manual mesh axes they vary over."""

from typing import Any

import jax
from jax import Array, lax
from jax.typing import DTypeLike


def _axes(tree: Any) -> frozenset[str]:
    """The manual axes over which any array of a tree varies."""
    axes = (jax.typeof(leaf).manual_axis_type.varying for leaf in jax.tree.leaves(tree))
    return frozenset().union(*axes)


def vary_like[T](tree: T, reference: Any) -> T:
    """Marks arrays as varying over the manual axes over which any of the reference's does.

    A constant that a loop carries must enter with the axes that it leaves with. The result of a
    Mosaic GPU kernel has lost the axes of its operands.
    """
    axes = _axes(reference)

    def mark(leaf: Array) -> Array:
        missing = axes - _axes(leaf)
        return lax.pcast(leaf, tuple(sorted(missing)), to="varying") if missing else leaf

    return jax.tree.map(mark, tree)


def vary_alike[T](tree: T) -> T:
    """Marks all arrays as varying over the manual axes over which any of them varies.

    A weight that is the same on every shard meets rows that are not. The transpose of the mark sums
    the weight's gradient over those shards.
    """
    return vary_like(tree, tree)


def output_like(array: Array, shape: tuple[int, ...], dtype: DTypeLike) -> jax.ShapeDtypeStruct:
    """The shape of a kernel's output that varies over the manual axes over which `array` does."""
    manual = jax.typeof(array).manual_axis_type
    return jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=manual)
