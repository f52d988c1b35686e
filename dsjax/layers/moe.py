"""DeepSeekMoE: routed experts beside the shared ones (§2.2.1)."""

from __future__ import annotations

import jax
from flax import nnx

from dsjax.config import MoEConfig, TokenDropping
from dsjax.layers.basic import MLP, LayerOptions
from dsjax.layers.expert_parallel import apply_experts
from dsjax.layers.expert_passes import Experts, Weights
from dsjax.layers.router import Router, RouterStats


class MoE(nnx.Module):
    """A feed-forward layer of `num_experts` routed experts and the shared experts."""

    def __init__(self, config: MoEConfig, hidden_dim: int, options: LayerOptions, rngs: nnx.Rngs):
        self.router = Router(config, hidden_dim, options, rngs)
        into = (config.num_experts, hidden_dim, config.intermediate_dim)
        out = (config.num_experts, config.intermediate_dim, hidden_dim)
        self.w_gate = options.weight(rngs, into, ("experts", "expert_embed", "mlp"))
        self.w_up = options.weight(rngs, into, ("experts", "expert_embed", "mlp"))
        self.w_down = options.weight(rngs, out, ("experts", "mlp", "expert_embed"))
        width = config.shared_intermediate_dim
        self.shared = MLP(hidden_dim, width, options, rngs) if width else None
        self.config = config
        self.options = options

    def __call__(
        self,
        x_BTD: jax.Array,
        mask_BT: jax.Array | None,
        dropping: TokenDropping | None,
        experts: Experts | None = None,
    ) -> tuple[jax.Array, RouterStats]:
        """Computes eq. 20 without its residual.

        Args:
            x_BTD: normalised residual stream, compute dtype.
            mask_BT: bool, False for padding; None for none.
            dropping: the token-dropping option; None to keep every token.
            experts: this layer's, where they lie in those of all layers; None for its own.

        Returns:
            out_BTD in the compute dtype, and the router's statistics.
        """
        routing, stats = self.router(x_BTD, mask_BT, dropping)
        shared = None if self.shared is None else self._weights(self.shared)
        experts = self._weights(self) if experts is None else experts
        out_BTD = apply_experts(x_BTD, routing, experts, shared, self.config, self.options)
        return out_BTD, stats

    def _weights(self, holder: MoE | MLP) -> Weights[jax.Array]:
        dtype = self.options.dtype
        return Weights(
            *(weight[...].astype(dtype) for weight in (holder.w_gate, holder.w_up, holder.w_down))
        )
