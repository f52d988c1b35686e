"""The two ends of a model: from tokens to the residual stream, and from it to logits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.layers.linear import Linear, float32_matmul, multiply
from dsjax.layers.options import LayerOptions
from pallas_kernels.quantised import QuantisedWeights


class Embedding(Linear):
    """A row of numbers for every token of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_dim: int, options: LayerOptions, rngs: nnx.Rngs):
        # As a stack of rows: each has its scales, whatever its width is divided into.
        super().__init__(
            (vocab_size, hidden_dim), ("vocab", "param_embed"), options, rngs, num_stacked=1
        )

    def rows(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns the tokens' rows, x_BTD in the compute dtype."""
        matrix = self.divided()
        if isinstance(matrix, QuantisedWeights):
            rows = jax.tree.map(lambda leaf: leaf[tokens_BT], matrix)
            x_BTD = rows.dequantised(self.options.dtype)[..., 0, :]
        else:
            x_BTD = self.stored()[tokens_BT].astype(self.options.dtype)
        return self.options.rules.constrain(x_BTD, "batch", "length", "embed")


class Head(Linear):
    """The projection to the vocabulary."""

    def __init__(self, hidden_dim: int, vocab_size: int, options: LayerOptions, rngs: nnx.Rngs):
        super().__init__((hidden_dim, vocab_size), ("param_embed", "vocab"), options, rngs)

    def logits(self, hidden_BTD: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        """Projects to the vocabulary.

        Args:
            hidden_BTD: the residual stream after the final norm.
            weight: [D, W] stands in for the head's own: one that is gathered already, and whose
                gradient may have another dtype. Then the logits stay where the product puts them.

        Returns:
            logits_BTW: float32.
        """
        if weight is not None:
            return float32_matmul(hidden_BTD, weight)
        matrix = self.divided()
        if isinstance(matrix, QuantisedWeights):
            logits_BTW = multiply(hidden_BTD, matrix, self.options.kernels, jnp.float32)
        else:
            logits_BTW = float32_matmul(hidden_BTD, self.stored())
        return self.options.rules.constrain(logits_BTW, "batch", "length", "vocab")
