"""One layer's expert weights where they lie in a stack of layers."""

import dataclasses
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
from jax import Array

from pallas_kernels.quantised import QuantisedWeights


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LayerOfStack:
    """One layer's weights [G, K, N] where they lie in a stack of layers; forward only.

    A scan over layers slices their weights, and XLA writes the slice out before it calls a kernel:
    in decode that moves up to three times the bytes. A kernel that fetches its weights itself can
    do so from the whole stack, which is then no scanned input but the same in every step.

    Attributes:
        stack: bfloat16 or float32 [L, G, K, N], or quantised.
        layer: int32 scalar, the layer.
    """

    stack: Array | QuantisedWeights
    layer: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weights, [G, K, N]."""
        return self.stack.shape[1:]

    @property
    def ndim(self) -> int:
        """Dims of the layer's weights."""
        return self.stack.ndim - 1

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the weights."""
        return self.stack.dtype

    def take(self) -> Array | QuantisedWeights:
        """Returns the layer's weights as an array of their own, which is a copy of them."""
        taken: Array | QuantisedWeights = jax.tree.map(
            lambda leaf: jax.lax.dynamic_index_in_dim(leaf, self.layer, keepdims=False), self.stack
        )
        return taken


def stored_and_layer(
    rhs: Sequence[QuantisedWeights | LayerOfStack],
) -> tuple[list[QuantisedWeights], Array | int]:
    """Returns what holds quantised matrices of one layer, and its number there.

    Args:
        rhs: quantised weights, or layers of stacks of them, all with the very layer of the first.
    """
    layers = [array.layer for array in rhs if isinstance(array, LayerOfStack)]
    stored = [
        cast(QuantisedWeights, array.stack) if isinstance(array, LayerOfStack) else array
        for array in rhs
    ]
    return stored, layers[0] if layers else 0
