"""What the experts' kernels mean: NumPy, float64, one group at a time."""

import numpy as np
from numpy.typing import ArrayLike


def row_ranges(group_sizes: ArrayLike, offset: int, num_groups: int) -> list[slice]:
    """Returns the rows of each of the groups [offset, offset + num_groups)."""
    group_sizes = np.asarray(group_sizes)
    ends = np.cumsum(group_sizes)
    return [slice(ends[g] - group_sizes[g], ends[g]) for g in range(offset, offset + num_groups)]


def grouped_matmul(
    lhs: ArrayLike, rhs: ArrayLike, group_sizes: ArrayLike, *, offset: int = 0
) -> np.ndarray:
    """Returns each row times its group's matrix, 0 for rows of other groups."""
    lhs, rhs = np.asarray(lhs, np.float64), np.asarray(rhs, np.float64)
    out = np.zeros((lhs.shape[0], rhs.shape[2]))
    for group, rows in enumerate(row_ranges(group_sizes, offset, len(rhs))):
        out[rows] = lhs[rows] @ rhs[group]
    return out


def grouped_matmul_gradients(
    lhs: ArrayLike, rhs: ArrayLike, group_sizes: ArrayLike, d_out: ArrayLike, *, offset: int = 0
) -> tuple[np.ndarray, np.ndarray]:
    """Returns the gradients of lhs and rhs."""
    lhs, rhs, d_out = (np.asarray(x, np.float64) for x in (lhs, rhs, d_out))
    d_lhs, d_rhs = np.zeros_like(lhs), np.zeros_like(rhs)
    for group, rows in enumerate(row_ranges(group_sizes, offset, len(rhs))):
        d_lhs[rows] = d_out[rows] @ rhs[group].T
        d_rhs[group] = lhs[rows].T @ d_out[rows]
    return d_lhs, d_rhs


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


def grouped_swiglu(
    lhs: ArrayLike, gate: ArrayLike, up: ArrayLike, group_sizes: ArrayLike, *, offset: int = 0
) -> np.ndarray:
    """Returns silu(lhs gate) * (lhs up)."""
    gated = grouped_matmul(lhs, gate, group_sizes, offset=offset)
    return gated * _sigmoid(gated) * grouped_matmul(lhs, up, group_sizes, offset=offset)


def grouped_swiglu_gradients(
    lhs: ArrayLike,
    gate: ArrayLike,
    up: ArrayLike,
    group_sizes: ArrayLike,
    d_hidden: ArrayLike,
    *,
    offset: int = 0,
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Returns the gradients of lhs, gate and up."""
    d_hidden = np.asarray(d_hidden, np.float64)
    gated = grouped_matmul(lhs, gate, group_sizes, offset=offset)
    raised = grouped_matmul(lhs, up, group_sizes, offset=offset)
    sigmoid = _sigmoid(gated)
    d_gated = d_hidden * raised * sigmoid * (1 + gated * (1 - sigmoid))
    d_raised = d_hidden * gated * sigmoid
    d_lhs_gate, d_gate = grouped_matmul_gradients(lhs, gate, group_sizes, d_gated, offset=offset)
    d_lhs_up, d_up = grouped_matmul_gradients(lhs, up, group_sizes, d_raised, offset=offset)
    return d_lhs_gate + d_lhs_up, d_gate, d_up
