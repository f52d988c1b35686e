"""The order of a row's tokens where devices divide it (mesh axis `context`).

Device i of n has tokens i, i + n, i + 2 n, … . So every device has an equal part of every document,
early tokens and late ones, and all devices have equal work under any causal mask, of one document
or of many. Blocks of a row, also two of them a device (zigzag), leave the devices of the end of a
long document with most of it as soon as documents are packed. Of any two devices' tokens, the one's
see the other's up to the same place or the one before: one causal mask, which the kernels have.
(Striped attention: Brandon et al., arXiv 2311.09431.)

Whatever else a row has, such as positions, documents, targets and their weights, is in the same
order, so nothing but attention has to know of it: a token's next one is its target, wherever that
is, and its position is a number beside it.
"""

from __future__ import annotations

from typing import Any


def to_stripes[A: Any](row: A, count: int, axis: int = 1) -> A:
    """Puts a dim of tokens into the order in which devices divide it.

    Args:
        row: a JAX or NumPy array.
        count: devices that divide the dim; 1 changes nothing.
        axis: the dim.

    Raises:
        ValueError: the devices do not divide the dim's size.
    """
    if row.shape[axis] % count:
        raise ValueError(
            f"rows of {row.shape[axis]} tokens: must be divisible by mesh.context={count}"
        )
    return row if count == 1 else _transpose(row, row.shape[axis] // count, count, axis)


def from_stripes[A: Any](row: A, count: int, axis: int = 1) -> A:
    """Puts a dim of tokens back into the order of the text; undoes `to_stripes`."""
    return row if count == 1 else _transpose(row, count, row.shape[axis] // count, axis)


def _transpose(row: Any, outer: int, inner: int, axis: int) -> Any:
    shape = row.shape
    split = row.reshape(*shape[:axis], outer, inner, *shape[axis + 1 :])
    return split.swapaxes(axis, axis + 1).reshape(shape)
