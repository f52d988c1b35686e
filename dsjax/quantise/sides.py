"""The dims of a matrix by what a product does with them, and what is stored of it in fewer bits."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp

from dsjax.mesh import ShardingRules
from pallas_kernels.quantised import Format, QuantisedWeights, quantise
from pallas_kernels.quantised_matmul import quantised_matmul


@dataclass(frozen=True)
class Sides:
    """The dims of a matrix: those that count matrices, those contracted, those of the result.

    Stored in fewer bits, its numbers keep their dims, those of the result before those contracted.
    Scales have the dims of the result and, last, the blocks along all that is contracted; where a
    block has several columns of the result, these are one dim.

    Attributes:
        shape: sizes of one layer's.
        dims: logical dims.
        num_stacked: dims that count matrices.
        num_contracted: dims that are contracted, after those.
    """

    shape: tuple[int, ...]
    dims: tuple[str, ...]
    num_stacked: int
    num_contracted: int

    def _split[T](self, items: tuple[T, ...]) -> tuple[tuple[T, ...], tuple[T, ...], tuple[T, ...]]:
        first, last = self.num_stacked, self.num_stacked + self.num_contracted
        return items[:first], items[first:last], items[last:]

    @property
    def stored_order(self) -> tuple[int, ...]:
        """Of each dim of the stored numbers, the dim of the matrix it is."""
        lead, ins, outs = self._split(tuple(range(len(self.shape))))
        return lead + outs + ins

    @property
    def single(self) -> Sides:
        """The dims of one of the matrices."""
        shape, dims = self.shape[self.num_stacked :], self.dims[self.num_stacked :]
        return Sides(shape, dims, 0, self.num_contracted)

    @property
    def width_in(self) -> int:
        """Numbers that are contracted: K."""
        return math.prod(self._split(self.shape)[1])

    def quantised(
        self,
        weight: Any,
        form: Format,
        rounding: Callable[[Any, Format], QuantisedWeights] = quantise,
    ) -> QuantisedWeights:
        """Quantises a matrix, or those of a stack of layers; the leaves are as they are stored.

        Args:
            weight: float [*layers, *shape], NumPy's or jax's; sizes of the dims that count matrices
                or are of the result may be a part of the whole.
            form: how to store it.
            rounding: chooses the numbers of matrices [..., N, K].
        """
        if form.block_out > 1 and len(self._split(self.dims)[2]) != 1:
            raise ValueError(
                f"quantisation: blocks of {form.block_out} columns do not fit {self.dims}, whose "
                "columns are no single dim; use a form with a scale for each column"
            )
        extra = weight.ndim - len(self.shape)
        order = (*range(extra), *(extra + dim for dim in self.stored_order))
        stored = weight.transpose(order)
        lead = stored.shape[: extra + self.num_stacked]
        outs = stored.shape[len(lead) : stored.ndim - self.num_contracted]
        ins = stored.shape[stored.ndim - self.num_contracted :]
        whole = rounding(stored.reshape(*lead, math.prod(outs), math.prod(ins)), form)
        values = whole.values.reshape(*lead, *outs, *ins)
        scales, zeros = whole.scales, whole.zeros
        if form.block_out == 1:
            scales = scales.reshape(*lead, *outs, -1)
            zeros = None if zeros is None else zeros.reshape(*lead, *outs, -1)
        return QuantisedWeights(values, scales, zeros, form)

    def as_matrix(
        self, form: Format, values: Any, scales: Any, zeros: Any | None
    ) -> QuantisedWeights:
        """Joins the dims of each side of what is stored of one layer, or of a stack of layers."""
        last = values.ndim - self.num_contracted
        stacked = values.shape[: values.ndim - len(self.shape) + self.num_stacked]
        num_n = math.prod(values.shape[len(stacked) : last])

        def joined(array: Any) -> Any:
            rows = -(-num_n // form.block_out)
            return array.reshape(*stacked, rows, array.shape[-1])

        return QuantisedWeights(
            values.reshape(*stacked, num_n, -1),
            joined(scales),
            None if zeros is None else joined(zeros),
            form,
        )

    def whole(self, dequantised: jax.Array) -> jax.Array:
        """Returns a widened matrix [*stacked, N, K] with the dims that it had."""
        lead, ins, outs = self._split(self.shape)
        array = dequantised.reshape(*lead, *outs, *ins)
        order = self.stored_order
        return array.transpose([order.index(dim) for dim in range(len(order))])

    def contract(
        self, subscripts: str, x: jax.Array, matrix: QuantisedWeights, how: Mapping[str, str]
    ) -> jax.Array:
        """Contracts x with the matrix as `einsum` would, in x's dtype.

        Args:
            subscripts: of `einsum`; the second operand is the matrix.
            x: compute type.
            matrix: the matrix.
            how: `products` and `implementation` of `quantised_matmul`.
        """
        left, result = subscripts.split("->")
        letters, of_matrix = left.split(",")
        _, ins, outs = self._split(tuple(of_matrix))
        plain = letters.endswith("".join(ins)) and result.endswith("".join(outs))
        if not plain or set(outs) & set(letters):
            # Keys and values in the absorbed form: a matrix for each head, one of them transposed.
            return jnp.einsum(subscripts, x, self.whole(matrix.dequantised(x.dtype)))
        rows = x.shape[: x.ndim - len(ins)]
        out = quantised_matmul(x.reshape(*rows, -1), matrix, **how)
        return out.reshape(*rows, *self._split(self.shape)[2])

    def leaf_dims(self, form: Format, rules: ShardingRules) -> Any:
        """The logical dims of what is stored: `QuantisedWeights` with dims in place of arrays.

        Raises:
            ValueError: the border between two shards lies inside a group or block.
        """
        lead, ins, outs = self._split(self.dims)
        columns = outs if form.block_out == 1 else (self._dim_of_blocks(outs, form, rules),)
        scales = (*lead, *columns, self._dim_of_groups(form, rules))
        zeros = scales if form.zero_points else None
        return QuantisedWeights((*lead, *outs, *ins), scales, zeros, form)

    def _dim_of_groups(self, form: Format, rules: ShardingRules) -> str | None:
        """The logical dim that divides the groups along what is contracted."""
        _, dims, _ = self._split(self.dims)
        _, sizes, _ = self._split(self.shape)
        if form.block_in is None or rules.num_shards(dims[0]) == 1:
            return None
        return _undivided(dims[0], math.prod(sizes), form.block_in, rules)

    def _dim_of_blocks(
        self, dims: tuple[str, ...], form: Format, rules: ShardingRules
    ) -> str | None:
        _, _, sizes = self._split(self.shape)
        if rules.num_shards(dims[0]) == 1:
            return None
        return _undivided(dims[0], math.prod(sizes), form.block_out, rules)


def _undivided(dim: str, size: int, block: int, rules: ShardingRules) -> str:
    """The dim, after checking that no border between shards lies inside a block."""
    shards = rules.num_shards(dim)
    if size % shards or (size // shards) % block:
        raise ValueError(
            f"quantisation: a border between the {shards} shards of {dim}={size} lies inside a "
            f"group of {block}; use fewer shards, or int8 or fp8 with a scale for each column"
        )
    return dim


def dims_within(matrix: Any, dims: tuple[str, ...], rules: ShardingRules) -> Any:
    """Returns the logical dims of a matrix for `ShardingRules.shard_map`, whatever its form.

    Args:
        matrix: an array or `QuantisedWeights`, whose last two dims are its sides.
        dims: its logical dims; those that are contracted before those of the result.
        rules: how they are divided.
    """
    if not isinstance(matrix, QuantisedWeights):
        return dims
    return Sides(matrix.shape, dims, len(dims) - 2, 1).leaf_dims(matrix.format, rules)
