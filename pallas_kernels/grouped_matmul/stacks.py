"""One layer's expert weights where they lie in a stack of layers."""

import dataclasses
import functools
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
        more: of stack's dtype, [L, K, S * N] or [L, S * K, N]: matrices of S groups after those G,
            side by side as one wider MLP has them, which is how a model holds shared experts; None
            for none.
    """

    stack: Array | QuantisedWeights
    layer: Array
    more: Array | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the layer's weights, [G + S, K, N]."""
        groups, num_k, num_n = self.stack.shape[1:]
        if self.more is not None:
            groups += self.more.shape[1] // num_k * (self.more.shape[2] // num_n)
        return groups, num_k, num_n

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
        take = functools.partial(
            jax.lax.dynamic_index_in_dim, index=self.layer, axis=0, keepdims=False
        )
        taken: Array | QuantisedWeights = jax.tree.map(take, self.stack)
        if self.more is None:
            return taken
        assert isinstance(taken, Array)
        _, num_k, num_n = taken.shape
        more = take(self.more).reshape(-1, num_k, self.more.shape[2] // num_n, num_n)
        return jnp.concatenate([taken, more.swapaxes(1, 2).reshape(-1, num_k, num_n)])

    def check(self, name: str) -> None:
        """Raises ValueError when `more` does not fit.

        Args:
            name: the argument to name in the message.
        """
        if self.more is None:
            return
        num_layers, _, num_k, num_n = self.stack.shape
        layers, rows, columns = self.more.shape
        whole = (rows == num_k and columns % num_n == 0) or (columns == num_n and not rows % num_k)
        if layers != num_layers or not whole or self.more.dtype != self.stack.dtype:
            raise ValueError(
                f"{name}.more: shape {self.more.shape} and dtype {self.more.dtype} must be "
                f"[{num_layers}, {num_k}, S * {num_n}] or [{num_layers}, S * {num_k}, {num_n}] of "
                f"{self.stack.dtype}"
            )


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
