"""What all layers of a model have in common."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx

from dsjax.config import ModelConfig, RuntimeConfig
from dsjax.kernels import Kernels
from dsjax.mesh import ShardingRules


@dataclass(frozen=True)
class LayerOptions:
    """What every layer is given; hashable, so part of a jit key.

    Attributes:
        runtime: compute type, type of new parameters, and what is recomputed.
        init_std: standard deviation of the initial weights.
        norm_eps: epsilon of the norms on the residual stream.
        rules: where arrays live.
        kernels: which kernel implementations run.
    """

    runtime: RuntimeConfig
    init_std: float
    norm_eps: float
    rules: ShardingRules
    kernels: Kernels

    @classmethod
    def of(
        cls, config: ModelConfig, runtime: RuntimeConfig, rules: ShardingRules, kernels: Kernels
    ) -> LayerOptions:
        """Takes the shared fields out of a model's config."""
        return cls(
            runtime=runtime,
            init_std=config.init_std,
            norm_eps=config.norm_eps,
            rules=rules,
            kernels=kernels,
        )

    @property
    def dtype(self) -> jnp.dtype:
        """The compute type."""
        return jnp.dtype(self.runtime.dtype)

    @property
    def param_dtype(self) -> jnp.dtype:
        """The type of new parameters."""
        return jnp.dtype(self.runtime.param_dtype)

    @property
    def latent_dtype(self) -> jnp.dtype:
        """The type of the latents that generation keeps."""
        return jnp.dtype(self.runtime.cached_dtype)

    def new_weight(
        self, rngs: nnx.Rngs, shape: tuple[int, ...], dims: tuple[str, ...]
    ) -> nnx.Param:
        """Creates a normally distributed parameter with its logical dims as metadata."""
        # Drawn in float32 whatever the storage type, so that a bf16 model starts where its
        # float32 twin does.
        values = self.init_std * jax.random.normal(rngs.params(), shape, jnp.float32)
        return nnx.Param(values.astype(self.param_dtype), dims=dims)
