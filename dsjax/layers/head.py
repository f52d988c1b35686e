"""The two ends of a model: from tokens to the residual stream, and from it to logits."""

from __future__ import annotations

import jax
from flax import nnx

from dsjax.layers.linear import Linear, float32_matmul
from dsjax.layers.options import LayerOptions


class Embedding(nnx.Module):
    """A row of numbers for every token of the vocabulary."""

    def __init__(self, vocab_size: int, hidden_dim: int, options: LayerOptions, rngs: nnx.Rngs):
        dims = ("vocab", "param_embed")
        self.weight = options.new_weight(rngs, (vocab_size, hidden_dim), dims)
        self.options = options

    def __call__(self, tokens_BT: jax.Array) -> jax.Array:
        """Returns x_BTD in the compute dtype."""
        x_BTD = self.weight[...][tokens_BT].astype(self.options.dtype)
        return self.options.rules.constrain(x_BTD, "batch", "length", "embed")


class Head(Linear):
    """The projection to the vocabulary."""

    def __init__(self, hidden_dim: int, vocab_size: int, options: LayerOptions, rngs: nnx.Rngs):
        super().__init__((hidden_dim, vocab_size), ("param_embed", "vocab"), options, rngs)

    def logits(self, hidden_BTD: jax.Array, weight: jax.Array | None = None) -> jax.Array:
        """Projects to the vocabulary.

        Args:
            hidden_BTD: the residual stream after the final norm.
            weight: [D, W] stands in for the head's own, so that its gradient may have another
                dtype.

        Returns:
            logits_BTW: float32.
        """
        logits_BTW = float32_matmul(hidden_BTD, self.stored() if weight is None else weight)
        return self.options.rules.constrain(logits_BTW, "batch", "length", "vocab")
