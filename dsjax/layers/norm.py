"""Root-mean-square normalisation."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.layers.options import LayerOptions


class RMSNorm(nnx.Module):
    """Root-mean-square normalisation, in float32."""

    def __init__(self, dim: int, options: LayerOptions, eps: float | None = None):
        self.weight = nnx.Param(jnp.ones(dim, options.param_dtype), dims=("norm",))
        self.eps = options.norm_eps if eps is None else eps
        self.options = options

    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        """Normalises the last dim; returns the compute dtype."""
        x_BTD = x_BTD.astype(jnp.float32)
        mean_square = jnp.mean(jnp.square(x_BTD), axis=-1, keepdims=True)
        x_BTD = x_BTD * jax.lax.rsqrt(mean_square + self.eps)
        return (x_BTD * self.weight[...].astype(jnp.float32)).astype(self.options.dtype)
