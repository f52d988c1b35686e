"""The experts of one device over whatever tokens reached it: one pass over a window of rows."""

from __future__ import annotations

from dataclasses import dataclass

import jax

from dsjax.kernels import Kernels
from pallas_kernels.expert_permute import combine_rows, gather_rows, sort_by_expert, take_rows
from pallas_kernels.grouped_matmul import LayerOfStack, grouped_matmul, grouped_swiglu
from pallas_kernels.quantised import Format, QuantisedWeights


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class ExpertWeights:
    """SwiGLU's three matrices for every expert of a layer, compute dtype or quantised.

    Attributes:
        gate: [E, D, F]; with `layer`, those of all layers, [L, E, D, F].
        up: likewise.
        down: [E, F, D], or [L, E, F, D].
        layer: int32 scalar, the layer, for kernels that read its experts where they lie among
            those of all layers; None where the matrices are the layer's own.
    """

    gate: jax.Array | QuantisedWeights
    up: jax.Array | QuantisedWeights
    down: jax.Array | QuantisedWeights
    layer: jax.Array | None = None

    @property
    def num_experts(self) -> int:
        """E: all of a layer, or those of one device."""
        return self.gate.shape[-3]

    def matrices(self) -> tuple[GroupedWeights, GroupedWeights, GroupedWeights]:
        """Returns gate, up and down as the grouped matmul takes them."""
        if self.layer is None:
            return self.gate, self.up, self.down
        layer = self.layer  # one object, by which gate and up are known to be of one layer
        gate, up, down = (LayerOfStack(stack, layer) for stack in (self.gate, self.up, self.down))
        return gate, up, down


GroupedWeights = jax.Array | QuantisedWeights | LayerOfStack


def apply_experts_to_rows(
    x_ND: jax.Array,
    experts_NK: jax.Array,
    gates_NK: jax.Array,
    weights: ExpertWeights,
    first_row: jax.Array | int,
    num_rows: int,
    kernels: Kernels,
) -> jax.Array:
    """Sums each token's experts among those given, weighted by its gates in float32.

    A row is one expert of one token. Sorted by expert, they come in windows of `num_rows`: what the
    windows give adds up to the sum over all experts of a token.

    Args:
        x_ND: compute dtype.
        experts_NK: int32; the number of experts given for one that is not among them.
        gates_NK: float32.
        weights: the experts.
        first_row: int32, the first row of the window.
        num_rows: rows of a window.
        kernels: that copy rows and multiply them.

    Returns:
        out_ND in x's dtype; 0 for a token without rows in the window.
    """
    order = sort_by_expert(experts_NK, weights.num_experts, compare=kernels.compare_few)
    if order.token_M.shape[0] > num_rows:
        order = take_rows(order, first_row, num_rows)
    gate, up, down = weights.matrices()
    permute, name = kernels.expert_permute, kernels.grouped_matmul
    products = kernels.products_of(_form(weights.gate), _form(weights.up))
    rows_MD = gather_rows(x_ND, order, implementation=permute)
    hidden_MF = grouped_swiglu(
        rows_MD, gate, up, order.group_sizes_E, products=products, implementation=name
    )
    products = kernels.products_of(_form(weights.down))
    rows_MD = grouped_matmul(
        hidden_MF, down, order.group_sizes_E, products=products, implementation=name
    )
    return combine_rows(rows_MD, gates_NK, order, implementation=permute)


def _form(weights: jax.Array | QuantisedWeights) -> Format | None:
    return weights.format if isinstance(weights, QuantisedWeights) else None
