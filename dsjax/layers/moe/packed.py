"""One expert as a run of bytes, in the form in which it is stored: what crosses a host's link."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dsjax.layers.moe.experts import ExpertWeights
from dsjax.layers.moe.layer import MoE
from dsjax.quantise import Sides
from pallas_kernels.quantised import Format, pack_halves

MATRICES = ("w_gate", "w_up", "w_down")
_LEAVES = ("weight", "scales", "zeros")
_ALIGNMENT = 256  # bytes, of where a leaf begins
_HALVES = (jnp.dtype(jnp.int4), jnp.dtype(jnp.uint4))


@dataclass(frozen=True)
class PackedLeaf:
    """Numbers, scales or zeros of one of an expert's matrices.

    Attributes:
        matrix: "w_gate", "w_up" or "w_down".
        leaf: "weight", "scales" or "zeros".
        shape: of one expert's.
        dtype: as it is stored; two numbers of 4 bits share a byte.
        start: its first byte.
    """

    matrix: str
    leaf: str
    shape: tuple[int, ...]
    dtype: str
    start: int

    @property
    def num_bytes(self) -> int:
        """Bytes without what follows up to the next leaf."""
        size = math.prod(self.shape)
        dtype = jnp.dtype(self.dtype)
        return -(-size // 2) if dtype in _HALVES else size * dtype.itemsize


@dataclass(frozen=True)
class ExpertLayout:
    """Where an expert's matrices lie among its bytes; hashable, so part of a program's key.

    Attributes:
        leaves: in the order of their bytes.
        sides: dims of a layer's stack of each matrix, in the order of `MATRICES`.
        forms: how each is stored, None for as it is.
        dtype: compute type.
        num_bytes: of one expert.
        num_experts: of a layer.
    """

    leaves: tuple[PackedLeaf, ...]
    sides: tuple[Sides, ...]
    forms: tuple[Format | None, ...]
    dtype: str
    num_bytes: int
    num_experts: int

    @classmethod
    def of(cls, moe: MoE) -> ExpertLayout:
        """Takes the layout from a stack of layers, whose arrays may be shapes alone."""
        leaves, start = [], 0
        matrices = [getattr(moe, name) for name in MATRICES]
        for name, matrix in zip(MATRICES, matrices, strict=True):
            for leaf in _LEAVES:
                variable = getattr(matrix, leaf)
                if variable is None:
                    continue
                shape = tuple(variable.shape)[2:]  # without layers and experts
                packed = PackedLeaf(name, leaf, shape, jnp.dtype(variable.dtype).name, start)
                leaves.append(packed)
                start += -(-packed.num_bytes // _ALIGNMENT) * _ALIGNMENT
        return cls(
            tuple(leaves),
            tuple(matrix.sides for matrix in matrices),
            tuple(matrix.form for matrix in matrices),
            moe.options.dtype.name,
            start,
            tuple(moe.w_gate.weight.shape)[1],
        )

    def pack(self, parts: Mapping[tuple[str, str], np.ndarray]) -> np.ndarray:
        """Returns one expert's bytes, uint8 [num_bytes].

        Args:
            parts: its arrays, by matrix and leaf.
        """
        out = np.zeros(self.num_bytes, np.uint8)
        for leaf in self.leaves:
            array = np.ascontiguousarray(parts[leaf.matrix, leaf.leaf]).reshape(-1)
            assert array.dtype == jnp.dtype(leaf.dtype), (leaf, array.dtype)
            stored = pack_halves(array) if array.dtype in _HALVES else array.view(np.uint8)
            out[leaf.start : leaf.start + leaf.num_bytes] = stored
        return out

    def unpack(self, packed: Sequence[jax.Array]) -> ExpertWeights:
        """Returns experts as the grouped matmul takes them, from the bytes of each."""
        bytes_EB = jnp.stack(list(packed))
        parts = {
            (leaf.matrix, leaf.leaf): _typed(
                bytes_EB[:, leaf.start : leaf.start + leaf.num_bytes], leaf
            )
            for leaf in self.leaves
        }
        matrices: list[Any] = []
        for name, sides, form in zip(MATRICES, self.sides, self.forms, strict=True):
            weight, scales, zeros = (parts.get((name, leaf)) for leaf in _LEAVES)
            assert weight is not None
            if form is None:
                matrices.append(weight.astype(self.dtype))
            else:
                matrices.append(sides.as_matrix(form, weight, scales, zeros))
        return ExpertWeights(*matrices)


def _typed(bytes_EB: jax.Array, leaf: PackedLeaf) -> jax.Array:
    """Reads a leaf's bytes as its numbers."""
    dtype, num_experts = jnp.dtype(leaf.dtype), bytes_EB.shape[0]
    if dtype not in _HALVES and dtype.itemsize > 1:
        bytes_EB = bytes_EB.reshape(num_experts, -1, dtype.itemsize)
    numbers = jax.lax.bitcast_convert_type(bytes_EB, dtype).reshape(num_experts, -1)
    return numbers[:, : math.prod(leaf.shape)].reshape(num_experts, *leaf.shape)
