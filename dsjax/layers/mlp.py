"""The SwiGLU feed-forward of a dense layer."""

from __future__ import annotations

import jax
from flax import nnx

from dsjax.layers.linear import Linear
from dsjax.layers.options import LayerOptions


class MLP(nnx.Module):
    """SwiGLU: a dense layer's feed-forward; of shared experts it holds the weights.

    Those are one wider MLP. They run beside the routed experts, not by `__call__`.
    """

    def __init__(
        self, hidden_dim: int, intermediate_dim: int, options: LayerOptions, rngs: nnx.Rngs
    ):
        into, dims = (hidden_dim, intermediate_dim), ("param_embed", "mlp")
        self.w_gate = Linear(into, dims, options, rngs)
        self.w_up = Linear(into, dims, options, rngs)
        self.w_down = Linear(into[::-1], dims[::-1], options, rngs)
        self.options = options

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Returns silu(x w_gate) * (x w_up) w_down, [B, T, D] in the compute dtype."""
        rules = self.options.rules
        gate_BTF, up_BTF = self.w_gate("BTD,DF->BTF", x_BTD), self.w_up("BTD,DF->BTF", x_BTD)
        hidden_BTF = rules.constrain(jax.nn.silu(gate_BTF) * up_BTF, "batch", "length", "mlp")
        out_BTD = self.w_down("BTF,FD->BTD", hidden_BTF)
        return rules.constrain(out_BTD, "batch", "length", "embed")
